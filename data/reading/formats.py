"""Columns of a row -> one dialogue: the names that people give to a question, its thinking and its answer."""

import functools
from typing import NamedTuple

from data.reading.choices import choices_of
from data.reading.messages import add_thinking, assistant, clean, filled, read_messages, user
from data.reading.texts import EMPTY, as_text, from_text, normal

# What a column can be -> its names, in lower case, the most specific first; those in one set mean the same.
COLUMNS = {
    "dialogue": [{"messages"}, {"conversations", "conversation", "dialogue", "dialog", "qa_pairs", "对话"}],
    "system": [{"system", "system_prompt", "系统提示", "系统提示词"}],
    "history": [{"history", "历史", "历史对话"}],
    "context": [{"context", "passage", "description", "病情描述"}],
    "question": [{"question", "query", "problem", "ask", "问题", "提问"}, {"prompt"}, {"instruction"}, {"input"}],
    "options": [{"option", "options", "选项"}],
    "think": [
        {"think", "thinking", "thought", "reasoning", "reasoning_content", "reasoning_reasoning_content", "complex_cot",
         "cot", "chain_of_thought", "思考", "思考过程", "思路", "推理", "推理过程"},
        {"explanation", "rationale", "解析"},
    ],
    "answer": [
        {"answer", "response", "response_content", "reply", "答案", "回答", "回复"},
        {"output", "completion"},
        {"content", "solution", "target"},
    ],
    # Of replies that are compared, see data/reading/preference.py.
    "chosen": [{"chosen", "chosen_response", "response_chosen", "chosen_messages", "preferred", "preferred_output",
                "accepted", "pos_resp", "优选", "优选回答", "好回答"}],
    "rejected": [{"rejected", "reject", "rejected_response", "response_rejected", "rejected_messages",
                  "non_preferred_output", "dispreferred", "neg_resp", "劣选", "较差回答", "差回答"}],
    "label": [{"label", "kto_tag", "标签", "评价"}],
}  # fmt: skip
NAMES = set().union(*(names for ranks in COLUMNS.values() for names in ranks))
Given = tuple[tuple[str, str], ...]  # (what it is, column), of --columns


class Ambiguous(ValueError):
    """Two columns of a row could be the same thing, and hold different text."""


class Dialogue(NamedTuple):
    """messages alternate user and assistant after an optional system message; an assistant message has `content`, if
    it thinks `reasoning_content`, and if it is not to be trained `loss`: False. No text has whitespace around it."""

    messages: list[dict]
    used: dict[str, str]  # column -> what it became
    unused: list[str]  # columns and message keys that hold something and are in no message
    notes: list[tuple[str, str]]  # (what was odd, what was done)


def read_row(columns: dict, system_prompt: str = "", given: Given = ()) -> Dialogue:
    """The dialogue of a row; system_prompt: of a row without one of its own.

    Raises ValueError with the reason if the row cannot be trained on; Ambiguous if --columns must decide.
    """
    if not isinstance(columns, dict):
        raise ValueError(f"is not an object but {type(columns).__name__}" if not isinstance(columns, str) else columns)
    row, unused = Columns(columns, given), set()
    notes = row.notes
    dialogue = row.take("dialogue")
    if dialogue is not None:
        messages = read_messages(dialogue, row.column("dialogue"), unused)
    else:
        history = read_messages(row.take("history") or [], row.column("history"), unused)
        asked = read_asked(row, system_prompt, unused)
        begin = 1 if asked and asked[0]["role"] == "system" else 0
        messages = [*asked[:begin], *history, *asked[begin:], *read_answer(row, unused)]
    if len(messages) > 2 and messages[-1]["role"] == "user":
        messages.pop()
        notes.append(("ends with a user turn", "turn cut"))
    own = row.text("system")
    if messages and messages[0]["role"] != "system":
        if own or system_prompt:
            messages.insert(0, {"role": "system", "content": own or system_prompt})
    elif own and own.strip() != str(messages[0]["content"]).strip():  # the dialogue has a system message of its own
        del row.used[row.column("system")]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"roles must be user, assistant in turn (after an optional system), not {turns}")
    if context := row.text("context"):
        first = messages[len(roles) - len(turns)]
        first["content"] = f"{context.strip()}\n\n{as_text(first['content'], first['name']).strip()}"
    if think := row.text("think"):
        add_thinking(messages[-1], think, row.column("think"))
    messages = [clean(message, notes) for message in messages]
    if not any(message.get("loss", True) for message in messages if message["role"] == "assistant"):
        raise ValueError("has no turn to train: `loss` is false in all of them")
    unused = [*(name for name in row.filled if name not in row.used), *sorted(unused)]
    return Dialogue(messages, row.used, unused, notes)


class Columns:
    """The columns of one row, and what became of them."""

    def __init__(self, columns: dict, given: Given):
        self.all = columns
        self.filled = filled(columns)
        self.notes: list[tuple[str, str]] = []
        for name in [name for name, value in self.filled.items() if is_empty_cell(name, value)]:
            cell = f"`{name}` is {self.filled.pop(name)!r}, as pandas writes an empty cell"
            self.notes.append((cell, "taken as empty"))
        self.candidates = candidates(tuple(self.filled), given)
        self.used: dict[str, str] = {}

    def take(self, role: str):
        """The value of the most specific column that can be role; None without one."""
        for names in self.candidates[role]:
            if names:
                value = self.filled[names[0]]
                if any(self.filled[name] != value for name in names[1:]):
                    both = " and ".join(f"`{name}`" for name in names)
                    raise Ambiguous(f"{both} can both be the {role}; say which it is: --columns '{role}={names[0]}'")
                self.used |= dict.fromkeys(names, role)
                return value
        return None

    def text(self, role: str) -> str:
        value = self.take(role)
        return "" if value is None else as_text(value, self.column(role))

    def column(self, role: str) -> str:
        """The column that became role."""
        return next((name for name, became in self.used.items() if became == role), role)

    def missing(self, role: str) -> ValueError:
        known = set().union(*COLUMNS[role])
        empty = next((name for name in self.all if normal(name) in known), None)
        cell = next((what for what, _ in self.notes if what.startswith(f"`{empty}` is ")), f"`{empty}` is empty")
        return ValueError(cell if empty else f"has no {role}")


@functools.lru_cache(maxsize=4096)
def candidates(names: tuple[str, ...], given: Given) -> dict[str, list[list[str]]]:
    """What it is -> the names that can be it, by rank; given ones come first and can be nothing else."""
    said = {normal(column): role for role, column in given}
    free = {name: normal(name) for name in names if normal(name) not in said}
    return {
        role: [
            [name for name in names if said.get(normal(name)) == role],
            *([name for name, plain in free.items() if plain in rank] for rank in ranks),
        ]
        for role, ranks in COLUMNS.items()
    }


def read_asked(row: Columns, system_prompt: str, unused: set[str]) -> list[dict]:
    question = row.take("question")
    name = row.column("question")
    if question is None:
        raise row.missing("question")
    if is_dialogue(question):
        return read_messages(question, name, unused)
    messages = []
    free = [name for names in row.candidates["question"] for name in names]
    more = next((other for other in free if normal(other) == "input"), None)
    if normal(name) == "instruction" and more is not None:  # as in Alpaca
        row.used[more] = "question"
        instruction, question = as_text(question, name), as_text(row.filled[more], more)
        if instruction.strip() == system_prompt.strip():  # the *_format.jsonl of a run
            row.used[name] = "system"
            messages = [{"role": "system", "content": instruction}]
        else:
            question = f"{instruction}\n{question}"
    options = row.take("options")
    if options is not None:
        question = f"{as_text(question, name)}\n{as_options(options)}"
    return [*messages, user(question, name)]


def read_answer(row: Columns, unused: set[str]) -> list[dict]:
    answer = row.take("answer")
    name = row.column("answer")
    if answer is None:
        if any(row.candidates["rejected"]) or isinstance(row.all.get("replies"), list):
            raise ValueError("compares replies, which recipes/dpo.py and recipes/kto.py take")
        raise row.missing("answer")
    return read_messages(answer, name, unused) if is_dialogue(answer) else [assistant(answer, name)]


def as_columns(row):
    """Wraps a bare list of messages as {"messages": [...]}."""
    is_dialogue = isinstance(row, list) and row and all(isinstance(item, dict) for item in row)
    return {"messages": row} if is_dialogue else row


def is_dialogue(value) -> bool:
    """Messages, or their text, where a text could stand, as in TRL's prompt and completion."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = from_text(value.strip(), "")
        except ValueError:
            return False
        return bool(value) and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value)
    return isinstance(value, list)


def is_empty_cell(name: str, value) -> bool:
    """Whether a column that is no thinking holds what pandas writes for an empty cell."""
    return (
        isinstance(value, str)
        and value.strip().lower() in EMPTY
        and normal(name) in NAMES
        and not any(normal(name) in rank for rank in COLUMNS["think"])
    )


def as_options(value) -> str:
    """A. ..., B. ... of a question with choices: a text as it is, or what `choices_of` knows."""
    if isinstance(value, str) and value.lstrip()[:1] not in ("{", "["):
        return value
    choices = choices_of(value)
    if not choices:
        raise ValueError("`options` holds no choices that can be read")
    return "\n".join(f"{label}. {text}" for label, text in choices.items())
