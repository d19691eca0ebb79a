"""What asks a run to stop, and that it stops within seconds wherever it is, with nothing lost."""

import json
import os
import signal

import pytest
from conftest import good_row
from ranks import run, uninterrupted
from runs import assert_same_end, newest, status_of

from loop.record.interrupt import Interrupt

# An evaluation before the first step, after two steps, and after the last one.
ARGS = ["tiny", "--max-steps", "4", "--val-fraction", "0.3", "--eval-steps", "2", "--save-steps", "100"]
ARGS += ["--logging-steps", "1", "--max-length", "192", "--sample-max-new-tokens", "8"]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_only_the_same_signal_again_ends_the_process_at_once(first, second, monkeypatch, tmp_path):
    """A launcher that a Ctrl+C ends has a SIGTERM sent to the run, however late: its checkpoint is still written."""
    ended = []
    with Interrupt(tmp_path) as interrupt:
        interrupt.signalled_at[first] = 0.0  # asked long ago
        monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(number))
        interrupt.handle(second, None)
        assert interrupt.requested()
    assert ended == ([second] if first == second else [])


def test_what_nohup_ignores_stays_ignored(monkeypatch, tmp_path):
    """But for torch's launcher of several processes, which a closed terminal ends, nohup or not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(tmp_path):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        with Interrupt(tmp_path) as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")

    def arguments(strategy: str, out) -> list:
        accumulation = 4 if strategy == "one" else 2
        return [*ARGS, "--dataset", rows, "--gradient-accumulation-steps", accumulation, "--output-dir", out]

    return arguments


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return uninterrupted(command, tmp_path_factory)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("strategy", "where", "call", "number", "step"),
    [
        ("one", "evaluate", 0, "SIGUSR1", 0),
        ("one", "evaluate", 1, "SIGHUP", 2),
        ("one", "evaluate", 2, "SIGTERM", 4),  # the last one: what is missing is made again
        ("one", "answer", 1, "SIGINT", 2),
        ("one", "answer", 3, "SIGTERM", 4),  # of the best model, at the end
        ("ddp2", "evaluate", 1, "SIGUSR1", 2),  # to one rank alone
        ("fsdp2", "answer", 1, "SIGTERM", 2),
    ],
)
def test_a_stop_acts_inside_evaluations_and_answers(strategy, where, call, number, step, command, whole, tmp_path):
    out = tmp_path / "run"
    args = [*command(strategy, out), "--resume"]
    outcome = run(args, strategy, f"signal_in({where!r}, {call}, {number!r})", tmp_path / "log")
    assert set(outcome.codes) == {0} and "Traceback" not in outcome.output, outcome.output
    status = status_of(out)
    assert (status["status"], status["step"]) == ("interrupted", step)
    assert outcome.output.count("  eval loss") == (3 if call == 3 else call)  # the evaluation was left
    if step:
        assert newest(out).name == f"step-{step:08d}"
    outcome = run(args, strategy, log=tmp_path / "log")
    assert set(outcome.codes) == {0}, outcome.output
    assert_same_end(out, whole(strategy))


def test_a_run_stops_when_its_time_is_over(command, whole, tmp_path):
    args = [*command("one", tmp_path / "run"), "--resume"]
    outcome = run([*args, "--max-time", "1e-6"], log=tmp_path / "log")
    assert outcome.codes == [0] and "interrupted, before the first step" in outcome.output
    assert "--resume" in outcome.output.split("Go on: ")[1]
    assert run([*args, "--max-time", "10"], log=tmp_path / "log").codes == [0]
    assert_same_end(tmp_path / "run", whole("one"))
