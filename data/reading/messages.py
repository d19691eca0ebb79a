"""Messages of a dialogue, in the forms that people keep, and what makes one that can be trained on."""

from data.reading.texts import (
    EMPTY,
    MARKER,
    NO_THINKING,
    as_text,
    as_thinking,
    from_text,
    is_blank,
    join_parts,
    keys_of_details,
    split_thinking,
    strip_tags,
)

ROLES = {
    **dict.fromkeys(("user", "human", "patient", "用户", "患者", "病人"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "bot", "model", "doctor", "助手", "医生"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOLS = {"tool", "tools", "function", "function_call", "function_response", "observation", "tool_call", "tool_response"}
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "think", "reasoning_details")
LOSS_KEYS = ("loss", "weight", "train")  # of ms-swift, OpenAI and axolotl: whether a turn is trained


def user(content, name: str) -> dict:
    """A message as given; name: where its content stood, for a message about it."""
    return {"role": "user", "content": content, "name": name}


def assistant(content, name: str) -> dict:
    return {"role": "assistant", "content": content, "name": name}


def read_messages(value, column: str, unused: set[str]) -> list[dict]:
    """Of a list of messages or of pairs of question and answer, or of the text of one. Thinking may still stand in
    the content. unused: gets the keys that hold something and are in no message."""
    items = from_text(value, column) if isinstance(value, str) else value
    if isinstance(items, dict) and is_table(items):
        items = [dict(zip(items, parts, strict=True)) for parts in zip(*items.values(), strict=True)]
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"`{column}` is not a list of messages but {type(items).__name__}")
    messages = []
    for item in items:
        if isinstance(item, (list, tuple)) and len(item) == 2:
            messages += [user(item[0], column), assistant(item[1], column)]
        elif isinstance(item, dict) and item.keys() & {"role", "from"}:
            messages += read_message(item, column, unused)
        elif isinstance(item, dict) and sorted(ROLES.get(key, "") for key in item) == ["assistant", "user"]:
            by_role = {ROLES[key]: (key, content) for key, content in item.items()}
            messages += [user(*by_role["user"][::-1]), assistant(*by_role["assistant"][::-1])]
        elif isinstance(item, dict) and "question" in item:
            reply = "answer" if "answer" in item else "solution"
            messages += [user(item["question"], "question"), assistant(item.get(reply), reply)]
            unused |= {f"{column}[].{key}" for key in filled(item) if key not in ("question", reply)}
        else:
            raise ValueError(f"`{column}` is not a list of messages: it holds {type(item).__name__}")
    return messages


def is_table(item: dict) -> bool:
    """Columns of equal length, as datasets and parquet may keep a list of messages."""
    columns = list(item.values())
    return bool(columns) and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)


def filled(item: dict) -> dict:
    return {key: value for key, value in item.items() if not is_blank(value)}


def read_message(given: dict, column: str, unused: set[str]) -> list[dict]:
    """One message; none if it is a system message without text, as many files have it."""
    held = filled(given)
    role_key = "role" if "role" in held else "from"
    content_key = next((key for key in ("content", "value", "text") if key in held), "content")
    said = given.get(role_key)
    if (isinstance(said, str) and said in TOOLS) or held.keys() & {"tool_calls", "function_call", "tool_call_id"}:
        raise ValueError("has a tool call or a tool's answer, which cannot be trained here")
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise ValueError(f"has a message of role {said!r}; known are {', '.join(ROLES)}")
    content, inner, left = join_parts(given.get(content_key))
    if role == "system" and content_key not in held:
        return []
    message = {"role": role, "content": content, "name": f"{said} {content_key}"}
    read = {role_key, content_key}
    if role == "assistant":
        thoughts = {key: as_thinking(held[key], key) for key in THINKING_KEYS if key in held}
        left |= keys_of_details(held.get("reasoning_details"))
        think = next(filter(None, thoughts.values()), inner)
        if think:
            message["reasoning_content"] = think
        read |= {key for key, text in thoughts.items() if text.strip() == think.strip()}
    if inner and inner.strip() != message.get("reasoning_content", "").strip():
        left.add("content[].thinking")
    for key in LOSS_KEYS:
        if given.get(key) is None or (role != "assistant" and not given[key]):
            read.add(key)
        elif role == "assistant":
            read.add(key)
            if given[key] not in (0, 1):
                raise ValueError(f"`{key}` of a message is {given[key]!r}; true, false, 0 and 1 are understood")
            if not given[key]:
                message["loss"] = False
    unused |= {f"{column}[].{key}" for key in left | (held.keys() - read)}
    return [message]


def add_thinking(message: dict, think: str, column: str) -> None:
    """A row's column of thinking belongs to its last reply."""
    own = message.get("reasoning_content", "")
    if own and own.strip() != think.strip():
        raise ValueError(f"has one thinking in `{column}` and another one in its last message")
    message["reasoning_content"] = think


def clean(message: dict, notes: list[tuple[str, str]]) -> dict:
    """Thinking and content apart, without whitespace around them. notes: gets (what was odd, what was done).

    Raises ValueError with what is wrong.
    """
    name, think = message.get("name", "system prompt"), ""
    content = as_text("" if message["content"] is None else message["content"], name)
    if message["role"] == "assistant":
        think, content = split_thinking(content)
        if given := message.get("reasoning_content", ""):
            inline, think = think.strip(), strip_tags(given)
            if inline and inline != think.strip():
                raise ValueError(f"has one thinking in `{name}` and another one beside it")
        if think.strip().lower() in NO_THINKING:
            notes.append((f"its thinking is {think.strip()!r}", "taken as no thinking"))
            think = ""
    out = {"role": message["role"], "content": content.strip()}
    if think.strip():
        out["reasoning_content"] = think.strip()
    if not message.get("loss", True):
        out["loss"] = False
    if not out["content"]:
        raise ValueError(f"`{name}` is empty")
    if out["content"].lower() in EMPTY and message["role"] != "system":
        raise ValueError(f"`{name}` is {out['content']!r}, as pandas writes an empty cell")
    for text in (out["content"], out.get("reasoning_content", "")):
        if marker := MARKER.search(text):
            raise ValueError(f"has the chat marker {marker.group()} inside its text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half a character (a lone surrogate)") from None
    return out
