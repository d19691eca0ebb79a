"""Other wordings of training questions: python -m tools.augment RUN_DIR [--rewrites 2] [--url http://HOST/v1 ...]

A model writes each question anew; thinking and answer stay. The file of these rows goes into the training beside the
run's own. The validation rows are not read. A dialogue of several questions is left out.

A rewrite is dropped if it is the question itself, has other digits, or is half as long again; if the model that writes,
asked whether both ask the same, does not say yes (of a local one the likelihoods of yes and no decide); and if the
row's answer loses, after the rewrite, more than half of what its own question saves it, compared with another row's.
The losses are those of --model, which also writes without --url. A small model is a poor judge: read what was kept.
Paper: WRAP, Maini et al. 2024 (arXiv:2401.16380), on pretraining texts. Cost: the rows that it adds to an epoch.
"""

import argparse
import re
from collections import Counter

from transformers.utils.logging import disable_progress_bar

from data.base.console import tool, warn
from data.contexts import exam_rows, in_context
from data.encode import token_ids
from data.leaks import question_key
from data.reading.rows import Row
from data.template import generation_prompt
from loop.score import loss_of, score
from model.qwen3 import load_tokenizer
from tools.shared.ask import Endpoint, Local, add_arguments, listed, make_rows, read_source, rows_of, say_how_to_train
from tools.shared.runs import accelerator_of, load_to_score

DIGITS = re.compile(r"\d+(?:[.:/]\d+)*")
LONGEST = 1.5  # times the question
LOST = 0.5  # of what a question tells about its answer; a rewrite that loses more asks for something else
SAMPLING = {"thinking": False, "temperature": 1.0}  # at Qwen3's 0.6 many rewrites are copies
# Language -> a wording of the request for each rewrite, again from the first if there are more; how a judge is asked;
# its yes and no.
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
    "Answer only Yes or No.\n\n1: {}\n\n2: {}",
}
YES_NO = {"zh": ("是", "否"), "en": ("Yes", "No")}
YES = re.compile(r"\W*(?:是(?!否|不)|yes\b)", re.IGNORECASE)
Pairs = list[tuple[int, str]]  # (number of a row, rewrite)


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
    def __init__(self, rows: list[Row], max_length: int, args: argparse.Namespace):
        self.rows, self.wanted, self.max_length = rows, args.rewrites, max_length
        self.questions = [row.asked[0] for row in rows]
        self.accelerator, self.tokenizer = accelerator_of({}), load_tokenizer(args.model, self.questions)
        self.model = load_to_score(args.model, {}, self.tokenizer, self.accelerator)
        is_local = args.url is None
        self.writer = Local(args.model, self.model, self.tokenizer) if is_local else Endpoint(args.url, args.url_model)
        self.judges = {"another question": self.by_likelihood if is_local else self.by_asking,
                       "another answer": self.by_answer}  # fmt: skip

    def make(self, numbers: range) -> list[tuple[list[dict], list[str]]]:
        """Of each of these rows the rows with its rewrites that are kept, and why others are not."""
        kept: dict[int, list[str]] = {n: [] for n in numbers}
        reasons: dict[int, list[str]] = {n: [] for n in numbers}
        # What is longer is dropped, so it need not be written to its end.
        lengths = [len(ids) for ids in token_ids([self.questions[n] for n in numbers], self.tokenizer)]
        limit = int(LONGEST * max(lengths)) + 16
        for turn in range(self.wanted):
            asked = [self.request(n, turn) for n in numbers]
            replies = self.writer.ask(asked, limit, seed=self.wanted * numbers[0] + turn, **SAMPLING)
            for n, reply in zip(numbers, replies, strict=True):
                text = reply.answer.strip()
                found = problem(self.questions[n], text) if reply.stopped else "not ended"
                if found is None and any(question_key(other) == question_key(text) for other in kept[n]):
                    found = "the same words"
                (reasons if found else kept)[n].append(found or text)
        for reason, judge in self.judges.items():
            pairs = [(n, text) for n in numbers for text in kept[n]]
            for n, text in judge(pairs) if pairs else ():
                kept[n].remove(text)
                reasons[n].append(reason)
        return [([self.reworded(n, text) for text in kept[n]], reasons[n]) for n in numbers]

    def reworded(self, n: int, text: str) -> dict:
        return {"messages": [{**m, "content": text} if m["role"] == "user" else m for m in self.rows[n].messages]}

    def request(self, n: int, turn: int) -> list[dict]:
        requests = REQUESTS[language_of(self.questions[n])]
        return [{"role": "user", "content": requests[turn % len(requests)].format(self.questions[n])}]

    def dialogues(self, pairs: Pairs) -> list[list[dict]]:
        texts = (SAME[language_of(self.questions[n])].format(self.questions[n], text) for n, text in pairs)
        return [[{"role": "user", "content": text}] for text in texts]

    def by_asking(self, pairs: Pairs) -> Pairs:
        """The rewrites of which the model that writes does not say that they ask the same."""
        replies = self.writer.ask(self.dialogues(pairs), 8, thinking=False, seed=0, temperature=1e-3)
        return [pair for pair, reply in zip(pairs, replies, strict=True) if not YES.match(reply.answer)]

    def by_likelihood(self, pairs: Pairs) -> Pairs:
        """The same of a local model: no is likelier than yes."""
        rows = []
        for (n, _), dialogue in zip(pairs, self.dialogues(pairs), strict=True):
            prompt = generation_prompt(dialogue, self.tokenizer, thinking=False)
            rows += exam_rows([prompt], self.tokenizer, YES_NO[language_of(self.questions[n])])
        table = score(self.model, rows, self.accelerator)
        sums = [line.loss_sum for line in table]
        return [pair for pair, yes, no in zip(pairs, sums[::2], sums[1::2], strict=True) if no < yes]

    def say_if_no_judge(self) -> None:
        """Warns if a local model takes the questions of two rows for the same."""
        number = min(16, len(self.rows) // 2)
        told = len(self.by_likelihood([(n, self.other(n)) for n in range(number)])) if number else 0
        if 5 * told < 4 * number:
            warn(
                f"the model says of {number - told} of {number} pairs of different questions that they ask the same: "
                "it cannot judge rewrites. Ask a larger one with --url, or read all that is kept"
            )

    def other(self, n: int) -> str:
        return self.questions[(n + len(self.rows) // 2) % len(self.rows)]

    def by_answer(self, pairs: Pairs) -> Pairs:
        """The rewrites after which the answer loses more than LOST of what its own question saves it, compared with
        another row's. A row whose question saves nothing is not judged."""
        own = [self.questions[n] for n, _ in pairs]
        others = [self.other(n) for n, _ in pairs]
        rows = [self.rows[n] for n, _ in pairs]
        found = []
        for questions in (own, others, [text for _, text in pairs]):
            examples = in_context(rows, self.tokenizer, self.max_length, questions, thinking=False)
            table = score(self.model, examples, self.accelerator)
            found.append([loss_of([line], "answer") for line in table if line.part == "answer"])
        return [
            pair
            for pair, mine, other, rewritten in zip(pairs, *found, strict=True)
            if other > mine and rewritten - mine > LOST * (other - mine)
        ]


@tool("augment")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rewrites", type=int, default=2, metavar="K", help="of each question")
    args = parser.parse_args()
    if args.rewrites < 1:
        parser.error("--rewrites is at least 1")
    disable_progress_bar()
    rows, settings = read_source(args, "rewritten.jsonl")
    several = sum(len(row.asked) > 1 for row in rows)
    rows = [row for row in rows if len(row.asked) == 1]
    reasons = Counter()
    if rows:
        augment = Augment(rows, settings["max_length"], args)
        if args.url is None:
            augment.say_if_no_judge()
        reasons = make_rows(args.out, augment.questions, augment.make)
    number = len(rows_of(args.out)[0])
    print(f"{args.out}: {number:,} rewrites of {len(rows):,} questions; dropped in this launch: {listed(reasons)}")
    if several:
        print(f"{several:,} dialogues of several questions are left out")
    say_how_to_train(args, settings)


if __name__ == "__main__":
    main()
