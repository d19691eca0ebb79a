"""Everything that goes wrong but a kill: NaN, full disks, damaged files, second runs, other settings."""

import json
import shutil
import subprocess
import time

import pytest
import torch
from conftest import good_row
from ranks import Ranks, run
from runs import (
    assert_same,
    assert_same_end,
    curve,
    files_of,
    metrics_of,
    newest,
    status_of,
    trainer_of,
    weights_and_moments,
)

from loop.record.checkpoint import checkpoints, newest_sound, verify
from model.generate import load_for_generation

pytestmark = pytest.mark.integration

# 11 rows and 4 a step: epochs of three steps.
ARGS = ["tiny", "--max-steps", "8", "--val-fraction", "0.3", "--eval-steps", "2", "--save-steps", "1"]
ARGS += ["--logging-steps", "1", "--max-length", "192", "--early-stopping-patience", "0",
         "--sample-max-new-tokens", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """strategy -> the arguments without --output-dir"""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")

    def arguments(strategy: str, *more) -> list:
        accumulation = 4 if strategy == "one" else 2
        return [*ARGS, "--dataset", rows, "--gradient-accumulation-steps", accumulation, *more]

    return arguments


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(command("one", "--output-dir", folder / "run"), log=folder / "log").codes == [0]
    return folder / "run"


# --- evaluation and early stopping ------------------------------------------------------------------


def test_kills_around_every_evaluation_change_neither_best_nor_patience_nor_stop(command, tmp_path):
    """A rate that ruins the model: the best is early, it is older than every checkpoint kept, and patience ends it."""
    more = ["--learning-rate", "0.3", "--early-stopping-patience", "3", "--eval-steps", "1", "--max-steps", "40"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert run(command("one", *more, "--output-dir", straight), log=tmp_path / "log").codes == [0]
    stopping, last = trainer_of(newest(straight)), status_of(straight)["step"]
    assert status_of(straight)["status"] == "early_stopped" and stopping["patience_count"] == 3
    assert stopping["best_step"] == last - 3 < int(checkpoints(straight / "checkpoints")[-1].name[5:])
    args = command("one", *more, "--output-dir", out, "--resume")
    for step in (0, *range(2, last + 1)):
        if step == 2:  # before the first checkpoint there is nothing to go on from
            assert run(args, "one", "signal_in_step(0)", tmp_path / "log").codes == [0]
        for moment in ("before", "evaluated", "exported", "logged"):
            outcome = run(args, "one", f"kill_around_evaluation({step}, {moment!r})", tmp_path / "log")
            assert outcome.codes == [-9], (step, moment, outcome.output)
    assert run(args, log=tmp_path / "log").codes == [0]
    assert_same_end(out, straight)
    before = files_of(out)
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [0] and "is finished" in outcome.output and files_of(out) == before


@pytest.mark.parametrize("lost", ["rm", "dotfiles", "never"])
def test_what_was_trained_is_never_replaced_by_a_start_from_step_0(command, whole, lost, tmp_path):
    """Checkpoints removed, copied without the files that begin with a dot, or a kill before the first one."""
    out = tmp_path / "run"
    args = command("one", "--output-dir", out, "--resume")
    if lost == "never":
        assert run(args, "one", "kill_around_evaluation(2, 'logged')", tmp_path / "log").codes == [-9]
        shutil.rmtree(out / "checkpoints")
    else:
        shutil.copytree(whole, out)
        if lost == "rm":
            shutil.rmtree(out / "checkpoints")
        for path in list(out.rglob(".metadata")):
            path.unlink()
        before = files_of(out / "best")
        outcome = run(args, log=tmp_path / "log")  # a finished run says that it is finished
        assert outcome.codes == [0] and "is finished: step 8" in outcome.output
        assert files_of(out / "best") == before and (out / "metrics.jsonl").read_bytes()
        status = status_of(out)
        (out / "run_status.json").write_text(json.dumps({**status, "status": "interrupted"}))
    before = {name: files_of(out)[name] for name in ("metrics.jsonl", "samples.jsonl", "best/model.safetensors")}
    refusal = run(args, log=tmp_path / "log")
    refused(refusal, "no sound checkpoint", "--output-dir OTHER", f"--model {out / 'best'}")
    assert {name: files_of(out)[name] for name in before} == before


def test_a_model_that_was_moved_away_is_missed(command, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "best")
    args = command("one", "--output-dir", out, "--resume")
    refused(run(args, log=tmp_path / "log"), str(out / "best"), "is missing")
    shutil.rmtree(out)
    assert run(args, "one", "signal_in_step(3)", tmp_path / "log").codes == [0]
    shutil.rmtree(out / "best")
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [0] and "is missing; the model of the next evaluation" in outcome.output
    assert trainer_of(newest(out))["best_step"] == trainer_of(newest(whole))["best_step"]
    assert files_of(out / "best") == files_of(whole / "best")


def test_a_stop_file_from_before_stops_nothing(command, whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "STOP").touch()
    outcome = run(command("one", "--output-dir", out), log=tmp_path / "log")
    assert outcome.codes == [0] and f"removed {out / 'STOP'}" in outcome.output
    assert_same_end(out, whole)


def test_ctrl_c_after_the_training_is_an_interruption(command, whole, tmp_path):
    """The training is done and saved; --resume answers the questions that are left."""
    args = command("one", "--output-dir", tmp_path / "run", "--resume")
    outcome = run(args, "one", "interrupt_in_last_answers()", tmp_path / "log")
    assert outcome.codes == [0] and "Traceback" not in outcome.output
    assert (status_of(tmp_path / "run")["status"], status_of(tmp_path / "run")["step"]) == ("interrupted", 8)
    assert run(args, log=tmp_path / "log").codes == [0]
    assert_same_end(tmp_path / "run", whole)


# --- values that are not finite ---------------------------------------------------------------------


def assert_finite(state) -> None:
    for value in state.values() if isinstance(state, dict) else ():
        assert_finite(value)
    if isinstance(state, torch.Tensor):
        assert state.isfinite().all()


@pytest.mark.parametrize("strategy", ["one", "ddp2", "fsdp2"])
def test_a_nan_on_one_rank_is_skipped_by_all(command, strategy, tmp_path):
    out, only = tmp_path / "run", 0 if strategy == "one" else 1
    args = command(strategy, "--output-dir", out, "--save-total-limit", "9")
    outcome = run(args, strategy, f"nan_in(steps=[3], evaluations=[1], only_rank={only})", tmp_path / "log")
    assert set(outcome.codes) == {0} and "step 4 skipped" in outcome.output, outcome.output
    states = {int(path.name[5:]): weights_and_moments(path) for path in checkpoints(out / "checkpoints")}
    assert_same(states[4], states[3])
    assert_finite(states[8])
    assert (
        states[8]["model"]["causal_lm.model.norm.weight"] != states[4]["model"]["causal_lm.model.norm.weight"]
    ).any()
    assert trainer_of(newest(out))["nonfinite_steps"] == 1
    losses = {row["step"]: row["eval/loss"] for row in metrics_of(out) if "eval/loss" in row}
    assert losses[2] == "nan" and sorted(losses) == [0, 2, 4, 6, 8]
    del losses[2]
    status = status_of(out)
    assert status["status"] == "completed" and status["best_loss"] == min(losses.values())
    assert losses[status["best_step"]] == status["best_loss"]


@pytest.mark.parametrize(
    ("strategy", "steps", "ends_after"),
    [("one", [1, 2, 4, 6], 7), ("ddp2", [3, 4, 5, 6], 7), ("fsdp2", [1, 2, 4, 6], 7)],
)
def test_too_many_nans_end_the_run_as_diverged(command, strategy, steps, ends_after, tmp_path):
    """Four in a row, or four in all of a short run; the last checkpoint has the weights before and is intact."""
    out = tmp_path / "run"
    args = command(strategy, "--output-dir", out)
    outcome = run(args, strategy, f"nan_in(steps={steps})", tmp_path / "log")
    assert set(outcome.codes) == {2} and "Traceback" not in outcome.output, outcome.output
    assert "diverged" in outcome.output and "--learning-rate" in outcome.output
    status = status_of(out)
    assert (status["status"], status["step"]) == ("diverged", ends_after)
    assert newest(out).name == f"step-{ends_after - 1:08d}" and verify(newest(out)) is None
    assert_finite(weights_and_moments(newest(out)))
    load_for_generation(out / "best", torch.device("cpu"))


def test_without_one_finite_evaluation_there_is_no_best_model(command, tmp_path):
    args = command("one", "--output-dir", tmp_path / "run")
    outcome = run(args, "one", "nan_in(evaluations=range(99))", tmp_path / "log")
    assert outcome.codes == [0] and "no evaluation with a finite loss" in outcome.output
    assert not (tmp_path / "run/best").exists() and status_of(tmp_path / "run")["best_loss"] is None


# --- disks --------------------------------------------------------------------------------------------

FAILURES = [
    ("one", "OSError", 0, "shards"),
    ("one", "RuntimeError", 0, "shards"),
    ("ddp2", "CheckpointException", 1, "shards"),
    ("ddp2", "OSError", 0, "manifest"),
    ("fsdp2", "RuntimeError", 1, "shards"),
    ("one", "SafetensorError", 0, "export"),
    ("ddp2", "OSError", 0, "export"),
]


@pytest.mark.parametrize(("strategy", "error", "rank", "where"), FAILURES)
def test_a_failed_write_is_said_and_training_goes_on(command, strategy, error, rank, where, tmp_path):
    out = tmp_path / "run"
    args = command(strategy, "--output-dir", out, "--save-total-limit", "9")
    steps = (4,) if where == "export" else (4, 5)
    outcome = run(args, strategy, f"write_fails({error!r}, {steps}, {rank}, {where!r})", tmp_path / "log")
    assert set(outcome.codes) == {0} and "Traceback" not in outcome.output, outcome.output
    kept = [int(path.name[5:]) for path in checkpoints(out / "checkpoints")]
    assert all(verify(path) is None for path in checkpoints(out / "checkpoints"))
    if where == "export":
        assert "warning: the best model of step 4 could not be written" in outcome.output
        assert kept == [8, 7, 6, 5, 4, 3, 2, 1] and trainer_of(newest(out))["best_step"] > 4
    else:
        assert "warning: no checkpoint at step 4, training goes on" in outcome.output
        assert f"(rank {rank})" in outcome.output and kept == [8, 7, 6, 3, 2, 1]
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("strategy", "rank", "steps"), [("one", 0, (4, 5, 6)), ("ddp2", 1, (8,)), ("fsdp2", 1, (4, 5, 6))]
)
def test_a_checkpoint_that_must_be_written_and_is_not_ends_the_run(command, strategy, rank, steps, tmp_path):
    out = tmp_path / "run"
    args = command(strategy, "--output-dir", out)
    outcome = run(args, strategy, f"write_fails('OSError', {steps}, {rank})", tmp_path / "log")
    assert set(outcome.codes) == {2} and "Traceback" not in outcome.output, outcome.output
    assert "could not be written" in outcome.output and "No space left" in outcome.output
    assert status_of(out)["status"] == "failed"
    assert newest(out).name == f"step-{steps[0] - 1:08d}" and verify(newest(out)) is None
    assert set(run([*args, "--resume"], strategy, log=tmp_path / "log").codes) == {0}
    assert status_of(out)["status"] == "completed"


def test_a_full_disk(command, whole, tmp_path):
    """A file system on which after two steps there is room for no further checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=36m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        args = command("one", "--output-dir", disk / "run")
        fault = f"fill_disk(2, {str(disk / 'filler')!r}, 1_500_000)"
        outcome = run(args, "one", fault, tmp_path / "log")
        assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
        assert "warning: no checkpoint at step 3, training goes on" in outcome.output
        assert "the checkpoint of step 5 could not be written" in outcome.output and "0.0 GB free" in outcome.output
        assert [path.name for path in checkpoints(disk / "run/checkpoints")] == ["step-00000002", "step-00000001"]
        assert all(verify(path) is None for path in checkpoints(disk / "run/checkpoints"))
        (disk / "filler").unlink()
        assert run([*args, "--resume"], log=tmp_path / "log").codes == [0]
        assert_same_end(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- damage -------------------------------------------------------------------------------------------


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def delete(path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_any_damage_is_noticed_and_the_checkpoint_before_it_taken(whole, damage, tmp_path, capsys):
    good, names = newest(whole), sorted(str(p.relative_to(newest(whole))) for p in newest(whole).rglob("*.*"))
    assert {"manifest.json", "trainer.json", "state/.metadata"} < set(names)
    for number, name in enumerate(names):
        root = tmp_path / str(number)
        shutil.copytree(whole / "checkpoints", root)
        damage(root / good.name / name)
        left = files_of(root / good.name)
        assert newest_sound(root) == root / "step-00000007", name
        assert files_of(root / f".bad-{good.name}") == left
        said = capsys.readouterr().err
        assert f"{good.name} is damaged" in said and f".bad-{good.name}" in said
        assert newest_sound(root) == root / "step-00000007"


def test_a_damaged_run_ends_as_an_undamaged_one(command, whole, tmp_path):
    out = tmp_path / "run"
    args = command("one", "--output-dir", out, "--resume")
    assert run(args, "one", "kill_in_step(6)", tmp_path / "log").codes == [-9]
    flip(next(newest(out).rglob("*.distcp")))
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [0] and "resumed from" in outcome.output and "step-00000005" in outcome.output
    assert (out / "checkpoints/.bad-step-00000006").is_dir()
    assert_same_end(out, whole)


# --- launches and settings that do not fit ------------------------------------------------------------


def refused(outcome, *wanted) -> None:
    assert set(outcome.codes) == {2} and "Traceback" not in outcome.output, outcome.output
    for text in wanted:
        assert text in outcome.output, outcome.output


def test_other_settings_are_refused_with_every_difference(command, whole, tmp_path):
    before = files_of(whole)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(good_row(i + 1)) + "\n" for i in range(16)), encoding="utf-8")
    args = command("one", "--output-dir", whole, "--resume")
    changes = ["--seed", "7", "--learning-rate", "0.001", "--gradient-accumulation-steps", "3", "--max-steps", "9"]
    outcome = run([*args, *changes, "--dataset", other], log=tmp_path / "log")
    expected = ["seed: 42 -> 7", "learning_rate: 0.005 -> 0.001", "max_steps: 8 -> 9", "rows_per_step: 4 -> 3"]
    refused(outcome, *expected, "train_rows: ", "--output-dir OTHER", f"--model {whole / 'best'}")
    assert files_of(whole) == before
    moved = tmp_path / "moved.jsonl"  # the same rows under another name are the same data
    shutil.copy(args[args.index("--dataset") + 1], moved)
    assert "is finished" in run([*args, "--dataset", moved], log=tmp_path / "log").output


def test_wrong_launches_are_refused(command, tmp_path):
    out = tmp_path / "run"
    args = command("one", "--output-dir", out)
    refused(run(args, "one", "started_apart()", tmp_path / "log"), "2 processes", "--num_processes")
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    refused(run(args, "ddp2", "", tmp_path / "log", **fsdp), "asked for FSDP, but it is not active")
    assert {path.name for path in out.iterdir()} == {".lock"}


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(command, whole, tmp_path):
    out = tmp_path / "run"
    first = Ranks(command("one", "--output-dir", out), log=tmp_path / "first")
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    refused(run(command("one", "--output-dir", out, "--resume"), log=tmp_path / "log"), "another process is training")
    assert first.wait().codes == [0]
    assert_same_end(out, whole)
    assert curve(out) == curve(whole)
