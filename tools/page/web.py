"""The chat as a page in the browser, over the generator of the terminal: python -m tools.chat RUN_DIR/best --web"""

import html
import os
import re
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from data.base.errors import UserError, cannot_import
from data.reading.feedback import append_feedback
from model.generate import ReplyError, ReplyStream, sampling_keywords

CSS = """
footer { display: none !important }
#warning p { margin: 0; padding: 6px 10px; border-radius: 6px; background: #fff4d6; color: #5c4400 }
.dark #warning p { background: #3d3520; color: #f0e0b0 }
@media (max-width: 600px) { .gradio-container { padding: 6px !important } h3 { font-size: 1.05rem } }
"""


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


def plain_chatbot(gradio, **more):
    """A Chatbot that shows each text as it is. Markdown would take 3~5 for struck through and 2*3 for emphasis, and
    without Markdown the browser still takes `a <b and c>` for HTML: so it is sent escaped, and read back unescaped.
    Without a button to copy, which would copy what the browser was sent."""
    chatbot = gradio.Chatbot(show_label=False, buttons=[], render_markdown=False, render=False, **more)
    to_browser, from_browser = chatbot.postprocess, chatbot.preprocess
    chatbot.postprocess = lambda value: to_browser([each_text(message, escaped) for message in value or ()])
    chatbot.preprocess = lambda payload: [each_text(message, html.unescape) for message in from_browser(payload) or ()]
    return chatbot


def escaped(text: str) -> str:
    """As HTML; tabs, and blanks at the beginning of a line, too, which gradio takes out of every text."""
    blanks = re.compile("^ +|\t", re.MULTILINE)
    return blanks.sub(lambda m: "".join(f"&#{ord(c)};" for c in m.group()), html.escape(text, quote=False))


def each_text(message, change):
    """A copy of a message, as a dictionary or gradio's own, with its texts changed."""
    message = message if isinstance(message, dict) else {"role": message.role, "content": message.content,
                                                         "metadata": message.metadata}  # fmt: skip
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    return {**message, "content": [{**block, "text": change(block["text"])} if "text" in block else block
                                   for block in content]}  # fmt: skip


def build(gradio, causal_lm, tokenizer, page: Page):
    text, replies = page.text, Replies(page)
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
        gradio.HTML(f"<h3>{html.escape(text['title'] + ' · ' + page.model)}</h3>")
        gradio.HTML(f"<p>{html.escape(text['no_advice'] + kept)}</p>", elem_id="warning")
        chatbot = plain_chatbot(gradio, height="58vh", placeholder=text["title"])
        question = gradio.Textbox(
            placeholder=text["ask"],
            show_label=False,
            container=False,
            autofocus=True,
            submit_btn=text["send"],
            stop_btn=text["stop"],
            render=False,
        )
        gradio.ChatInterface(
            reply,
            chatbot=chatbot,
            textbox=question,
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
            add_feedback(gradio, chatbot, question, Panel(replies), text)
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
        raise gradio.Error(
            html.escape(f"{text[error.kind]} ({error})"), title=text["error"], print_exception=False
        ) from None
    yield bubbles(gradio, name, known, seconds, text, done=True)  # the thinking may have ended without its mark
    if not stream.reply.stopped:
        gradio.Warning(text["cut"], title=text["info"])
    elif not known["answer"]:
        gradio.Warning(text["no_answer"] if known["think"] else text["no_reply"], title=text["info"])


class Panel:
    """The panel of corrections: it holds the id of one reply, its question, answer and thinking, and a reason. What is
    saved is always said of the reply whose question the panel shows."""

    EMPTY = (None, "", "", "", "")

    def __init__(self, replies: Replies):
        self.replies = replies

    def fill(self, name: str | None) -> tuple:
        reply = self.replies.find(name)
        return (name, reply["messages"][-1]["content"], reply["answer"], reply["think"], "") if reply else self.EMPTY

    def rate(self, history: list[dict], index: int, liked) -> tuple[tuple, str]:
        """(what the panel holds, verdict). Raises LookupError if the bubble is of no reply."""
        name = id_from(history, index)
        if self.replies.find(name) is None:
            raise LookupError
        verdict = {True: "like", False: "dislike"}.get(liked, "withdrawn")  # taking a thumb back sends an empty text
        self.replies.rate(name, verdict)
        return self.fill(name), verdict

    def open(self, history: list[dict], name: str | None) -> tuple | None:
        """The last reply of the dialogue; None if the panel holds one already, which may be in the writing."""
        names = [id_from(history, index) for index in range(len(history))]
        if name in names and self.replies.find(name):
            return None
        return self.fill(next((name for name in reversed(names) if self.replies.find(name)), None))

    def correct(self, history: list[dict], name: str | None, answer: str, thought: str, reason: str) -> tuple:
        """Raises LookupError if the reply is not in the dialogue any more, ValueError if the answer is empty."""
        if self.replies.find(name) is None or name not in [id_from(history, index) for index in range(len(history))]:
            raise LookupError
        if not answer.strip():
            raise ValueError
        correction = {"content": answer.strip()} | ({"reasoning_content": thought.strip()} if thought.strip() else {})
        self.replies.rate(name, "edit", reason, correction)
        return self.EMPTY


def add_feedback(gradio, chatbot, question, panel: Panel, text: dict) -> None:
    """Thumbs beside each reply, and a panel to correct the one that was rated, or else the last one. A new question, a
    repeated one, one taken back and a cleared dialogue empty and close it."""
    chosen = gradio.State(None)
    with gradio.Accordion(text["feedback"], open=False) as box:
        asked = gradio.Textbox(label=text["correcting"], interactive=False, max_lines=4)
        answer = gradio.Textbox(label=text["answer"], lines=4, max_lines=12)
        thought = gradio.Textbox(label=text["thought_kept"], lines=2, max_lines=8)
        reason = gradio.Textbox(label=text["reason"])
        save = gradio.Button(text["save"], variant="primary")
    fields = [chosen, asked, answer, thought, reason]

    def told(act):
        """What act() returns, or its error as a message."""
        try:
            done = act()
        except LookupError:
            raise gradio.Error(text["unknown"], title=text["error"], print_exception=False) from None
        except ValueError:
            raise gradio.Error(text["empty"], title=text["error"], print_exception=False) from None
        except (OSError, UserError) as error:
            raise gradio.Error(html.escape(str(error)), title=text["error"], print_exception=False) from None
        gradio.Info(text["saved"], title=text["info"])
        return done

    def rated(history: list[dict], event: gradio.LikeData):
        held, verdict = told(lambda: panel.rate(history, event.index, event.liked))
        return (*held, gradio.Accordion(open=verdict == "dislike"))

    def opened(history: list[dict], name: str | None):
        return panel.open(history, name) or tuple(gradio.skip() for _ in fields)

    def corrected(history: list[dict], name: str | None, answer: str, thought: str, reason: str):
        return (*told(lambda: panel.correct(history, name, answer, thought, reason)), gradio.Accordion(open=False))

    def emptied():
        return (*panel.EMPTY, gradio.Accordion(open=False))

    private = {"api_visibility": "private", "show_progress": "hidden"}
    chatbot.like(rated, chatbot, [*fields, box], **private)
    box.expand(opened, [chatbot, chosen], fields, **private)
    save.click(corrected, [chatbot, chosen, answer, thought, reason], [*fields, box], **private)
    for event in (question.submit, chatbot.clear, chatbot.undo, chatbot.retry, chatbot.edit, chatbot.example_select):
        event(emptied, None, [*fields, box], **private)


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
