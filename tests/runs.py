"""Comparing runs by what they leave."""

import json
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

TIMES = {"perf/tokens_per_s", "perf/step_time_s", "memory/peak_gib"}  # what no two runs share


def metrics_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def curve(output_dir: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics_of(output_dir)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights_and_moments(checkpoint: Path) -> dict:
    file = checkpoint.with_name(f"{checkpoint.name}.pt")
    dcp_to_torch_save(checkpoint / "state", file)
    try:
        return torch.load(file, weights_only=True)
    finally:
        file.unlink()


def trainer_of(checkpoint: Path) -> dict:
    state = json.loads((checkpoint / "trainer.json").read_text())
    state.pop("run_id")
    return state


def newest(output_dir: Path) -> Path:
    return max((output_dir / "checkpoints").glob("step-*"))


def status_of(output_dir: Path) -> dict:
    return json.loads((output_dir / "run_status.json").read_text())


def assert_same(ours, theirs, where="") -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Weights, optimizer, trainer state, best model, metric rows and samples, bit for bit."""
    assert newest(ours).name == newest(theirs).name
    assert_same(weights_and_moments(newest(ours)), weights_and_moments(newest(theirs)))
    assert trainer_of(newest(ours)) == trainer_of(newest(theirs))
    assert curve(ours) == curve(theirs)
    assert files_of(ours / "best") == files_of(theirs / "best")
    for name in ("samples.jsonl", "eval_rows.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    ends = [{name: value for name, value in status_of(run).items() if name != "pid"} for run in (ours, theirs)]
    assert ends[0] == ends[1]
