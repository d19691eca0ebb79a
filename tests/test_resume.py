"""Runs that are killed wherever it hurts, resumed, and compared with the run that nothing interrupted."""

import contextlib
import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import good_row
from ranks import Ranks, run, uninterrupted
from runs import assert_same_end, newest, status_of, weights_and_moments

from loop.record.checkpoint import checkpoints, verify

pytestmark = pytest.mark.integration

# 11 rows and 4 a step: windows of 4, 4 and 3 rows, so epochs end after steps 3, 6 and 9.
ARGS = ["tiny", "--num-train-epochs", "3", "--val-fraction", "0.3", "--eval-steps", "2", "--save-steps", "1"]
ARGS += ["--logging-steps", "2", "--max-length", "192", "--learning-rate", "0.01", "--early-stopping-patience", "0",
         "--sample-max-new-tokens", "8"]  # fmt: skip
STRATEGIES = ["one", "ddp2", "fsdp2"]


@pytest.fixture(scope="module")
def with_dropout(small_folder, tmp_path_factory):
    """A model folder whose attention drops: generators matter then."""
    folder = tmp_path_factory.mktemp("model") / "dropout"
    shutil.copytree(small_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def command(with_dropout, tmp_path_factory):
    """strategy -> the arguments without --output-dir"""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    args = [*ARGS, "--dataset", rows, "--model", with_dropout]
    return {name: [*args, "--gradient-accumulation-steps", 4 if name == "one" else 2] for name in STRATEGIES}


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return uninterrupted(lambda strategy, out: [*command[strategy], "--output-dir", out], tmp_path_factory)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_in_every_place_it_ends_with_the_same_bits(strategy, command, whole, tmp_path):
    """One run, killed in the middle of an epoch, at its end, in the short last window and in epoch 2."""
    args = [*command[strategy], "--output-dir", tmp_path / "run", "--resume"]
    for step in (
        (2, 3, 5, 7) if strategy == "one" else (3, 7)
    ):  # completed when the kill strikes, in the backward of the next step
        outcome = run(args, strategy, f"kill_in_step({step})", tmp_path / "log")
        assert -9 in outcome.codes, outcome.output
        assert checkpoints(tmp_path / "run/checkpoints")[0].name == f"step-{step:08d}"
    outcome = run(args, strategy, log=tmp_path / "log")
    assert set(outcome.codes) == {0} and "resumed from" in outcome.output, outcome.output
    assert status_of(tmp_path / "run")["step"] == 9
    assert_same_end(tmp_path / "run", whole(strategy))


@pytest.mark.parametrize("strategy", ["one", "fsdp2"])
def test_what_a_step_keeps_for_a_parameter_survives(strategy, command, tmp_path):
    """An average of the weights and more in optimizer.state, of which no optimizer knows."""
    args = [*command[strategy], "--max-steps", "5", "--resume", "--output-dir"]
    for name, fault in (("whole", ""), ("run", "kill_in_step(3)"), ("run", "")):
        fault = f"(keep_state(), {fault})" if fault else "keep_state()"
        outcome = run([*args, tmp_path / name], strategy, fault, tmp_path / "log")
        assert -9 in outcome.codes if "kill" in fault else set(outcome.codes) == {0}, outcome.output
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    states = weights_and_moments(newest(tmp_path / "run"))["optimizer"].values()
    assert states and all(state["updates"] == 5 and state["norms"].sum() == 1 for state in states)


STAGES = [
    "begin",
    "shards",
    "second_rank",
    "before_rename",
    "after_rename",
    "pruning",
    "export",
    "export_renames",
    "training",
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_kill_at_any_stage_of_a_save_leaves_a_complete_checkpoint(strategy, command, whole, tmp_path):
    """The same run, killed at one stage after another; each time what is left is sound and the next start goes on."""
    out = tmp_path / "run"
    args = [*command[strategy], "--output-dir", out, "--resume"]
    assert set(run(args, strategy, "signal_in_step(1)", tmp_path / "log").codes) == {0}
    alone = {"second_rank"} if strategy == "one" else set()
    # Under DDP the main process writes as one process does; with FSDP2 both write.
    alone |= {"begin", "before_rename", "after_rename", "pruning"} if strategy == "ddp2" else set()
    for stage in [stage for stage in STAGES if stage not in alone]:
        outcome = run(args, strategy, f"kill_at('{stage}')", tmp_path / "log")
        assert -9 in outcome.codes, (stage, outcome.output)
        assert "resumed from" in outcome.output, stage
        left = checkpoints(out / "checkpoints")  # more than the limit where a kill came before the pruning
        assert left and [verify(folder) for folder in left] == [None] * len(left), stage
    assert set(run(args, strategy, log=tmp_path / "log").codes) == {0}
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    assert_same_end(out, whole(strategy))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "kills"), [("one", 40), ("ddp2", 30), ("fsdp2", 30)])
def test_random_kills(strategy, kills, command, whole, tmp_path):
    """SIGKILL to one rank or all at a random moment; a run that gets to its end is compared, and another one begun."""
    chance = random.Random(f"{strategy} {kills}")
    killed, finished, number = 0, 0, 0
    seconds = []
    while killed < kills:
        out = tmp_path / str(number)
        ranks = Ranks([*command[strategy], "--output-dir", out, "--resume"], strategy, log=tmp_path / "log")
        end = time.monotonic() + chance.uniform(0.5, 1.2 * (max(seconds, default=4)))
        started = time.monotonic()
        while time.monotonic() < end and any(process.exitcode is None for process in ranks.processes):
            time.sleep(0.005)
        alive = [process for process in ranks.processes if process.exitcode is None]
        if alive:
            doomed = alive if chance.random() < 0.5 else [chance.choice(alive)]
            for process in doomed:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signal.SIGKILL)
            killed += -9 in ranks.wait().codes
        else:
            assert set(ranks.wait().codes) == {0}, ranks.output()
            seconds.append(time.monotonic() - started)
            assert_same_end(out, whole(strategy))
            shutil.rmtree(out)
            finished, number = finished + 1, number + 1
        assert all(verify(folder) is None for folder in checkpoints(out / "checkpoints"))
    assert set(run([*command[strategy], "--output-dir", out, "--resume"], strategy).codes) == {0}
    assert_same_end(out, whole(strategy))
    print(f"{strategy}: {killed} kills, {finished + 1} runs that ended alike")
