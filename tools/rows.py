"""Which rows are wrong? The loss of every row of a run before and after training, and whether its answer follows from
its question.

    python -m tools.rows RUN_DIR [--worst 20] [--write-suspects 20]

A row's `follows` is how much less its answer costs after its own question than after another row's, in nats per token
and without any thinking. An answer that belongs to another question gains nothing, so rows with the lowest figures are
the suspects. RUN_DIR/rows.jsonl has all rows, the suspects first; --write-suspects N writes the first N to
RUN_DIR/suspects.jsonl, and `train.py --exclude RUN_DIR/suspects.jsonl` trains without them.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from data.batches import Collated, rank_rows
from data.encode import Example, encode_turns, turns_of
from data.errors import UserError
from data.formats import read_row
from data.read import read_file
from data.rows import Row, read_given
from loop.console import prepare_terminal
from loop.evaluate import LossOfGroups, evaluate
from loop.files import write_lines
from loop.run_folder import read_run
from model.generate import fast_dtype
from model.loss import SFTModel
from model.qwen3 import load_model, load_tokenizer

TOKENS = 2048  # laid end to end in one forward


def read_side(run_dir: Path, side: str) -> list[Row]:
    """The rows of RUN_DIR/data/SIDE.jsonl as the run read them; none without the file."""
    run, path = read_run(run_dir), run_dir / "data" / f"{side}.jsonl"
    given, rows = read_given(run.get("columns", ())), []
    for location, columns in read_file(path, path.name, "", []) if path.exists() else ():
        try:
            rows.append(Row(location, columns, read_row(columns, run["system_prompt"], given).messages))
        except ValueError as reason:
            raise UserError(f"{location} {reason}") from None
    return rows


def load(name: str, run: dict, tokenizer, device: torch.device) -> SFTModel:
    """A model as it evaluates; `tiny` as it was before the run trained it."""
    set_seed(run["seed"])
    causal_lm = load_model(
        name, tokenizer, gradient_checkpointing=False, dtype=fast_dtype(device) if name != "tiny" else torch.float32
    )
    return SFTModel(causal_lm, loss_chunk=1024).to(device)


def losses_of(model: SFTModel, rows: dict[str, Example], accelerator: Accelerator) -> dict[str, dict[str, float]]:
    """label -> {"think": nats per token, "answer": ...}, of each row alone."""
    groups = rank_rows(list(rows.values()), batch_size=1, micro_batch_tokens=TOKENS)
    names = {id(row): name for name, row in rows.items()}
    parts = LossOfGroups(
        [
            [part for row in group for part in (((f"{names[id(row)]}/think",), row.num_think_targets), ((f"{names[id(row)]}/answer",), row.num_answer_targets))]
            for group in groups
        ]
    )  # fmt: skip
    evaluate(model, Collated(groups), accelerator, each=parts.add)
    found: dict[str, dict[str, float]] = {}
    for label, loss in parts.means().items():
        name, part = label.rsplit("/", 1)
        found.setdefault(name, {})[part] = loss
    return found
