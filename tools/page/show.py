"""What the page shows of a dialogue: texts as they are, the mark of what is generated, and lines above a reply."""

import html
import re

from tools.shared.safety import is_emergency, names_drug

NOTICE = "notice"  # the id of a bubble that is no reply


def plain_chatbot(gradio, **more):
    """A Chatbot that shows each text as it is. Markdown would take 3~5 for struck through and 2*3 for emphasis, and
    without Markdown the browser still takes `a <b and c>` for HTML: so it is sent escaped, and read back unescaped.
    Without a button to copy, which would copy what the browser was sent."""
    more = {"show_label": False, "buttons": [], "render_markdown": False, "render": False, **more}
    chatbot = gradio.Chatbot(**more)
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


def bubbles(gradio, name: str, known: dict, seconds: float, text: dict, done: bool) -> list:
    """Lines above the reply if the question may be an emergency, or the reply names a drug or a dose; the thinking in a
    block that folds once it is done; the answer with its mark."""
    if known.get("whole") or known["answer"].endswith(("。", "；", "！", "？", "\n", ".")):  # not at each token
        known["drug"] = names_drug(known["answer"])
    if "emergency" not in known:
        known["emergency"] = is_emergency(known["messages"][-1]["content"])
    kinds = [kind for kind in ("emergency", "drug") if known.get(kind)]
    shown = [gradio.ChatMessage(content=text[kind], metadata={"id": NOTICE}) for kind in kinds]
    if known["think"]:
        state = {"title": text["thought"], "status": "done", "duration": seconds}
        state = state if done else {"title": text["thinking"], "status": "pending"}
        shown.append(gradio.ChatMessage(content=known["think"], metadata=state))
    if known["answer"]:
        shown.append(gradio.ChatMessage(content=text["mark"] + known["answer"], metadata={"id": name}))
    return shown


def id_from(history: list[dict], index: int) -> str | None:
    """The id of the reply whose first bubble, perhaps its thinking, is at index; its answer carries the id."""
    for message in history[index:]:
        if message["role"] == "user":
            return None
        if (name := (message.get("metadata") or {}).get("id")) and name != NOTICE:
            return name
    return None


def spoken(history: list[dict], mark: str = "") -> list[dict]:
    """What the template wants of the history: texts of both sides, without the mark, the lines above a reply, and the
    thinking, which has a title.

    A browser sends content as blocks, a client as text. A question whose reply had no answer is left out.
    """
    messages = []
    for message in history:
        metadata = message.get("metadata") or {}
        if metadata.get("title") or metadata.get("id") == NOTICE:
            continue
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(block.get("text", "") for block in content if isinstance(block, dict))
        if messages and messages[-1]["role"] == message["role"] == "user":
            messages.pop()
        content = content.removeprefix(mark) if message["role"] == "assistant" else content
        messages.append({"role": message["role"], "content": content})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    return messages
