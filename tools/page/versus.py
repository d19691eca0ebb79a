"""Two models beside each other, which is which hidden: python -m tools.chat A --versus B --web --feedback votes.jsonl

The side of each is drawn for each question, and both reply with the same settings. Questions of a list are answered
once, so that several people vote on the same replies.
"""

import json
import random
import threading
import uuid
from typing import NamedTuple

from data.reading.feedback import VOTES, append_feedback, generated_by, is_cast, newest
from data.reading.read import read_file
from model.generate import ReplyError, ReplyStream
from tools.page.replies import Page, stamp
from tools.page.show import bubbles, plain_chatbot
from tools.page.web import head, rater_field, told, who

VERDICTS = tuple(VOTES)
CHOICES = ("left", "right", "both_good", "both_bad")


class Model(NamedTuple):
    name: str
    sha256: str
    causal_lm: object
    tokenizer: object
    system: str


class Question(NamedTuple):
    text: str
    group: str = ""  # of the column that --group-by names


class Versus:
    """What all sessions share: the models, the list of questions, the replies to them, and the votes so far."""

    def __init__(self, page: Page, models: list[Model], questions: list[Question]):
        self.page, self.models, self.questions = page, models, questions
        self.lock = threading.Lock()  # one reply at a time, so a question is answered once
        self.replies: dict[str, list[dict]] = {}
        self.voted: set[tuple[str, str]] = set()  # rater, question
        self.refused: set[str] = set()  # questions that a model cannot reply to
        for line in self.earlier():
            by_model = {(reply.get("model_sha256"), reply.get("system")): reply for reply in line["replies"]}
            own = [by_model.get((model.sha256, model.system)) for model in models]
            if None not in own and line.get("settings") == self.settings:
                self.replies.setdefault(line["messages"][-1]["content"], own)
                self.voted.add((line.get("rater", ""), line["messages"][-1]["content"]))

    @property
    def settings(self) -> dict:
        return {"thinking": self.page.thinking, **self.page.settings}

    def earlier(self) -> list[dict]:
        """The votes in the file, of each rater on the same replies the last."""
        path = self.page.feedback
        lines = newest([*read_file(path, path.name, "", [])]) if path.exists() else []
        return [row for _, row in lines if is_cast(row)]

    def next_for(self, rater: str) -> tuple[Question | None, int]:
        """(the first question of the list that the rater has not voted on, how many there were before)."""
        done = [(rater, one.text) in self.voted or one.text in self.refused for one in self.questions]
        return (self.questions[done.index(False)] if False in done else None), sum(done)

    def begin(self, question: Question) -> dict:
        """What a session knows of one comparison. order: which model stands left, and which right."""
        order = random.SystemRandom().sample([0, 1], 2)
        return {"question": question, "order": order, "kept": self.kept(question), "replies": [None, None]}

    def kept(self, question: Question) -> list[dict] | None:
        """The replies to a question of the list, if there are some."""
        return self.replies.get(question.text) if question in self.questions else None

    def keep(self, question: Question, replies: list[dict]) -> None:
        if question in self.questions:
            self.replies.setdefault(question.text, replies)

    def stream(self, gradio, now: dict, side: int):
        """The bubbles of the reply on one side, 0 or 1, as it comes."""
        number, text = now["order"][side], self.page.text
        model = self.models[number]
        dialogue = dialogue_of(model.system, now["question"])
        known = {"messages": dialogue, "think": "", "answer": ""}
        if now["kept"]:
            reply = now["kept"][number]
            known |= {"think": reply.get("reasoning_content", ""), "answer": reply["content"]}
        else:
            stream = ReplyStream(model.causal_lm, model.tokenizer, dialogue, self.page.thinking, **self.page.settings)
            for part, piece in stream:
                known[part] += piece
                yield bubbles(gradio, "reply", known, 0.0, text, done=part == "answer")
        known["whole"] = True
        said = {"role": "assistant", "content": known["answer"], "model": model.name, "model_sha256": model.sha256}
        said["system"] = model.system
        said |= {"reasoning_content": known["think"]} if known["think"] else {}
        now["replies"][number] = said
        yield bubbles(gradio, "reply", known, 0.0, text, done=True)

    def vote(self, now: dict, choice: str, reason: str, rater: str, session: str) -> None:
        """choice: left, right, both_good or both_bad. Raises LookupError without two replies, OSError."""
        if not now or None in now["replies"]:
            raise LookupError
        left = now["order"][0]
        verdict = {"left": VERDICTS[left], "right": VERDICTS[1 - left]}.get(choice, choice)
        a, b = self.models
        # Of one rater on the same replies there is one vote, the last.
        key = json.dumps([rater, now["question"].text, now["replies"]], ensure_ascii=False)
        name = uuid.uuid5(uuid.NAMESPACE_URL, key).hex[:16]
        line = {
            "id": name,
            **stamp(rater, session),
            "settings": self.settings,
            "AIGC": generated_by(" / ".join(model.name for model in self.models), name),
            "messages": dialogue_of(a.system if a.system == b.system else "", now["question"]),
            "replies": now["replies"],
            "left": VERDICTS[left],
            "verdict": verdict,
        }
        line |= {"group": now["question"].group} if now["question"].group else {}
        line |= {"reason": reason.strip()} if reason.strip() else {}
        append_feedback(self.page.feedback, line)
        self.voted.add((rater, now["question"].text))
        self.keep(now["question"], now["replies"])

    def names(self, now: dict) -> str:
        left, right = (self.models[number].name for number in now["order"])
        return self.page.text["names"].format(left, right)


def dialogue_of(system: str, question: Question) -> list[dict]:
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question.text}]


def build(gradio, versus: Versus):
    page, text = versus.page, versus.page.text
    has_list = bool(versus.questions)
    with gradio.Blocks(title=text["versus"], analytics_enabled=False) as blocks:
        head(gradio, page, text["versus"])
        now, rater = gradio.State(None), rater_field(gradio, page)
        asked = gradio.Textbox(label=text["question"], interactive=not has_list, lines=2, max_lines=6)
        start = gradio.Button(text["next"] if has_list else text["send"], variant="primary")
        with gradio.Row(equal_height=True):
            sides = [plain_chatbot(gradio, height="44vh", label=text[name], show_label=True, render=True)
                     for name in ("left", "right")]  # fmt: skip
        reason = gradio.Textbox(label=text["reason"])
        with gradio.Row():
            votes = {name: gradio.Button(text[f"vote_{name}"], interactive=False, min_width=120) for name in CHOICES}
        result = gradio.Textbox(show_label=False, interactive=False, container=False)
        outputs, private = [*votes.values()], {"api_visibility": "private", "show_progress": "hidden"}
        for event in (start.click, *([] if has_list else [asked.submit])):
            event(asking(gradio, versus), [asked, rater], [now, asked, *sides, result, start, *outputs], **private)
        for name, button in votes.items():
            button.click(voting(gradio, versus, name), [now, reason, rater], [now, reason, result, *outputs], **private)
    return blocks


def asking(gradio, versus: Versus):
    """What the button that asks does: both replies come, one after the other."""
    page, text = versus.page, versus.page.text

    def ask(request: gradio.Request, typed: str, field: str):
        by, _ = who(request, field, page)
        if versus.questions and not by:
            raise gradio.Error(text["no_rater"], title=text["error"], print_exception=False)
        question, done = versus.next_for(by) if versus.questions else (Question(typed.strip()), 0)
        if question is None or not question.text:
            yield None, typed, [], [], text["all_done"].format(done) if versus.questions else text["ask"], *ready(True)
            return
        begun, shown = versus.begin(question), [[], []]
        progress = text["progress"].format(done + 1, len(versus.questions)) if versus.questions else ""
        yield begun, question.text, *shown, progress, *ready(False)
        try:
            with versus.lock:
                begun["kept"] = versus.kept(question)
                for side in (0, 1):
                    for part in versus.stream(gradio, begun, side):
                        shown[side] = [{"role": "user", "content": question.text}, *part]
                        yield begun, question.text, *shown, progress, *ready(False)
                versus.keep(question, begun["replies"])
        except ReplyError as error:
            versus.refused.add(question.text)
            yield None, question.text, *shown, f"{text[error.kind]} ({error})", *ready(True)
            return
        yield begun, question.text, *shown, progress, *ready(True, True)

    def ready(can_ask: bool, can_vote: bool = False) -> list:
        return [gradio.Button(interactive=can_ask), *[gradio.Button(interactive=can_vote)] * len(CHOICES)]

    return ask


def voting(gradio, versus: Versus, choice: str):
    """What the button of a choice does."""
    page, text = versus.page, versus.page.text

    def vote(request: gradio.Request, begun: dict | None, why: str, field: str):
        told(gradio, text, lambda: versus.vote(begun, choice, why, *who(request, field, page)), "no_vote")
        names = "" if page.names_hidden else versus.names(begun)
        return None, "", f"{text['saved']} {names}", *[gradio.Button(interactive=False)] * len(CHOICES)

    return vote
