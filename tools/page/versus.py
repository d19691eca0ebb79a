"""Two models beside each other, which is which hidden: python -m tools.chat A --versus B --web --feedback votes.jsonl

The side of each is drawn for each question, and both reply with the same settings. Questions of a list are answered
once, so that several people vote on the same replies.
"""

import html
import json
import random
import threading
import uuid
from typing import NamedTuple

from data.base.errors import UserError
from data.reading.feedback import VOTES, append_feedback, generated_by, is_feedback, is_vote, newest, problem_of
from data.reading.read import read_file
from model.generate import ReplyError, ReplyStream
from tools.page.replies import Page, stamp
from tools.page.show import bubbles, plain_chatbot
from tools.page.web import head, rater_field, who

VERDICTS = tuple(VOTES)


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
        path = self.page.feedback
        if not path.exists():
            return []
        lines = [(place, row) for place, row in read_file(path, path.name, "", []) if is_feedback(row)]
        lines = [(place, row) for place, row in lines if is_vote(row) and problem_of(row) is None]
        return [row for _, row in newest(lines) if row["verdict"] in VOTES]

    def next_for(self, rater: str) -> tuple[Question | None, int]:
        """(the first question of the list that the rater has not voted on, how many there were before)."""
        done = [(rater, one.text) in self.voted or one.text in self.refused for one in self.questions]
        return (self.questions[done.index(False)] if False in done else None), sum(done)

    def begin(self, question: Question) -> dict:
        """What a session knows of one comparison."""
        order = [0, 1]
        random.SystemRandom().shuffle(order)
        kept = self.replies.get(question.text) if question in self.questions else None
        return {"question": question, "order": order, "kept": kept, "replies": [None, None]}

    def stream(self, gradio, now: dict, side: int):
        """The bubbles of the reply on one side, 0 or 1, as it comes."""
        number, text = now["order"][side], self.page.text
        model = self.models[number]
        dialogue = [{"role": "system", "content": model.system}] if model.system else []
        dialogue += [{"role": "user", "content": now["question"].text}]
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
        systems = {model.system for model in self.models}
        dialogue = [{"role": "system", "content": system} for system in systems if system and len(systems) == 1]
        # Of one rater on the same replies there is one vote, the last.
        key = json.dumps([rater, now["question"].text, now["replies"]], ensure_ascii=False)
        name = uuid.uuid5(uuid.NAMESPACE_URL, key).hex[:16]
        line = {
            "id": name,
            **stamp(rater, session),
            "settings": self.settings,
            "AIGC": generated_by(" / ".join(model.name for model in self.models), name),
            "messages": [*dialogue, {"role": "user", "content": now["question"].text}],
            "replies": now["replies"],
            "left": VERDICTS[left],
            "verdict": verdict,
        }
        line |= {"group": now["question"].group} if now["question"].group else {}
        line |= {"reason": reason.strip()} if reason.strip() else {}
        append_feedback(self.page.feedback, line)
        self.voted.add((line["rater"], now["question"].text))
        if now["question"] in self.questions:
            self.replies.setdefault(now["question"].text, now["replies"])

    def names(self, now: dict) -> str:
        left, right = (self.models[number].name for number in now["order"])
        return self.page.text["names"].format(left, right)


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
            votes = {name: gradio.Button(text[f"vote_{name}"], interactive=False, min_width=120)
                     for name in ("left", "right", "both_good", "both_bad")}  # fmt: skip
        result = gradio.Textbox(show_label=False, interactive=False, container=False)
    buttons = list(votes.values())

    def ready(is_ready: bool) -> list:
        return [gradio.Button(interactive=is_ready)] * len(buttons)

    def ask(request: gradio.Request, typed: str, field: str):
        by, _ = who(request, field, page)
        if has_list and not by:
            raise gradio.Error(text["no_rater"], title=text["error"], print_exception=False)
        question, done = versus.next_for(by) if has_list else (Question(typed.strip()), 0)
        if question is None or not question.text:
            message = text["all_done"].format(done) if has_list else text["ask"]
            yield None, typed, [], [], message, gradio.Button(interactive=True), *ready(False)
            return
        begun = versus.begin(question)
        progress = text["progress"].format(done + 1, len(versus.questions)) if has_list else ""
        shown, user = [[], []], {"role": "user", "content": question.text}
        wait = begun, question.text, *shown, progress, gradio.Button(interactive=False), *ready(False)
        yield wait
        try:
            with versus.lock:
                if question in versus.questions and not begun["kept"]:  # another session may have been first
                    begun["kept"] = versus.replies.get(question.text)
                for side in (0, 1):
                    for part in versus.stream(gradio, begun, side):
                        shown[side] = [user, *part]
                        yield begun, question.text, *shown, progress, gradio.Button(interactive=False), *ready(False)
                if question in versus.questions:
                    versus.replies.setdefault(question.text, begun["replies"])
        except ReplyError as error:
            message = f"{text[error.kind]} ({error})"
            versus.refused.add(question.text)
            yield None, question.text, *shown, message, gradio.Button(interactive=True), *ready(False)
            return
        yield begun, question.text, *shown, progress, gradio.Button(interactive=True), *ready(True)

    def voting(choice: str):
        def vote(request: gradio.Request, begun: dict | None, why: str, field: str):
            try:
                versus.vote(begun, choice, why, *who(request, field, page))
            except LookupError:
                raise gradio.Error(text["no_vote"], title=text["error"], print_exception=False) from None
            except (OSError, UserError) as error:
                raise gradio.Error(html.escape(str(error)), title=text["error"], print_exception=False) from None
            names = "" if page.names_hidden else versus.names(begun)
            return None, "", f"{text['saved']} {names}", *ready(False)

        return vote

    private = {"api_visibility": "private", "show_progress": "hidden"}
    with blocks:
        outputs = [now, asked, *sides, result, start, *buttons]
        for event in (start.click, *([] if has_list else [asked.submit])):
            event(ask, [asked, rater], outputs, **private)
        for name, button in votes.items():
            button.click(voting(name), [now, reason, rater], [now, reason, result, *buttons], **private)
    return blocks
