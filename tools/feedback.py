"""A file of feedback: counted, looked through, exported, trained on, or taken back.

    python -m tools.feedback FILE                        what is in it: verdicts, win rates, forms
    python -m tools.feedback FILE --train RUN_DIR [--go] what to train next, and why; --go does it
    python -m tools.feedback FILE --export trl           preference pairs for other trainers (or swift)
    python -m tools.feedback FILE --replace OUT          a copy without what tells who somebody is
    python -m tools.feedback FILE --rater NAME [--copy OUT | --delete]     what one person said

A pair is a prompt, a better and a worse reply: a correction and the model's own, or the two of a vote. Thinking stands
in its block before the answer.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

from filelock import FileLock

from data.base.console import tool, warn
from data.base.errors import UserError
from data.base.files import write_lines
from data.reading.feedback import (
    FEEDBACK_ID,
    agreed,
    correction_of,
    is_cast,
    is_feedback,
    is_vote,
    newest,
    problem_of,
    rated_replies,
)
from data.reading.read import decode, read_file
from data.template import CLOSE, OPEN
from loop.record.run_folder import read_run
from tools.shared.safety import personal
from tools.shared.votes import say_forms, say_votes

ROOT = Path(__file__).parent.parent
NAMES = {
    "corrected": "corrected", "like": "liked", "dislike": "disliked without a correction", "edit": "empty correction",
    "vote": "votes", "shown": "without a verdict", "withdrawn": "withdrawn",
}  # fmt: skip
# So many were enough where it was measured: benchmarks/RESULTS.md, "Do thumbs help?".
ENOUGH_PAIRS, ENOUGH_THUMBS = 40, 400


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
    """In the form of TRL or ms-swift, with the mark of what is generated."""
    found = []
    for line in lines:
        rated = sorted(rated_replies(line, "pairs"), key=lambda one: not one[1])
        if [is_good for _, is_good in rated] != [True, False]:
            continue
        before = line["messages"] if is_vote(line) else line["messages"][:-1]
        prompt = [{name: message.get(name) for name in ("role", "content")} for message in before]
        chosen, rejected = ({"role": "assistant", "content": text_of(reply)} for reply, _ in rated)
        if form == "trl":
            pair = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
        else:
            pair = {"messages": [*prompt, chosen], "rejected_response": rejected["content"]}
        found.append(pair | ({"AIGC": line["AIGC"]} if line.get("AIGC") else {}))
    return found


@tool("feedback")
def main() -> None:
    args = read_arguments()
    os.umask(0o077)  # what people said is for the owner's eyes
    lines = read_feedback(args.file)
    if args.rater is not None:
        return of_rater(args)
    counts = Counter(kind_of(line) for line in lines)
    print(
        f"{len(lines)} replies: " + ", ".join(f"{counts[kind]} {text}" for kind, text in NAMES.items() if counts[kind])
    )
    for text in [*say_votes(list(filter(is_cast, lines))), *say_forms(lines)]:
        print(text)
    lines = [line for _, line in agreed(list(enumerate(lines)))]
    if args.replace:
        replace(args.file, args.replace)
    elif args.export or args.train:
        warn_of_persons(args.file)
    if args.export:
        export(args, lines)
    if args.train:
        train(args, lines)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what tools.chat --web --feedback has written")
    parser.add_argument("--train", type=Path, metavar="RUN_DIR", help="the run whose best/ gave the replies")
    parser.add_argument("--go", action="store_true", help="with --train: do it")
    parser.add_argument("--export", choices=("trl", "swift"), help="write preference pairs")
    parser.add_argument("--out", type=Path, help="file for the pairs; default: FILE with .trl or .swift in its name")
    parser.add_argument("--replace", type=Path, metavar="OUT", help="write a copy with [姓名] and the like in place")
    parser.add_argument("--rater", metavar="NAME", help="what this person said")
    parser.add_argument("--copy", type=Path, metavar="OUT", help="with --rater: write it to a file")
    parser.add_argument("--delete", action="store_true", help="with --rater: take it out of FILE")
    parser.add_argument("--runs", type=Path, default=Path("outputs"), help="with --rater: where runs are looked for")
    args = parser.parse_args()
    if (args.go and not args.train) or ((args.copy or args.delete) and args.rater is None):
        parser.error("--go needs --train; --copy and --delete need --rater")
    if args.export:
        args.out = args.out or args.file.with_suffix(f".{args.export}.jsonl")
    for flag, out in (("--replace", args.replace), ("--copy", args.copy), ("--out", args.out)):
        if out and out.exists():
            raise UserError(f"{out} exists; name another file with {flag}")
    return args


def kind_of(line: dict) -> str:
    return "vote" if is_cast(line) else "corrected" if correction_of(line) else line["verdict"]


def export(args: argparse.Namespace, lines: list[dict]) -> None:
    found = pairs(lines, args.export)
    if not found:
        raise UserError("no reply has a correction that differs from it, and no vote prefers one, so there is no pair")
    write_lines(args.out, to_lines(found))
    print(f"{len(found)} pairs: {args.out}")


def to_lines(rows: list[dict]):
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- who somebody is ---


def without_persons(path: Path) -> tuple[list[dict], dict[str, list[str]]]:
    """(lines with [姓名] and the like in place of what tells who somebody is, location -> what it was)."""
    rows, found = [], {}

    def changed(value, seen: list[str]):
        if isinstance(value, dict):
            return {name: changed(one, seen) for name, one in value.items()}
        if isinstance(value, list):
            return [changed(one, seen) for one in value]
        for kind, text in personal(value) if isinstance(value, str) else ():
            seen.append(f"{kind} {text}")
            value = value.replace(text, f"[{kind}]")
        return value

    for location, row in read_file(path, path.name, "", []):
        if isinstance(row, dict):
            said = {name: row[name] for name in ("messages", "replies", "correction", "reason") if name in row}
            rows.append(row | changed(said, seen := []))
            found |= {location: list(dict.fromkeys(seen))} if seen else {}
    return rows, found


def warn_of_persons(path: Path) -> None:
    _, found = without_persons(path)
    for location, seen in list(found.items())[:10]:
        warn(f"{location} may tell who somebody is: {', '.join(seen)}")
    if found:
        warn(f"{len(found)} lines may; --replace OUT writes a copy without. This is a help and no anonymisation")


def replace(path: Path, out: Path) -> None:
    rows, found = without_persons(path)
    write_lines(out, to_lines(rows))
    print(f"{out}: replaced in {len(found)} lines. Read it all the same: this is a help and no anonymisation")


def of_rater(args: argparse.Namespace) -> None:
    """All lines of one person, replaced ones too."""
    with FileLock(args.file.with_name(f".{args.file.name}.lock")):
        raw = decode(args.file.read_bytes(), "utf-8", args.file.name).split("\n")
        rows = list(map(parsed, raw))
        own = [n for n, row in enumerate(rows) if row.get("rater") == args.rater]
        ids = {str(rows[n]["id"]) for n in own if rows[n].get("id")}
        if not own:
            raise UserError(f"{args.file} has no line of the rater {args.rater!r}")
        print(f"{len(own)} lines of {args.rater} on {len(ids)} replies")
        if args.copy:
            write_lines(args.copy, to_lines([rows[n] for n in own]))
            print(f"copied to {args.copy}")
        if args.delete:
            write_lines(args.file, (text + "\n" for n, text in enumerate(raw) if n not in own and text))
            print(f"deleted from {args.file}")
    found = runs_with(args.runs, ids)
    for folder, seen in found.items():
        parts = ", ".join(f"{count} in {side}" for side, count in seen.items())
        print(f"{folder} has seen them ({parts}): train again without them, and delete its checkpoints/ and best/")
    if not found:
        print(f"no run in {args.runs} has seen them" if args.runs.is_dir() else f"there is no folder {args.runs}: "
              "--runs names that of the runs that may have seen them")  # fmt: skip


def parsed(text: str) -> dict:
    try:
        row = json.loads(text)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def runs_with(folder: Path, ids: set) -> dict[Path, Counter]:
    """Run -> side of its data -> rows that come from these lines."""
    found: dict[Path, Counter] = {}
    for file in sorted(folder.rglob("data/*.jsonl")):
        if (file.parent.parent / "run.json").is_file():
            for text in file.read_text(encoding="utf-8").split("\n"):
                if FEEDBACK_ID in text and str(parsed(text).get(FEEDBACK_ID)) in ids:
                    found.setdefault(file.parent.parent, Counter())[file.stem] += 1
    return found


# --- what to train next ---


def train(args: argparse.Namespace, lines: list[dict]) -> None:
    command, why = next_step(args.file, args.train, lines)
    print(f"{why}:\n  accelerate launch {shlex.join(command)}")
    if args.go:
        done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]])
        raise SystemExit(done.returncode)


def next_step(file: Path, folder: Path, lines: list[dict]) -> tuple[list[str], str]:
    """(arguments of python, why these). Raises UserError if there is nothing to train on."""
    run, best = read_run(folder), folder / "best"
    if not best.is_dir():
        raise UserError(f"{folder} has no best/ to go on from")
    number = {kind: sum(len(rated_replies(line, kind)) for line in lines) for kind in ("pairs", "thumbs")}
    number["pairs"] //= 2
    corrected = sum(correction_of(line) is not None for line in lines if not is_vote(line))
    data = folder / "data"
    same = ["--model", best, "--val-dataset", data / "val.jsonl", "--system-prompt", run["system_prompt"]]
    same += ["--exclude", data / "test.jsonl"] if (data / "test.jsonl").exists() else []
    same += ["--columns", *run["columns"]] if run.get("columns") else []
    same += ["--mixed-precision", run["mixed_precision"], "--max-length", run["max_length"]]
    same += ["--lora-rank", run["lora_rank"]] if run.get("lora_rank") else []
    same += ["--frozen", run["frozen"]] if run.get("frozen", "full") != "full" else []
    same += ["--language", run["language"], "--output-dir", f"{folder}-feedback"]
    rows = [] if (data / "held.jsonl").exists() else [data / "train.jsonl"]  # that run compared replies
    as_rows = ["better", "--dataset", file, *rows], f"{corrected} corrections, as rows beside those of the run"
    if corrected and 2 * corrected >= number["pairs"]:  # better than DPO with the same lines, where both were measured
        more, why = as_rows
    elif number["pairs"] >= ENOUGH_PAIRS:
        more, why = ["preference", "--dataset", file], f"{number['pairs']} pairs, enough for DPO ({ENOUGH_PAIRS})"
    elif number["thumbs"] >= ENOUGH_THUMBS:
        more = ["preference", "--step-file", "recipes/kto.py", "--dataset", file]
        why = f"{number['thumbs']} thumbs, enough for KTO ({ENOUGH_THUMBS})"
    elif corrected:
        more, why = as_rows
    else:
        raise UserError(
            f"{number['pairs']} pairs of at least {ENOUGH_PAIRS}, {number['thumbs']} thumbs of at least "
            f"{ENOUGH_THUMBS}, and no correction: collect more"
        )
    return ["train.py", *map(str, more + same)], why


if __name__ == "__main__":
    main()
