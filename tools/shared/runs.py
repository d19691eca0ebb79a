"""The run that a model comes from: its rows, and the model as the run evaluates it."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed

from data.base.errors import UserError
from data.reading.feedback import take_feedback
from data.reading.formats import Given, as_columns, candidates, read_row
from data.reading.messages import filled
from data.reading.read import read_file
from data.reading.rows import Row, read_given
from data.reading.source import find_source
from loop.record.run_folder import read_run
from model.generate import fast_dtype
from model.loss import SFTModel
from model.qwen3 import load_model


def run_of(model: str | Path) -> dict:
    """run.json of the run whose best/ a model is; empty if it is none."""
    try:
        return read_run(Path(model).resolve().parent)
    except UserError:
        return {}


def name_of(model: str) -> str:
    """To be shown: without the folders above, which are private."""
    folder, run = Path(model), run_of(model)
    return f"{run['run_name']}/{folder.resolve().name}" if run else folder.resolve().name if folder.exists() else model


def read_side(run_dir: Path, side: str) -> list[Row]:
    """The rows of RUN_DIR/data/SIDE.jsonl as the run read them; none without the file."""
    run, path = read_run(run_dir), run_dir / "data" / f"{side}.jsonl"
    return read_rows(str(path), run["system_prompt"], read_given(run.get("columns", ()))) if path.exists() else []


def read_rows(dataset: str, system_prompt: str, given: Given = (), questions: bool = False) -> list[Row]:
    """Every row of a dataset; questions: they may be without an answer. Raises UserError naming the first that is
    unusable."""
    rows, source, read = [], find_source(dataset), []
    for path in source.files:
        read += ((place, as_columns(row)) for place, row in read_file(path, path.name, source.part, []))
    read, _ = take_feedback(read, train_liked=False)
    for location, columns in read[: source.number_of(len(read))]:
        if questions and isinstance(columns, dict) and not any(candidates(tuple(filled(columns)), given)["answer"]):
            columns = {**columns, "answer": "-"}
        try:
            rows.append(Row(location, columns, read_row(columns, system_prompt, given).messages))
        except ValueError as reason:
            raise UserError(f"{location} {reason}") from None
    return rows


def accelerator_of(run: dict) -> Accelerator:
    """With the precision in which a run evaluates; a model without one computes in its own."""
    precision = run.get("mixed_precision", "no")
    return Accelerator(mixed_precision=precision, kwargs_handlers=[AutocastKwargs(cache_enabled=False)])


def load_to_score(name: str, run: dict, tokenizer, accelerator: Accelerator) -> SFTModel:
    """A model for `score`, as the run evaluates it; `tiny` as it was before the run trained it."""
    set_seed(run.get("seed", 0))
    dtype = getattr(torch, run["weights"].removeprefix("torch.")) if run else fast_dtype(accelerator.device)
    causal_lm = load_model(name, tokenizer, gradient_checkpointing=False, dtype=dtype)
    return accelerator.prepare_model(SFTModel(causal_lm, loss_chunk=1024), evaluation_mode=True)
