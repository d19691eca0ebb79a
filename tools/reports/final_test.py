"""Losses on the test rows of a race: of the first candidate and the best other one, once."""

import itertools
import json
import math
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from data.base.errors import UserError
from data.base.files import write_json
from data.encode import encode_rows
from loop.record.run_folder import read_run
from loop.score import loss_of, score
from model.qwen3 import load_tokenizer
from tools.reports.candidates import Candidate, compare, difference, lowest
from tools.shared.runs import accelerator_of, load_to_score, read_side


def measure_test(out: Path, candidates: list[Candidate]) -> dict | None:
    """The test losses of the first candidate and of the best other one, which are measured once: later calls return the
    same, and `is_old` says whether the pair or its runs have changed since. None without test rows."""
    path, first = out / "test.json", candidates[0]
    ranked = [one for one in lowest(compare(candidates)) if one is not first]
    pair = [first, *ranked[:1]]
    began = {record.folder.name: record.launches[0]["began"] for one in pair for record in one.runs.values()}
    if path.exists():
        try:
            test = json.loads(path.read_text(encoding="utf-8"))
            return test | {"is_old": test["runs"] != began}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, what was measured on the test rows, cannot be read; put it back") from None
    have_rows = all((record.folder / "data" / "test.jsonl").exists() for one in pair for record in one.runs.values())
    if not ranked or not have_rows:
        return None
    seeds = [seed for seed in first.runs if seed in ranked[0].runs]
    losses = {one.name: [test_loss(one.runs[seed].folder) for seed in seeds] for one in pair}
    if not all(map(math.isfinite, itertools.chain(*losses.values()))):  # all test rows were too long
        return None
    test = {"date": time.strftime("%Y-%m-%d"), "runs": began, "losses": losses}
    test["difference"] = difference(losses[ranked[0].name], losses[first.name])._asdict()
    write_json(path, test)
    return test | {"is_old": False}


def test_loss(run_dir: Path) -> float:
    """Of RUN_DIR/best on RUN_DIR/data/test.jsonl, as the run evaluates."""
    disable_progress_bar()
    run, best = read_run(run_dir), str(run_dir / "best")
    tokenizer, accelerator = load_tokenizer(best), accelerator_of(run)
    rows, _ = encode_rows(read_side(run_dir, "test"), tokenizer, run["max_length"], run["overlong"])
    return loss_of(score(load_to_score(best, run, tokenizer, accelerator), rows, accelerator))
