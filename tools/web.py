"""The chat as a page in the browser, over the generator of the terminal: python -m tools.chat RUN_DIR/best --web"""

import os
import time

from data.errors import cannot_import
from model.generate import ReplyError, ReplyStream

EXAMPLES = [
    "最近总是头晕，尤其是站起来的时候，要紧吗？",
    "孩子发烧三十九度，需要马上去医院吗？",
    "空腹血糖七点二，是糖尿病吗？",
]
NO_ADVICE = "模型可能出错，回答不构成医疗建议。Answers may be wrong and are no medical advice."


def serve(causal_lm, tokenizer, system: str, thinking: bool, settings: dict, port: int) -> None:
    """Until Ctrl+C, for this machine alone: 127.0.0.1, no share link, no analytics, no files."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    try:
        import gradio
    except ImportError as error:
        raise SystemExit(f"tools.chat: {cannot_import(error, 'gradio', 'web')}") from None

    def reply(message: str, history: list[dict]):
        dialogue = [{"role": "system", "content": system}] if system else []
        dialogue += [*spoken(history), {"role": "user", "content": message}]
        started, seconds, texts = time.perf_counter(), 0.0, {"think": "", "answer": ""}
        try:
            stream = ReplyStream(causal_lm, tokenizer, dialogue, thinking, **settings)
            for part, text in stream:
                texts[part] += text
                if part == "think":
                    seconds = time.perf_counter() - started
                yield bubbles(gradio, texts, seconds, done=part == "answer")
        except ReplyError as error:
            raise gradio.Error(f"{error}; 请新建对话 / begin a new one") from None
        if not stream.reply.stopped:
            yield bubbles(gradio, texts, seconds, done=True)
            gradio.Warning("回复被截断 / cut off: --max-new-tokens")
        if not any(texts.values()):
            raise gradio.Error("空回复 / the reply is empty")

    page = gradio.ChatInterface(
        reply,
        chatbot=gradio.Chatbot(show_label=False, height="70vh", buttons=["copy", "copy_all"]),
        title="Qwen3 医学问答",
        description=NO_ADVICE,
        examples=EXAMPLES,
        cache_examples=False,
        api_visibility="private",
    )
    # Fonts of the system: the theme's own would come from the network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, theme=theme, footer_links=[])
    except OSError as error:
        raise SystemExit(f"tools.chat: port {port} cannot be used ({error}); choose another with --port") from None


def bubbles(gradio, texts: dict[str, str], seconds: float, done: bool) -> list:
    """The thinking in a block that folds once it is done, then the answer."""
    shown = []
    if texts["think"]:
        state = (
            {"title": "思考", "status": "done", "duration": seconds}
            if done
            else {"title": "思考中", "status": "pending"}
        )
        shown.append(gradio.ChatMessage(content=texts["think"], metadata=state))
    if texts["answer"]:
        shown.append(gradio.ChatMessage(content=texts["answer"]))
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
