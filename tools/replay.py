"""Replies of the model before training, against forgetting or to measure it: python -m tools.replay RUN_DIR [--sample]

The model answers questions of the run, or of a file of general ones. Without --sample the file of these dialogues goes
into the training like any other: some 5 to 10 % of it keep what the model could already do. Replies that do not end by
themselves, or have no answer, are dropped. Paper: pseudo-rehearsal, Robins 1995; with a language model's own replies,
Yang et al. 2024 (arXiv:2402.13669). Cost: the rows that it adds to an epoch.
With --sample the model answers held-out questions at temperature 1, as far as --max-new-tokens, and the file is for
train.py --forget, which shows at each evaluation how much of this the model has forgotten.
"""

import argparse
import random
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from data.base.console import tool
from data.base.errors import UserError
from data.replies import reply_row
from model.qwen3 import load_tokenizer
from model.tiny import TINY
from tools.shared.ask import (
    Endpoint,
    Local,
    add_arguments,
    listed,
    make_rows,
    question_of,
    read_source,
    rows_of,
    say_how_to_train,
)
from tools.shared.runs import accelerator_of, load_to_score

SHARE = 0.1  # of a run's training rows
SAMPLED = 200  # held-out questions
LONGEST, LONGEST_SAMPLED = 1024, 256  # tokens of a reply


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sample", action="store_true", help="to measure forgetting, for train.py --forget")
    number = "default: a tenth of a run's training rows, 200 of its held-out ones, or all of a file"
    parser.add_argument("--num-rows", type=int, metavar="N", help=number)
    parser.add_argument("--max-new-tokens", type=int, help="longest reply, thinking included (1024; --sample: 256)")
    args = parser.parse_args()
    if args.max_new_tokens is None:
        args.max_new_tokens = LONGEST_SAMPLED if args.sample else LONGEST
    if args.max_new_tokens < 1 or (args.num_rows is not None and args.num_rows < 1):
        parser.error("--num-rows and --max-new-tokens are at least 1")
    if args.sample and args.url is not None:
        raise UserError("--sample needs the tokens of the replies, which an endpoint does not give: leave --url out")
    return args


@tool("replay")
def main() -> None:
    args = read_arguments()
    disable_progress_bar()
    name, side = ("forget.jsonl", "val") if args.sample else ("replay.jsonl", "train")
    rows, settings = read_source(args, name, side)
    random.Random(settings["seed"]).shuffle(rows)
    share = SAMPLED if args.sample else max(1, round(SHARE * len(rows)))
    rows = rows[: args.num_rows or (share if "dataset" in settings else len(rows))]
    # What is asked: the messages before the last reply, without earlier thinking.
    dialogues = [[{name: m[name] for name in ("role", "content")} for m in row.messages[:-1]] for row in rows]
    writer = Endpoint(args.url, args.url_model) if args.url is not None else local(args, settings, dialogues)

    def make(numbers: range) -> list[tuple[list[dict], list[str]]]:
        asked = [dialogues[n] for n in numbers]
        if args.sample:
            pairs = writer.sample(asked, args.max_new_tokens, seed=numbers[0])
            made = [reply_row(dialogue, *pair, writer.trained) for dialogue, pair in zip(asked, pairs, strict=True)]
            return [([row], []) if pair[1] else ([], ["too long"]) for row, pair in zip(made, pairs, strict=True)]
        replies = writer.ask(asked, args.max_new_tokens, thinking=True, seed=numbers[0])
        return [to_train(dialogue, reply) for dialogue, reply in zip(asked, replies, strict=True)]

    reasons = make_rows(args.out, list(map(question_of, rows)), make)
    number = len(rows_of(args.out)[0])
    print(f"{args.out}: {number:,} replies to {len(rows):,} questions; dropped in this launch: {listed(reasons)}")
    if args.sample:
        print(f"measure what is forgotten of them: accelerate launch train.py ... --forget {args.out}")
    else:
        say_how_to_train(args, settings)


def local(args: argparse.Namespace, settings: dict, dialogues: list[list[dict]]) -> Local:
    """The model before training; `tiny` with the weights and the tokenizer that its run had."""
    best = Path(args.rows) / "best"
    is_of_run = args.model in TINY and best.is_dir()
    texts = (m["content"] for dialogue in dialogues for m in dialogue)
    tokenizer = load_tokenizer(str(best) if is_of_run else args.model, texts)
    model = load_to_score(args.model, settings if is_of_run else {}, tokenizer, accelerator_of({}))
    return Local(args.model, model, tokenizer)


def to_train(dialogue: list[dict], reply) -> tuple[list[dict], list[str]]:
    """The row of a reply, or why there is none."""
    if not reply.stopped or not reply.answer or (reply.think and not reply.closed):
        return [], ["without an answer" if reply.stopped else "not ended"]
    said = {"role": "assistant", "content": reply.answer}
    said |= {"reasoning_content": reply.think} if reply.think else {}
    before = [{**m, "loss": False} if m["role"] == "assistant" else m for m in dialogue]
    return [{"messages": [*before, said]}], []


if __name__ == "__main__":
    main()
