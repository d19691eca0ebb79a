"""The replies of a page, what is said of them, and the lines of feedback that are kept."""

import uuid
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from data.reading.feedback import append_feedback, generated_by
from tools.page.show import id_from


class Page(NamedTuple):
    """What the page shows and where it writes."""

    model: str  # its name
    text: dict  # its texts, of texts.yaml, in a language
    system: str  # system prompt
    thinking: bool
    settings: dict  # keywords of ReplyStream
    port: int
    feedback: Path | None = None
    sha256: str = ""  # of the weights
    form: dict = MappingProxyType({})  # item -> what is asked of each reply
    rater: str = ""  # who gives feedback, if nobody has logged in and the field is empty
    keep_all: bool = False  # replies without a verdict, too
    host: str = "127.0.0.1"
    passwords: tuple = ()  # (name, password) pairs
    names_hidden: bool = False  # of a comparison, after a vote too


def stamp(rater: str, session: str) -> dict:
    """When, and by whom."""
    return {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "rater": rater, "session": session}


class Replies:
    """The replies of this page by id, so that a rating means the reply it was given for, whatever has been undone or
    asked again since."""

    def __init__(self, page: Page):
        self.page, self.known = page, {}

    def begin(self, dialogue: list[dict], settings: dict, session: str = "") -> str:
        name = uuid.uuid4().hex[:16]
        self.known[name] = {"messages": dialogue, "settings": settings, "session": session, "think": "", "answer": "",
                            "said": {}}  # fmt: skip
        return name

    def find(self, name: str | None) -> dict | None:
        """The reply, if it has an answer."""
        reply = self.known.get(name)
        return reply if reply and reply["answer"] else None

    def rate(self, name: str, verdict: str, rater: str = "", **more) -> None:
        """more: reason, correction, form, as far as they are given. Each rater has a line. Raises OSError if it cannot
        be written."""
        reply = self.known[name]
        said = {"role": "assistant", "content": reply["answer"]}
        if reply["think"]:
            said["reasoning_content"] = reply["think"]
        # A thumb after a correction, or after a form, does not take it back.
        own = reply["said"].setdefault(rater, {})
        own |= {"verdict": verdict} | {key: value for key, value in more.items() if value}
        number = list(reply["said"]).index(rater)
        line = {
            "id": f"{name}-{number}" if number else name,
            **stamp(rater, reply["session"]),
            "model": self.page.model,
            "model_sha256": self.page.sha256,
            "settings": reply["settings"],
            "AIGC": generated_by(self.page.model, name),
            "messages": [*reply["messages"], said],
            "verdict": verdict,
        }
        line |= {key: own[key] for key in ("correction", "form") if own.get(key)}
        line |= {"reason": more["reason"]} if more.get("reason") else {}
        append_feedback(self.page.feedback, line)


class Panel:
    """The panel of corrections: it holds the id of one reply, its question, answer and thinking, a reason, and the
    answers of the form. What is saved is always said of the reply whose question the panel shows."""

    EMPTY = (None, "", "", "", "")

    def __init__(self, replies: Replies):
        self.replies, self.items = replies, tuple(replies.page.form)
        self.empty = (*self.EMPTY, *[None] * len(self.items))

    def fill(self, name: str | None, rater: str = "") -> tuple:
        reply = self.replies.find(name)
        if reply is None:
            return self.empty
        form = reply["said"].get(rater, {}).get("form", {})
        answers = [form.get(item) for item in self.items]
        return name, reply["messages"][-1]["content"], reply["answer"], reply["think"], "", *answers

    def rate(self, history: list[dict], index: int, liked, rater: str = "") -> tuple[tuple, str]:
        """(what the panel holds, verdict). Raises LookupError if the bubble is of no reply."""
        name = id_from(history, index)
        if self.replies.find(name) is None:
            raise LookupError
        verdict = {True: "like", False: "dislike"}.get(liked, "withdrawn")  # taking a thumb back sends an empty text
        self.replies.rate(name, verdict, rater)
        return self.fill(name, rater), verdict

    def open(self, history: list[dict], name: str | None, rater: str = "") -> tuple | None:
        """The last reply of the dialogue; None if the panel holds one already, which may be in the writing."""
        names = [id_from(history, index) for index in range(len(history))]
        if name in names and self.replies.find(name):
            return None
        return self.fill(next((name for name in reversed(names) if self.replies.find(name)), None), rater)

    def save(
        self, history: list[dict], name: str | None, answer: str, thought: str, reason: str, *form, rater: str = ""
    ) -> tuple:
        """A correction, if a text was changed or no form was filled in, and the form. Raises LookupError if the reply
        is not in the dialogue any more, ValueError if the answer is empty."""
        reply = self.replies.find(name)
        if reply is None or name not in [id_from(history, index) for index in range(len(history))]:
            raise LookupError
        if not answer.strip():
            raise ValueError
        correction = {"content": answer.strip()} | ({"reasoning_content": thought.strip()} if thought.strip() else {})
        filled = {item: value for item, value in zip(self.items, form, strict=True) if value}
        if filled and (answer.strip(), thought.strip()) == (reply["answer"].strip(), reply["think"].strip()):
            verdict, correction = reply["said"].get(rater, {}).get("verdict", "shown"), None
        else:
            verdict = "edit"
        self.replies.rate(name, verdict, rater, reason=reason.strip(), correction=correction, form=filled)
        return self.empty
