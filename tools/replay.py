"""Rows whose replies are a model's own, against forgetting: python -m tools.replay RUN_DIR [--num-rows N]

The model before training answers questions of the run, or of a file of general ones, and the file of these dialogues
goes into the training like any other: some 5 to 10 % of it keep what the model could already do. Replies that do not
end by themselves, or have no answer, are dropped.
Paper: pseudo-rehearsal, Robins 1995; with a language model's own replies, Yang et al. 2024 (arXiv:2402.13669). Cost:
the rows that it adds to an epoch.
"""

import argparse
import random

from transformers.utils.logging import disable_progress_bar

from data.base.console import tool
from model.qwen3 import load_tokenizer
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


@tool("replay")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num-rows", type=int, metavar="N", help="default: a tenth of a run's rows, or all of a file")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest reply, thinking included")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or (args.num_rows is not None and args.num_rows < 1):
        parser.error("--num-rows and --max-new-tokens are at least 1")
    disable_progress_bar()
    rows, settings = read_source(args, "replay.jsonl")
    random.Random(settings["seed"]).shuffle(rows)
    share = max(1, round(SHARE * len(rows))) if "dataset" in settings else len(rows)
    rows = rows[: args.num_rows or share]
    # What is asked: the messages before the last reply, without earlier thinking.
    dialogues = [[{name: m[name] for name in ("role", "content")} for m in row.messages[:-1]] for row in rows]
    if args.url is not None:
        writer = Endpoint(args.url, args.url_model)
    else:
        tokenizer = load_tokenizer(args.model, (m["content"] for dialogue in dialogues for m in dialogue))
        writer = Local(args.model, load_to_score(args.model, {}, tokenizer, accelerator_of({})), tokenizer)

    def make(numbers: range) -> list[tuple[list[dict], list[str]]]:
        asked = [dialogues[n] for n in numbers]
        replies = writer.ask(asked, args.max_new_tokens, thinking=True, seed=numbers[0])
        made = []
        for dialogue, reply in zip(asked, replies, strict=True):
            if not reply.stopped or not reply.answer or (reply.think and not reply.closed):
                made.append(([], ["without an answer" if reply.stopped else "not ended"]))
                continue
            said = {"role": "assistant", "content": reply.answer}
            said |= {"reasoning_content": reply.think} if reply.think else {}
            before = [{**m, "loss": False} if m["role"] == "assistant" else m for m in dialogue]
            made.append(([{"messages": [*before, said]}], []))
        return made

    reasons = make_rows(args.out, list(map(question_of, rows)), make)
    number = len(rows_of(args.out)[0])
    print(f"{args.out}: {number:,} replies to {len(rows):,} questions; dropped in this launch: {listed(reasons)}")
    say_how_to_train(args, settings)


if __name__ == "__main__":
    main()
