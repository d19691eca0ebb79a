"""A file of feedback, counted, and as preference pairs for other trainers: python -m tools.feedback FILE [--export trl]

A pair is a dialogue, the corrected reply (chosen) and the model's own (rejected): prompt, chosen, rejected for TRL's
DPOTrainer; messages and rejected_response for ms-swift. Thinking stands in its block before the answer.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from data.errors import UserError
from data.feedback import correction_of, is_feedback, newest
from data.read import read_file
from data.template import CLOSE, OPEN
from loop.console import run_tool
from loop.files import write_lines


def read_feedback(path: Path) -> list[dict]:
    """The newest line of each reply. Raises UserError if there is none, or if a line is no feedback."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    lines = list(read_file(path, path.name, "", []))
    for location, row in lines:
        if not is_feedback(row):
            raise UserError(f"{location} is no feedback: a line has `verdict` (like, dislike, edit) and `messages`")
    if not lines:
        raise UserError(f"{path} is empty")
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


def run() -> None:
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


def main() -> None:
    run_tool("feedback", run)


if __name__ == "__main__":
    main()
