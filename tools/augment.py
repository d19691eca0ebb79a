"""Other wordings of each training question, for rows that are trained more than once.

    python -m tools.augment RUN_DIR [--rewrites 2] [--url http://HOST/v1 --url-model NAME]

A model writes each question anew; thinking and answer stay. The file has all training rows, each with its wordings in
the column `rewrites`, and train.py takes one of them in each epoch, so that an epoch has as many rows as before. The
validation rows are not read.

A rewrite is dropped if it is the question itself, has other digits, or is half as long again; if the model that writes,
asked whether both ask the same, does not say yes; and if the row's answer loses, after the rewrite, more than half of
what its own question saves it, compared with another row's question. The losses are those of --model, which also writes
without --url. A small model is a poor judge: read what was kept.
Paper: WRAP, Maini et al. 2024 (arXiv:2401.16380), on pretraining texts. Cost: no time and no memory in training.
"""

import argparse
import re
from collections import Counter

from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from data.base.console import run_tool
from data.encode import token_ids
from data.leaks import question_key
from data.reading.rows import Row
from model.qwen3 import load_tokenizer
from tools.rows import Contexts, load, losses_of
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
    to_bytes,
)

DIGITS = re.compile(r"\d+(?:[.:/]\d+)*")
TEMPERATURE = 1.0  # at Qwen3's 0.6 many rewrites are copies
LONGEST = 1.5  # times the question
LOST = 0.5  # of what a question tells about its answer; a rewrite that loses more asks for something else
# A wording of the request for each rewrite of a question, again from the first if there are more.
REQUESTS = {
    "zh": (
        "请换一种说法改写下面这个问题，意思要完全一样，数字、时间、部位、药名和“没有、不”这样的否定都不能变。"
        "不要回答问题，只写出改写后的问题。\n\n{}",
        "请像普通患者说话那样，用口语重写下面的问题。不能增加或减少任何信息，数字和否定要保留。只输出重写后的问题，不要回答。\n\n{}",
        "请调整语序和用词，重新表述下面的问题，内容不变，数字和否定不变。只输出问题本身，不要解释，不要回答。\n\n{}",
    ),
    "en": (
        "Rewrite this question in other words with exactly the same meaning. Keep every number, time, part of the "
        "body, drug and negation. Do not answer it; write only the rewritten question.\n\n{}",
    ),
}

SAME = {
    "zh": "下面两个问题问的是同一件事吗？病情、部位、时间、药物、人物有任何不同都算不同。"
    "只回答“是”或“否”。\n\n一：{}\n\n二：{}",
    "en": "Do these two ask the same? Another symptom, time, drug, person or part of the body makes them differ. "
    "Answer only yes or no.\n\n1: {}\n\n2: {}",
}
YES = re.compile(r"\W*(?:是(?!否|不)|yes\b)", re.IGNORECASE)


def problem(question: str, rewrite: str) -> str | None:
    """What can be seen of a rewrite without knowing a language."""
    if not rewrite or "\n" in rewrite:
        return "no question"
    if question_key(rewrite) == question_key(question):
        return "the same words"
    if len(rewrite) > LONGEST * len(question) + 8:
        return "too long"
    return "other digits" if Counter(DIGITS.findall(rewrite)) != Counter(DIGITS.findall(question)) else None


def language_of(text: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"


class Augment:
    def __init__(self, rows: list[Row], run: dict, args: argparse.Namespace):
        self.rows, self.wanted = rows, args.rewrites
        self.accelerator, self.tokenizer = Accelerator(), load_tokenizer(args.model, (row.asked[-1] for row in rows))
        self.judge = load(args.model, run, self.tokenizer, self.accelerator.device)
        self.max_length = run["max_length"]
        self.writer = (
            Endpoint(args.url, args.url_model)
            if args.url is not None
            else Local(args.model, self.judge, self.tokenizer)
        )

    def make(self, numbers: range) -> list[tuple[dict, Counter]]:
        """Of each of these rows its columns with the rewrites that are kept, and what became of all of them."""
        asked = [n for n in numbers if len(self.rows[n].asked) == 1]
        kept: dict[int, list[str]] = {n: [] for n in numbers}
        several = Counter(["a dialogue of several questions"])
        counts = {n: Counter([ASKED]) if n in asked else several for n in numbers}
        # What is longer is dropped, so it need not be written to its end.
        lengths = [len(ids) for ids in token_ids([self.rows[n].asked[0] for n in asked], self.tokenizer)]
        limit = int(LONGEST * max(lengths, default=0)) + 16
        for turn in range(self.wanted if asked else 0):
            replies = self.writer.ask(
                [self.request(n, turn) for n in asked],
                limit,
                thinking=False,
                seed=self.wanted * numbers[0] + turn,
                temperature=TEMPERATURE,
            )
            for n, reply in zip(asked, replies, strict=True):
                text = reply.answer.strip()
                found = problem(self.rows[n].asked[0], text) if reply.stopped else "not ended"
                if found is None and any(question_key(other) == question_key(text) for other in kept[n]):
                    found = "the same words"
                if found:
                    counts[n][found] += 1
                else:
                    kept[n].append(text)
        for judge, reason in ((self.not_the_same, "another question"), (self.unlike, "another answer")):
            for n, text in judge(asked, kept):
                kept[n].remove(text)
                counts[n][reason] += 1
        return [
            (self.columns(n) | ({"rewrites": kept[n]} if kept[n] else {}), counts[n] + Counter(used=len(kept[n])))
            for n in numbers
        ]

    def columns(self, n: int) -> dict:
        return {name: value for name, value in self.rows[n].columns.items() if name != "rewrites"}

    def request(self, n: int, turn: int) -> list[dict]:
        question = self.rows[n].asked[0]
        requests = REQUESTS[language_of(question)]
        return [{"role": "user", "content": requests[turn % len(requests)].format(question)}]

    def not_the_same(self, asked: list[int], kept: dict[int, list[str]]) -> list[tuple[int, str]]:
        """The rewrites of which the model that writes does not say that they ask the same."""
        pairs = [(n, text) for n in asked for text in kept[n]]
        questions = [self.rows[n].asked[0] for n, _ in pairs]
        texts = [SAME[language_of(q)].format(q, text) for q, (_, text) in zip(questions, pairs, strict=True)]
        dialogues = [[{"role": "user", "content": text}] for text in texts]
        replies = self.writer.ask(dialogues, 8, thinking=False, seed=0, temperature=1e-3) if pairs else []
        return [pair for pair, reply in zip(pairs, replies, strict=True) if not YES.match(reply.answer)]

    def unlike(self, asked: list[int], kept: dict[int, list[str]]) -> list[tuple[int, str]]:
        """The rewrites after which the answer loses more than LOST of what its own question saves it, compared with
        another row's. A row whose question saves nothing is not judged."""
        pairs = [(n, text) for n in asked for text in kept[n]]
        if not pairs or len(self.rows) < 2:
            return []
        own = [self.rows[n].asked[0] for n, _ in pairs]
        others = [self.rows[(n + len(self.rows) // 2) % len(self.rows)].asked[-1] for n, _ in pairs]
        contexts = Contexts([self.rows[n] for n, _ in pairs], self.tokenizer, self.max_length)
        found = [
            losses_of(self.judge, contexts.encode(questions, thinking=False), self.accelerator).answer
            for questions in (own, others, [text for _, text in pairs])
        ]
        return [
            pair
            for pair, mine, other, rewritten in zip(pairs, *found, strict=True)
            if other > mine and rewritten - mine > LOST * (other - mine)
        ]

    def position(self, done: list[dict]) -> int | None:
        """Every row has a line."""
        if len(done) > len(self.rows):
            return None
        last = {name: value for name, value in done[-1].items() if name != "rewrites"}
        return len(done) if to_bytes(last) == to_bytes(self.columns(len(done) - 1)) else None


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rewrites", type=int, default=2, metavar="K", help="of each question")
    args = parser.parse_args()
    if args.rewrites < 1:
        parser.error("--rewrites is at least 1")
    disable_progress_bar()
    rows, settings = read_source(args, "rewritten.jsonl")
    augment = Augment(rows, settings, args)
    counts = make_lines(args.out, len(rows), augment.make, augment.position)
    number = sum(len(line.get("rewrites", ())) for line in lines_of(args.out)[0])
    print(f"{args.out}: {number:,} rewrites of {len(rows):,} questions; dropped in this launch: {reasons(counts)}")
    say_how_to_train(args, settings, [str(args.out)])


def main() -> None:
    run_tool("augment", run)


if __name__ == "__main__":
    main()
