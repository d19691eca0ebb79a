"""The chat as a page in the browser, over the generator of the terminal: python -m tools.chat RUN_DIR/best --web"""

import html
import os
import threading
import time

from data.base.errors import UserError, cannot_import
from model.generate import ReplyError, ReplyStream, sampling_keywords
from tools.page.replies import Page, Panel, Replies
from tools.page.show import bubbles, plain_chatbot, spoken

CSS = """
footer { display: none !important }
#warning p { margin: 0; padding: 6px 10px; border-radius: 6px; background: #fff4d6; color: #5c4400 }
.dark #warning p { background: #3d3520; color: #f0e0b0 }
@media (max-width: 600px) { .gradio-container { padding: 6px !important } h3 { font-size: 1.05rem } }
"""
LOCAL = "127.0.0.1"


def import_gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise SystemExit(f"tools.chat: {cannot_import(error, 'gradio', 'web')}") from None
    return gradio


def serve(gradio, blocks, page: Page) -> None:
    """Until Ctrl+C: no share link, no analytics, no files but the feedback; for this machine alone unless --host says
    otherwise, and then with passwords."""
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), LOCAL, "localhost", page.host]))
    # Fonts of the system: the theme's own would come from the network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        blocks.launch(
            server_name=page.host,
            server_port=page.port,
            share=False,
            auth=list(page.passwords) or None,
            theme=theme,
            css=CSS,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise SystemExit(
            f"tools.chat: port {page.port} of {page.host} cannot be used ({error}); choose another with --port"
        ) from None
    more = f"  (from another machine: ssh -L {page.port}:{LOCAL}:{page.port} HOST)" if page.host == LOCAL else ""
    print(f"http://{page.host}:{page.port}{more}")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def head(gradio, page: Page, title: str) -> None:
    """The title, and what everybody should know."""
    kept = page.text["kept_all" if page.keep_all else "kept"].format(page.feedback.name) if page.feedback else ""
    gradio.HTML(f"<h3>{html.escape(title)}</h3>")
    gradio.HTML(f"<p>{html.escape(page.text['no_advice'] + kept)}</p>", elem_id="warning")


def rater_field(gradio, page: Page):
    """Who gives feedback; whoever has logged in is known by that name."""
    return gradio.Textbox(page.rater, label=page.text["rater"], visible=bool(page.feedback and not page.passwords))


def who(request, field: str, page: Page) -> tuple[str, str]:
    """(rater, session)"""
    rater = getattr(request, "username", None) or (field or "").strip() or page.rater
    return rater, getattr(request, "session_hash", None) or ""


def told(gradio, text: dict, act, missing: str):
    """What act() returns, or its error as a message. missing: the text for a LookupError."""
    try:
        return act()
    except LookupError:
        message = text[missing]
    except ValueError:
        message = text["empty"]
    except (OSError, UserError) as error:
        message = html.escape(str(error))
    raise gradio.Error(message, title=text["error"], print_exception=False)


def build(gradio, causal_lm, tokenizer, page: Page):
    text, replies = page.text, Replies(page)
    own = getattr(causal_lm.generation_config, "temperature", None) or 1.0
    temperature = page.settings.get("temperature", own) if page.settings.get("do_sample", True) else 0.0

    def reply(
        message: str, history: list[dict], thinking: bool, temperature: float, length: int, field: str,
        request: gradio.Request,
    ):  # fmt: skip
        settings = page.settings | {"max_new_tokens": int(length)} | sampling_keywords(temperature=temperature)
        dialogue = [{"role": "system", "content": page.system}] if page.system else []
        dialogue += [*spoken(history, text["mark"]), {"role": "user", "content": message}]
        rater, session = who(request, field, page)
        name = replies.begin(dialogue, {"thinking": thinking, **settings}, session)
        try:
            yield from stream_reply(gradio, causal_lm, tokenizer, replies, name, text)
        finally:  # one that was stopped, too
            if page.keep_all and replies.find(name) and not replies.known[name]["said"]:
                replies.rate(name, "shown", rater)

    with gradio.Blocks(title=f"{text['title']} · {page.model}", analytics_enabled=False) as blocks:
        head(gradio, page, f"{text['title']} · {page.model}")
        rater = rater_field(gradio, page)
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
                rater,
            ],
            additional_inputs_accordion=gradio.Accordion(text["settings"], open=False, render=False),
            examples=[[question] for question in text["questions"]],
            cache_examples=False,
            show_progress="hidden",
            api_visibility="private",
        )
        if page.feedback:
            add_feedback(gradio, chatbot, question, rater, Panel(replies), page)
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
    known["whole"] = True
    yield bubbles(gradio, name, known, seconds, text, done=True)  # the thinking may have ended without its mark
    if not stream.reply.stopped:
        gradio.Warning(text["cut"], title=text["info"])
    elif not known["answer"]:
        gradio.Warning(text["no_answer"] if known["think"] else text["no_reply"], title=text["info"])


def add_feedback(gradio, chatbot, question, rater, panel: Panel, page: Page) -> None:
    """Thumbs beside each reply, and a panel to correct the one that was rated, or else the last one, with the form. A
    new question, a repeated one, one taken back and a cleared dialogue empty and close it."""
    text, chosen = page.text, gradio.State(None)
    with gradio.Accordion(text["feedback"], open=False) as box:
        asked = gradio.Textbox(label=text["correcting"], interactive=False, max_lines=4)
        choices = [(text[name], name) for name in ("yes", "no", "cannot_say")]
        items = [gradio.Radio(choices, label=label) for label in page.form.values()]
        answer = gradio.Textbox(label=text["answer"], lines=4, max_lines=12)
        thought = gradio.Textbox(label=text["thought_kept"], lines=2, max_lines=8)
        reason = gradio.Textbox(label=text["reason"])
        save = gradio.Button(text["save_all"] if items else text["save"], variant="primary")
    fields = [chosen, asked, answer, thought, reason, *items]

    def done(act):
        found = told(gradio, text, act, "unknown")
        gradio.Info(text["saved"], title=text["info"])
        return found

    def rated(history: list[dict], field: str, event: gradio.LikeData, request: gradio.Request):
        by, _ = who(request, field, page)
        held, verdict = done(lambda: panel.rate(history, event.index, event.liked, by))
        return (*held, gradio.Accordion(open=verdict == "dislike" or bool(items)))

    def opened(history: list[dict], field: str, name: str | None, request: gradio.Request):
        by, _ = who(request, field, page)
        return panel.open(history, name, by) or tuple(gradio.skip() for _ in fields)

    def saved(request: gradio.Request, history, field: str, name: str | None, answer: str, thought, reason, *form):
        by, _ = who(request, field, page)
        held = done(lambda: panel.save(history, name, answer, thought, reason, *form, rater=by))
        return (*held, gradio.Accordion(open=False))

    def emptied():
        return (*panel.empty, gradio.Accordion(open=False))

    private = {"api_visibility": "private", "show_progress": "hidden"}
    chatbot.like(rated, [chatbot, rater], [*fields, box], **private)
    box.expand(opened, [chatbot, rater, chosen], fields, **private)
    save.click(saved, [chatbot, rater, chosen, answer, thought, reason, *items], [*fields, box], **private)
    for event in (question.submit, chatbot.clear, chatbot.undo, chatbot.retry, chatbot.edit, chatbot.example_select):
        event(emptied, None, [*fields, box], **private)
