"""Rows whose replies are a model's own, against forgetting: python -m tools.replay RUN_DIR [--num-rows N]

The model before training answers questions of the run, or of a file of general ones, and the file of these dialogues
goes into the training like any other: some 5 to 10 % of it keep what the model could already do. Replies that do not
end by themselves, or have no answer, are dropped.
Paper: pseudo-rehearsal, Robins 1995; with a language model's own replies, Yang et al. 2024 (arXiv:2402.13669). Cost:
the rows that it adds to an epoch.
"""

import argparse
import random
from collections import Counter

from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from data.base.console import run_tool
from data.reading.rows import Row
from model.generate import Reply
from model.qwen3 import load_tokenizer
from tools.rows import load
from tools.shared.ask import (
    ASKED,
    Endpoint,
    Local,
    add_arguments,
    lines_of,
    make_lines,
    read_source,
    reasons,
    say_how_to_train,
)

SHARE = 0.1  # of a run's training rows


class Replay:
    def __init__(self, dialogues: list[list[dict]], run: dict, args: argparse.Namespace):
        self.dialogues, self.max_new_tokens = dialogues, args.max_new_tokens
        if args.url is not None:
            self.writer = Endpoint(args.url, args.url_model)
        else:
            tokenizer = load_tokenizer(args.model, (m["content"] for dialogue in dialogues for m in dialogue))
            self.writer = Local(args.model, load(args.model, run, tokenizer, Accelerator().device), tokenizer)

    def make(self, numbers: range) -> list[tuple[dict | None, Counter]]:
        asked = [self.dialogues[n] for n in numbers]
        replies = self.writer.ask(asked, self.max_new_tokens, thinking=True, seed=numbers[0])
        return [self.line(dialogue, reply) for dialogue, reply in zip(asked, replies, strict=True)]

    def line(self, dialogue: list[dict], reply: Reply) -> tuple[dict | None, Counter]:
        if not reply.stopped or not reply.answer or (reply.think and not reply.closed):
            return None, Counter([ASKED, "without an answer" if reply.stopped else "not ended"])
        said = {"role": "assistant", "content": reply.answer}
        said |= {"reasoning_content": reply.think} if reply.think else {}
        before = [{**m, "loss": False} if m["role"] == "assistant" else m for m in dialogue]
        return {"messages": [*before, said]}, Counter([ASKED, "used"])

    def position(self, done: list[dict]) -> int | None:
        try:
            last = [{name: m[name] for name in ("role", "content")} for m in done[-1]["messages"][:-1]]
        except (KeyError, TypeError):  # lines of another kind
            return None
        return self.dialogues.index(last) + 1 if last in self.dialogues else None


def dialogues_of(rows: list[Row], number: int | None, seed: int, is_run: bool) -> list[list[dict]]:
    """What is asked, each once: the messages before the last reply, without earlier thinking."""
    asked = [[{name: m[name] for name in ("role", "content")} for m in row.messages[:-1]] for row in rows]
    found = list({str(dialogue): dialogue for dialogue in asked}.values())
    random.Random(seed).shuffle(found)
    return found[: number or (max(1, round(SHARE * len(found))) if is_run else len(found))]


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num-rows", type=int, metavar="N", help="default: a tenth of a run's rows, or all of a file")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest reply, thinking included")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or (args.num_rows is not None and args.num_rows < 1):
        parser.error("--num-rows and --max-new-tokens are at least 1")
    disable_progress_bar()
    rows, settings = read_source(args, "replay.jsonl")
    is_run = "dataset" in settings
    dialogues = dialogues_of(rows, args.num_rows, settings["seed"], is_run)
    replay = Replay(dialogues, settings, args)
    counts = make_lines(args.out, len(dialogues), replay.make, replay.position)
    number = len(lines_of(args.out)[0])
    print(f"{args.out}: {number:,} replies to {len(dialogues):,} questions; dropped in this launch: {reasons(counts)}")
    if is_run:
        say_how_to_train(args, settings, [f"{args.rows}/data/train.jsonl", str(args.out)])


def main() -> None:
    run_tool("replay", run)


if __name__ == "__main__":
    main()
