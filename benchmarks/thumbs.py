"""Do thumbs help? python benchmarks/thumbs.py FOLDER [--seeds 42 43 ...]

A small model is taught a fault: a third of the answers that it learns send the patient to no department. It answers new
questions; a rule gives thumbs, a tenth of them wrong. Then each way of learning from them is trained with each seed by
tools.race, with 100 and with 400 replies, and answers questions that nobody has seen. FOLDER keeps what is done.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from make_sample import make_rows, reply_of, without_department
from transformers.utils.logging import disable_progress_bar

from data.replies import reply_row
from data.template import generation_prompt
from loop.config import TrainConfig
from model.generate import generate_ids, load_for_generation, split_reply

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
SYSTEM = TrainConfig.system_prompt
NUMBERS = (100, 400)  # of replies with a thumb
WRONG = 0.1  # of the thumbs
DEPARTMENTS = sorted({row["department"] for row in make_rows()})
FORMS = ("thumbs", "corrected", "votes")
# Name -> form of the feedback, flags, three settings, and the one that is taken with 100 and with 400 replies: that of
# the highest share of right departments by seed 41, which is none of the seeds below (--choose).
RATES = "--learning-rate 1e-4", "--learning-rate 3e-4", "--learning-rate 1e-3"
LENGTHS = "--num-train-epochs 3", "--num-train-epochs 10", "--num-train-epochs 30"
COMPARED = "--learning-rate 1e-4 --step-file recipes/"
WAYS = {
    "corrections as rows": ("corrected", "", RATES, (2, 2)),
    "likes as rows": ("thumbs", "--train-liked", RATES, (0, 1)),
    "KTO, thumbs": ("thumbs", f"{COMPARED}kto.py", LENGTHS, (0, 0)),
    "DPO, corrections": ("corrected", f"{COMPARED}dpo.py", LENGTHS, (1, 0)),
    "DPO, votes": ("votes", f"{COMPARED}dpo.py", LENGTHS, (1, 0)),
    "DPO with RPO, corrections": ("corrected", f"{COMPARED}dpo.py --step-set RPO=1.0", LENGTHS, (2, 1)),
}
COMMON = "--num-train-epochs 3 --gradient-accumulation-steps 4 --warmup-ratio 0.1 --eval-steps 10 --num-samples 0 "
COMMON += "--early-stopping-patience 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", default=["42", "43", "44", "45", "46"])
    parser.add_argument("--choose", action="store_true", help="each way with its three settings, seed 41")
    args = parser.parse_args()
    disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = questions(args.folder)
    base = args.folder / "base" / "best"
    if not base.exists():
        run("train.py", "tiny", "--dataset", args.folder / "base.jsonl", "--val-dataset", args.folder / "val.jsonl",
            "--num-samples", 0, "--output-dir", args.folder / "base")  # fmt: skip
    if not (args.folder / "forget.jsonl").exists():
        collect(base, rows, args.folder)
    print(f"before: {answered(base, rows['test'])}")
    for place, number in enumerate(NUMBERS):
        seeds = ["41"] if args.choose else args.seeds
        ways = {name: (form, f"{flags} {more[chosen[place]]}") for name, (form, flags, more, chosen) in WAYS.items()}
        if args.choose:
            ways = {f"{name} {one.split()[-1]}": (form, f"{flags} {one}")
                    for name, (form, flags, more, _) in WAYS.items() for one in more}  # fmt: skip
        out = args.folder / f"{'choose' if args.choose else 'race'}-{number}"
        race(out, args.folder, base, number, seeds, ways)
        for name in ways:
            runs = [out / f"{slug(name)}-{seed}" for seed in seeds]
            show(number, name, [answered(run / "best", rows["test"]) for run in runs], list(map(figures, runs)))


def run(*args) -> None:
    done = subprocess.run([PYTHON, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, args))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def questions(folder: Path) -> dict[str, list[dict]]:
    """Rows to learn first, of which a third have the fault; rows to evaluate on; questions to give thumbs on; and to
    test. No question is in two of them."""
    seen, found = set(), {}
    for seed, (name, number) in enumerate({"base": 800, "val": 100, "asked": 400, "test": 200}.items()):
        rows = [row for row in make_rows(seed) if row["question"] not in seen][:number]
        seen |= {row["question"] for row in rows}
        found[name] = rows
    chance = random.Random(0)
    faulty = [without_department(row) if chance.random() < 1 / 3 else row for row in found["base"]]
    for name, rows in (("base", faulty), ("val", found["val"])):
        write(folder / f"{name}.jsonl", [{k: row[k] for k in ("question", "think", "answer")} for row in rows])
    return found


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def dialogue_of(row: dict) -> list[dict]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]


def collect(base: Path, rows: dict, folder: Path) -> None:
    """Two replies to each question, drawn from the model; thumbs, corrections and votes on them; replies to measure
    forgetting on."""
    model, tokenizer = load_for_generation(base, torch.device("cpu"))
    model, ends = model.float(), [tokenizer.eos_token_id]
    torch.manual_seed(0)

    sides = [[split_reply(ids, tokenizer, ends) for _, ids in drawn(model, tokenizer, rows["asked"])] for _ in range(2)]
    chance, lines = random.Random(1), {form: [] for form in FORMS}
    for number, (row, *replies) in enumerate(zip(rows["asked"], *sides, strict=True)):
        said = [{"role": "assistant", "content": r.answer or "-", "reasoning_content": r.think} for r in replies]
        good = [names_department(reply.answer) != (chance.random() < WRONG) for reply in replies]
        line = {
            "id": str(number),
            "messages": [*dialogue_of(row), said[0]],
            "verdict": "like" if good[0] else "dislike",
        }
        lines["thumbs"].append(line)
        right = {k: v for k, v in reply_of(row).items() if k != "role"}
        lines["corrected"].append(line if good[0] else {**line, "verdict": "edit", "correction": right})
        verdict = {(True, False): "a", (False, True): "b", (True, True): "both_good"}.get(tuple(good), "both_bad")
        lines["votes"].append({"id": str(number), "messages": dialogue_of(row), "replies": said, "verdict": verdict})
    for form, found in lines.items():
        for number in NUMBERS:
            write(folder / f"{form}-{number}.jsonl", found[:number])
    write(
        folder / "forget.jsonl",
        [
            reply_row(dialogue_of(row), *pair, tokenizer)
            for row, pair in zip(rows["val"], drawn(model, tokenizer, rows["val"]), strict=True)
        ],
    )


def drawn(model, tokenizer, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt, reply) of each as token ids, from the model's own probabilities."""
    prompts = [generation_prompt(dialogue_of(row), tokenizer) for row in rows]
    return generate_ids(model, tokenizer, prompts, 256, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)


def names_department(answer: str) -> bool:
    return any(name in answer for name in DEPARTMENTS)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def race(out: Path, folder: Path, base: Path, number: int, seeds: list[str], ways: dict) -> None:
    """The first candidate of a race is the preset alone, so the first way is in its flags."""
    flags = [
        f"{slug(name)}=--dataset {folder / f'{form}-{number}.jsonl'} {more}" for name, (form, more) in ways.items()
    ]
    first = ["tiny", "--model", base, "--val-dataset", folder / "val.jsonl", "--forget", folder / "forget.jsonl"]
    first += [*COMMON.split(), "--dataset", folder / f"corrected-{number}.jsonl", "--learning-rate", "1e-5"]
    run(
        "-m", "tools.race", *first, "--seeds", *seeds, "--out", out, *[part for f in flags for part in ("--against", f)]
    )


def answered(folder: Path, rows: list[dict]) -> tuple[float, float]:
    """Shares of answers that are drawn: without any department, and with the right one."""
    kept = folder.parent / "answered.json"
    if not kept.exists():
        model, tokenizer = load_for_generation(folder, torch.device("cpu"))
        torch.manual_seed(0)
        pairs = drawn(model.float(), tokenizer, rows)
        answers = [split_reply(ids, tokenizer, [tokenizer.eos_token_id]).answer for _, ids in pairs]
        fault = sum(not names_department(answer) for answer in answers) / len(rows)
        right = sum(row["department"] in answer for row, answer in zip(rows, answers, strict=True)) / len(rows)
        kept.write_text(json.dumps([fault, right]))
    return tuple(json.loads(kept.read_text()))


def figures(folder: Path) -> tuple[float, float]:
    """eval/loss and forget/kl of the model in best/."""
    best = json.loads((folder / "run_status.json").read_text())["best_step"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["step"] == best and "eval/loss" in row)
    return row["eval/loss"], row["forget/kl"]


def show(number: int, name: str, answers: list, losses: list) -> None:
    columns = [*zip(*answers, strict=True), *zip(*losses, strict=True)]
    cells = [f"{statistics.mean(c):.3f} ± {2 * statistics.stdev(c) / math.sqrt(len(c)) if len(c) > 1 else 0:.3f}"
             for c in columns]  # fmt: skip
    print(f"| {number} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
