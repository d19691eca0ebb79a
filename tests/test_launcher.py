"""Nothing that accelerate's launcher or its configuration sets changes the maths in silence."""

import json
import re
from pathlib import Path

import accelerate
import pytest
from conftest import good_row
from ranks import run
from runs import assert_same_end

from loop.start.launcher import DECIDED_HERE, UNSUPPORTED, num_threads

# Every variable that the installed accelerate names.
SOURCES = [path.read_text(encoding="utf-8") for path in Path(accelerate.__file__).parent.rglob("*.py")]
PREFIXES = "ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|FP8"
VARIABLES = sorted(set(re.findall(rf"\b(?:{PREFIXES})_[A-Z0-9_]+[A-Z0-9]\b", "\n".join(SOURCES))))
# Which processes there are, and on which device, is the launcher's business.
PROCESSES = {"ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_DEBUG_RDV_FILE"}
VALUES = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "eager", "ACCELERATE_LOG_LEVEL": "ERROR"}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    return ["tiny", "--dataset", rows, "--max-steps", "3", "--val-fraction", "0.3", "--sample-max-new-tokens", "8"]


def test_whatever_the_launcher_sets_the_bits_are_the_same(command, tmp_path):
    """All variables at once; those that act in another place are named."""
    assert {*DECIDED_HERE, *UNSUPPORTED} <= {*VARIABLES} and len(VARIABLES) > 60
    assert run([*command, "--output-dir", tmp_path / "plain"], log=tmp_path / "log").codes == [0]
    harmless = [name for name in VARIABLES if name not in PROCESSES | UNSUPPORTED.keys()]
    environment = {name: VALUES.get(name, "8" if name.endswith(("STEPS", "SIZE")) else "true") for name in harmless}
    outcome = run([*command, "--output-dir", tmp_path / "set"], log=tmp_path / "log", **environment)
    assert outcome.codes == [0], outcome.output
    assert_same_end(tmp_path / "set", tmp_path / "plain")
    for name in DECIDED_HERE:
        assert f"warning: {name}={environment[name]}, set by the launcher" in outcome.output
    assert "one process on cpu; threads: 1; mixed precision: no; compile: off" in outcome.output


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(command, name, tmp_path):
    args = [*command, "--output-dir", tmp_path / "run"]
    outcome = run(args, "one", "kill_in_loading()", tmp_path / "log", **{name: "true"})
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    assert f"{name}=true" in outcome.output and "not supported" in outcome.output


def test_threads_are_the_cores_of_a_process_unless_a_number_was_set(monkeypatch):
    """The launcher sets OMP_NUM_THREADS=1 if nobody did; who is asked is its own environment, the parent's."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert num_threads() is None  # not launched
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    read = {"environ": b"PATH=/bin\0", "cmdline": b"accelerate\0launch\0train.py"}
    monkeypatch.setattr(Path, "read_bytes", lambda path: read[path.name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert num_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert num_threads() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    read["environ"] = b"PATH=/bin\0OMP_NUM_THREADS=1\0"
    assert num_threads() is None
    read["environ"], read["cmdline"] = b"", b"accelerate\0launch\0--num_cpu_threads_per_process\0001\0train.py"
    assert num_threads() is None
