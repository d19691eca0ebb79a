"""A file of feedback, counted, and as preference pairs for other trainers: python -m tools.feedback FILE [--export trl]

A pair is a dialogue, the corrected reply (chosen) and the model's own (rejected): prompt, chosen, rejected for TRL's
DPOTrainer; messages and rejected_response for ms-swift. Thinking stands in its block before the answer.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from data.base.console import tool, warn
from data.base.errors import UserError
from data.base.files import write_lines
from data.reading.feedback import correction_of, is_feedback, newest, problem_of
from data.reading.read import read_file
from data.template import CLOSE, OPEN


def read_feedback(path: Path) -> list[dict]:
    """The newest line of each reply; lines that are none, or half one, are named and left out. Raises UserError if
    nothing is left."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    lines = []
    for location, row in read_file(path, path.name, "", []):
        problem = row if isinstance(row, str) else "is no line of feedback"
        problem = problem_of(row) if is_feedback(row) else problem
        if problem:
            warn(f"{location} {problem}: left out")
        else:
            lines.append((location, row))
    if not lines:
        raise UserError(f"{path} has no line of feedback: one has `verdict` (like, dislike, edit) and `messages`")
    return [row for _, row in newest(lines)]


def text_of(reply: dict) -> str:
    thinking = str(reply.get("reasoning_content") or "").strip()
    return (OPEN + thinking + CLOSE if thinking else "") + str(reply.get("content") or "").strip()


def pairs(lines: list[dict], form: str) -> list[dict]:
    """Of the lines with a correction that differs from the reply."""
    found = []
    for line in lines:
        correction, (*before, reply) = correction_of(line), line["messages"]
        if correction is None or text_of(correction) == text_of(reply):
            continue
        prompt = [{name: message.get(name) for name in ("role", "content")} for message in before]
        chosen, rejected = ({"role": "assistant", "content": text_of(reply)} for reply in (correction, reply))
        if form == "trl":
            found.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
        else:
            found.append({"messages": [*prompt, chosen], "rejected_response": rejected["content"]})
    return found


@tool("feedback")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what tools.chat --web --feedback has written")
    parser.add_argument("--export", choices=("trl", "swift"), help="write preference pairs")
    parser.add_argument("--out", type=Path, help="file for the pairs; default: FILE with .trl or .swift in its name")
    args = parser.parse_args()
    lines = read_feedback(args.file)
    counts = Counter("corrected" if correction_of(line) else line["verdict"] for line in lines)
    names = {
        "corrected": "corrected",
        "like": "liked",
        "dislike": "disliked without a correction",
        "edit": "empty correction",
        "withdrawn": "withdrawn",
    }
    print(
        f"{len(lines)} replies: " + ", ".join(f"{counts[kind]} {name}" for kind, name in names.items() if counts[kind])
    )
    if args.export:
        out = args.out or args.file.with_suffix(f".{args.export}.jsonl")
        if out.exists():
            raise UserError(f"{out} exists; name another file with --out")
        found = pairs(lines, args.export)
        if not found:
            raise UserError("no reply has a correction that differs from it, so there is no pair")
        write_lines(out, (json.dumps(pair, ensure_ascii=False) + "\n" for pair in found))
        print(f"{len(found)} pairs: {out}")


if __name__ == "__main__":
    main()
