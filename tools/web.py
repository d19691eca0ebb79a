"""The chat as a page in the browser, over the generator of the terminal: python -m tools.chat RUN_DIR/best --web"""

import os
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import yaml

from data.errors import UserError, cannot_import
from data.feedback import append_feedback
from model.generate import ReplyError, ReplyStream, sampling_keywords

TEXTS = yaml.safe_load(Path(__file__).with_name("page.yaml").read_text(encoding="utf-8"))
CSS = """
footer { display: none !important }
#warning p { margin: 0; padding: 6px 10px; border-radius: 6px; background: #fff4d6; color: #5c4400 }
.dark #warning p { background: #3d3520; color: #f0e0b0 }
@media (max-width: 600px) { .gradio-container { padding: 6px !important } h3 { font-size: 1.05rem } }
"""


class Page(NamedTuple):
    """What the page shows and where it writes."""

    model: str  # its name
    language: str
    system: str  # system prompt
    thinking: bool
    settings: dict  # keywords of ReplyStream
    port: int
    feedback: Path | None = None
    sha256: str = ""  # of the weights


class Replies:
    """The replies of this page by id, so that a rating means the reply it was given for, whatever has been undone or
    asked again since."""

    def __init__(self, page: Page):
        self.page, self.known = page, {}

    def begin(self, dialogue: list[dict], settings: dict) -> str:
        name = uuid.uuid4().hex[:16]
        self.known[name] = {"messages": dialogue, "settings": settings, "think": "", "answer": ""}
        return name

    def find(self, name: str | None) -> dict | None:
        """The reply, if it has an answer."""
        reply = self.known.get(name)
        return reply if reply and reply["answer"] else None

    def rate(self, name: str, verdict: str, reason: str = "", correction: dict | None = None) -> None:
        """Raises OSError if the line cannot be written."""
        reply = self.known[name]
        said = {"role": "assistant", "content": reply["answer"]}
        if reply["think"]:
            said["reasoning_content"] = reply["think"]
        line = {
            "id": name,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": self.page.model,
            "model_sha256": self.page.sha256,
            "settings": reply["settings"],
            "messages": [*reply["messages"], said],
            "verdict": verdict,
        }
        # A thumb after a correction does not take it back.
        reply["correction"] = correction or reply.get("correction")
        line |= {"correction": reply["correction"]} if reply["correction"] else {}
        line |= {"reason": reason.strip()} if reason.strip() else {}
        append_feedback(self.page.feedback, line)


def serve(causal_lm, tokenizer, page: Page) -> None:
    """Until Ctrl+C, for this machine alone: 127.0.0.1, no share link, no analytics, no files but the feedback."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    try:
        import gradio
    except ImportError as error:
        raise SystemExit(f"tools.chat: {cannot_import(error, 'gradio', 'web')}") from None
    # Fonts of the system: the theme's own would come from the network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks = build(gradio, causal_lm, tokenizer, page)
    try:
        blocks.launch(
            server_name="127.0.0.1",
            server_port=page.port,
            share=False,
            theme=theme,
            css=CSS,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise SystemExit(f"tools.chat: port {page.port} cannot be used ({error}); choose another with --port") from None
    print(f"http://127.0.0.1:{page.port}  (from another machine: ssh -L {page.port}:127.0.0.1:{page.port} HOST)")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def build(gradio, causal_lm, tokenizer, page: Page):
    text, replies = TEXTS[page.language], Replies(page)
    own = getattr(causal_lm.generation_config, "temperature", None) or 1.0
    temperature = page.settings.get("temperature", own) if page.settings.get("do_sample", True) else 0.0

    def reply(message: str, history: list[dict], thinking: bool, temperature: float, length: int):
        settings = page.settings | {"max_new_tokens": int(length)} | sampling_keywords(temperature=temperature)
        dialogue = [{"role": "system", "content": page.system}] if page.system else []
        dialogue += [*spoken(history), {"role": "user", "content": message}]
        name = replies.begin(dialogue, {"thinking": thinking, **settings})
        yield from stream_reply(gradio, causal_lm, tokenizer, replies, name, text)

    with gradio.Blocks(title=f"{text['title']} · {page.model}", analytics_enabled=False) as blocks:
        kept = text["kept"].format(page.feedback.name) if page.feedback else ""
        gradio.Markdown(f"### {text['title']} · {page.model}")
        gradio.Markdown(f"{text['no_advice']}{kept}", elem_id="warning")
        chatbot = gradio.Chatbot(
            show_label=False, height="58vh", buttons=["copy", "copy_all"], placeholder=text["title"], render=False
        )
        gradio.ChatInterface(
            reply,
            chatbot=chatbot,
            textbox=gradio.Textbox(
                placeholder=text["ask"],
                show_label=False,
                container=False,
                autofocus=True,
                submit_btn=text["send"],
                stop_btn=text["stop"],
                render=False,
            ),
            additional_inputs=[
                gradio.Checkbox(page.thinking, label=text["think"], render=False),
                gradio.Slider(0, 2, temperature, step=0.05, label=text["temperature"], render=False),
                gradio.Slider(64, 8192, page.settings["max_new_tokens"], step=64, label=text["length"], render=False),
            ],
            additional_inputs_accordion=gradio.Accordion(text["settings"], open=False, render=False),
            examples=[[question] for question in text["questions"]],
            cache_examples=False,
            show_progress="hidden",
            api_visibility="private",
        )
        if page.feedback:
            add_feedback(gradio, chatbot, replies, text)
    return blocks


def stream_reply(gradio, causal_lm, tokenizer, replies: Replies, name: str, text: dict):
    """The bubbles of a reply as it comes; what has come of it stands in `replies`."""
    known, started, seconds = replies.known[name], time.perf_counter(), 0.0
    settings = dict(known["settings"])
    try:
        stream = ReplyStream(causal_lm, tokenizer, known["messages"], settings.pop("thinking"), **settings)
        for part, piece in stream:
            known[part] += piece
            if part == "think":
                seconds = time.perf_counter() - started
            yield bubbles(gradio, name, known, seconds, text, done=part == "answer")
    except ReplyError as error:
        raise gradio.Error(f"{text['full']} ({error})", title=text["error"]) from None
    if not stream.reply.stopped:
        yield bubbles(gradio, name, known, seconds, text, done=True)
        gradio.Warning(text["cut"], title=text["info"])
    if not known["think"] and not known["answer"]:
        raise gradio.Error(text["no_reply"], title=text["error"])


def add_feedback(gradio, chatbot, replies: Replies, text: dict) -> None:
    """Thumbs beside each reply, and a panel to correct the one that was rated, or else the last one."""
    chosen = gradio.State(None)
    with gradio.Accordion(text["feedback"], open=False) as panel:
        answer = gradio.Textbox(label=text["answer"], lines=4, max_lines=12)
        thought = gradio.Textbox(label=text["thought_kept"], lines=2, max_lines=8)
        reason = gradio.Textbox(label=text["reason"])
        save = gradio.Button(text["save"], variant="primary")

    def fill(name: str | None) -> tuple:
        reply = replies.find(name) or {"answer": "", "think": ""}
        return name, reply["answer"], reply["think"]

    def rated(history: list[dict], event: gradio.LikeData):
        name = id_from(history, event.index)
        if replies.find(name) is None:
            raise gradio.Error(text["unknown"], title=text["error"])
        # Taking a thumb back sends an empty text.
        verdict = {True: "like", False: "dislike"}.get(event.liked, "withdrawn")
        write(gradio, lambda: replies.rate(name, verdict), text)
        return (*fill(name), gradio.Accordion(open=verdict == "dislike"))

    def last(history: list[dict], name: str | None) -> tuple:
        if replies.find(name):  # opened by a thumb, or again: what is being written stays
            return tuple(gradio.skip() for _ in range(3))
        names = [id_from(history, index) for index in range(len(history))]
        return fill(next((name for name in reversed(names) if replies.find(name)), None))

    def corrected(name: str | None, answer: str, thought: str, reason: str) -> tuple:
        if replies.find(name) is None:
            raise gradio.Error(text["unknown"], title=text["error"])
        if not answer.strip():
            raise gradio.Error(text["empty"], title=text["error"])
        correction = {"content": answer.strip()} | ({"reasoning_content": thought.strip()} if thought.strip() else {})
        write(gradio, lambda: replies.rate(name, "edit", reason, correction), text)
        return (*fill(None), "", gradio.Accordion(open=False))

    private = {"api_visibility": "private", "show_progress": "hidden"}
    chatbot.like(rated, chatbot, [chosen, answer, thought, panel], **private)
    panel.expand(last, [chatbot, chosen], [chosen, answer, thought], **private)
    save.click(corrected, [chosen, answer, thought, reason], [chosen, answer, thought, reason, panel], **private)


def write(gradio, rate, text: dict) -> None:
    try:
        rate()
    except (OSError, UserError) as error:
        raise gradio.Error(str(error), title=text["error"]) from None
    gradio.Info(text["saved"], title=text["info"])


def id_from(history: list[dict], index: int) -> str | None:
    """The id of the reply whose first bubble, perhaps its thinking, is at index; its answer carries the id."""
    for message in history[index:]:
        if message["role"] == "user":
            return None
        if name := (message.get("metadata") or {}).get("id"):
            return name
    return None


def bubbles(gradio, name: str, known: dict, seconds: float, text: dict, done: bool) -> list:
    """The thinking in a block that folds once it is done, then the answer."""
    shown = []
    if known["think"]:
        state = {"title": text["thought"], "status": "done", "duration": seconds}
        state = state if done else {"title": text["thinking"], "status": "pending"}
        shown.append(gradio.ChatMessage(content=known["think"], metadata=state))
    if known["answer"]:
        shown.append(gradio.ChatMessage(content=known["answer"], metadata={"id": name}))
    return shown


def spoken(history: list[dict]) -> list[dict]:
    """What the template wants of the history: texts of both sides, without the thinking, which has a title.

    A browser sends content as blocks, a client as text. A question whose reply had no answer is left out.
    """
    messages = []
    for message in history:
        if (message.get("metadata") or {}).get("title"):
            continue
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(block.get("text", "") for block in content if isinstance(block, dict))
        if messages and messages[-1]["role"] == message["role"] == "user":
            messages.pop()
        messages.append({"role": message["role"], "content": content})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    return messages
