"""Text of a row: what is empty, and where the thinking ends and the answer begins."""

import ast
import functools
import json
import re
import unicodedata

# Characters that show nothing: blanks, controls, marks of width and direction, fillers.
UNSEEN = (
    r"[\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]*"
)
NOTHING = re.compile(UNSEEN)
# Text that a chat template or a tokenizer would take for structure.
MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?(?:think|tool_call|tool_response)>")
TAG = re.compile(rf"[<＜]{UNSEEN}(?P<end>[/／]?){UNSEEN}(?:think|thinking|thought){UNSEEN}[>＞]", re.IGNORECASE)
# As HuatuoGPT-o1 and OpenThoughts write it.
HEADINGS = re.compile(
    r"\s*#+\s*(?:Thinking|思考|思考过程)\s*\n(.*?)\n\s*#+\s*(?:Final Response|最终回答|最终回复)\s*\n(.*)"
    r"|\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*",
    re.DOTALL | re.IGNORECASE,
)
# Characters of full width, and the blank that is as wide, as the narrow ones that they stand for.
NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
# What pandas and str() write for an empty cell, and what people write for no thinking.
EMPTY = {"none", "nan", "null", "<na>", "n/a"}
NO_THINKING = EMPTY | {"无", "没有", "-"}


def is_blank(value) -> bool:
    """Nothing: null, NaN, a text that shows nothing, an empty list or object."""
    if isinstance(value, str):
        return NOTHING.fullmatch(value) is not None
    return value is None or value != value or value in ([], {}, ())


@functools.lru_cache(maxsize=4096)
def normal(name: str) -> str:
    """A column's name without case, width, blanks and signs."""
    return re.sub(r"[\W_]+", "_", unicodedata.normalize("NFKC", name).casefold()).strip("_")


def as_text(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is not text but {type(value).__name__}")
    return value


def from_text(text: str, column: str):
    """A list of messages as JSON, or as Python writes it, which is what str() leaves in a table."""
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except Repeated:
        raise
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"`{column}` is not a list of messages") from None


class Repeated(ValueError):
    """A key stands twice in an object."""


def without_repeats(pairs: list[tuple]) -> dict:
    """An object's keys and values; a second value of a key would replace the first without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise Repeated(f"has the key `{twice}` twice")
    return content


def join_parts(content) -> tuple[object, str, set[str]]:
    """(text, thinking, keys that are not read) of a content that may be a list of parts."""
    if not isinstance(content, list):
        return content, "", set()
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in texts or not isinstance(part.get(kind), str):
            raise ValueError(f"has a content part of type {kind!r}; text can be trained on")
        texts[kind].append(part[kind])
    left = {f"content[].{key}" for part in content for key in part if key != "type" and key != part.get("type", "text")}
    return "".join(texts["text"]), "".join(texts["thinking"]), left


def as_thinking(value, key: str) -> str:
    """Thinking as text, or as OpenRouter's list of parts."""
    if key != "reasoning_details":
        if not isinstance(value, str):
            raise ValueError(f"the thinking is not text but {type(value).__name__}")
        return value
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"`{key}` is not a list of objects")
    texts = [part.get("text") or part.get("summary") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def keys_of_details(parts) -> set[str]:
    """What OpenRouter's parts hold besides the text: signatures, and thinking that is encrypted."""
    parts = [part for part in (parts if isinstance(parts, list) else [parts]) if isinstance(part, dict)]
    keys = {key for part in parts for key in part if key != "summary" or part.get("text")}
    return {f"reasoning_details[].{key}" for key in keys - {"type", "text"}}


def strip_tags(think: str) -> str:
    """Thinking without the tags around it."""
    tags = list(TAG.finditer(think))
    if tags and is_blank(think[: tags[0].start()]) and not tags[0]["end"]:
        think = think[tags.pop(0).end() :]
    tags = list(TAG.finditer(think))
    if tags and tags[-1]["end"] and is_blank(think[tags[-1].end() :]):
        think = think[: tags[-1].start()]
    return think


def split_thinking(content: str) -> tuple[str, str]:
    """(thinking, answer) of a reply that may begin with a block of thinking, opened or only closed."""
    tags = list(TAG.finditer(content))
    kinds = ["end" if tag["end"] else "begin" for tag in tags]
    if kinds == ["begin", "end"] and is_blank(content[: tags[0].start()]):
        return content[tags[0].end() : tags[1].start()], content[tags[1].end() :]
    if kinds == ["end"]:
        return content[: tags[0].start()], content[tags[0].end() :]
    if kinds == ["begin"]:
        raise ValueError(f"has {tags[0].group()} without its end")
    if kinds:
        raise ValueError(f"has the chat marker {tags[-1].group()} inside its text")
    if headings := HEADINGS.fullmatch(content):
        think, answer = (group for group in headings.groups() if group is not None)
        return think, answer
    return "", content
