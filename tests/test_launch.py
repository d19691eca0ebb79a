"""Real launchers: signals, two processes, two nodes, the configuration files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, good_row
from ranks import Ranks, run
from runs import assert_same_end, metrics_of, status_of

pytestmark = pytest.mark.integration

ARGS = ["tiny", "--max-steps", "60", "--val-fraction", "0.3", "--eval-steps", "60", "--save-steps", "1000"]
ARGS += ["--logging-steps", "1", "--max-length", "192", "--early-stopping-patience", "0", "--learning-rate", "1e-4",
         "--sample-max-new-tokens", "8"]  # fmt: skip
# As in the forks, whose preset is smaller.
ARGS += ["--per-device-train-batch-size", "1", "--per-device-eval-batch-size", "4"]
TWO = ["--config_file", "loop/launch/ddp.yaml", "--num_processes", "2"]


@pytest.fixture(scope="module")
def command(small_folder, tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    return [*ARGS, "--dataset", rows, "--model", small_folder]


class Launch:
    """`accelerate launch ... train.py ...` in a process group of its own."""

    def __init__(self, launcher: list, args: list, log):
        self.log = log
        self.out = args[args.index("--output-dir") + 1]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "accelerate.commands.launch", *launcher, "train.py", *map(str, args)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            lines = (self.out / "metrics.jsonl").read_bytes().splitlines() if self.trains() else []
            if lines and json.loads(lines[-1] if lines[-1].endswith(b"}") else lines[-2])["step"] >= step:
                return
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def trains(self) -> bool:
        """Whether the run that the folder tells of is one of this launcher's."""
        try:
            status = status_of(self.out)
        except (OSError, ValueError):
            return False
        workers = {process.pid for process in self.workers()}
        return status["status"] == "running" and status["pid"] in workers

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self, workers: list[psutil.Process]) -> None:
        """Until launcher and workers are gone; none may go on training."""
        self.process.wait(60)
        _, alive = psutil.wait_procs(workers, timeout=60)
        alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        assert not alive, self.log.read_text()
        assert "Traceback" not in self.log.read_text().split("stopping after this step")[0]

    def interrupted_at(self, step: int, interrupt) -> int:
        """Has interrupt() end it after `step` steps; returns how far it came."""
        self.wait_for_step(step)
        workers = self.workers()
        interrupt()
        self.wait(workers)
        status = status_of(self.out)
        assert status["status"] == "interrupted" and step <= status["step"] < status["max_steps"], self.log.read_text()
        assert (self.out / f"checkpoints/step-{status['step']:08d}").is_dir()
        return status["step"]


def test_one_process_stops_with_a_checkpoint_however_it_is_asked(command, tmp_path):
    """SIGTERM to the launcher, which forwards none and would leave an orphan; Ctrl+C; a STOP file."""
    out = tmp_path / "run"
    args = [*command, "--output-dir", out, "--resume"]
    launch = Launch(["--num_processes", "1"], args, tmp_path / "log")
    step = launch.interrupted_at(5, lambda: launch.process.terminate())
    launch = Launch(["--num_processes", "1"], args, tmp_path / "log")
    step = launch.interrupted_at(step + 5, lambda: os.killpg(launch.process.pid, signal.SIGINT))
    ranks = Ranks(args, log=tmp_path / "end")
    while status_of(out)["status"] != "running" or metrics_of(out)[-1]["step"] < step + 5:
        assert ranks.processes[0].exitcode is None, ranks.output()
        time.sleep(0.02)
    (out / "STOP").touch()
    assert ranks.wait().codes == [0] and status_of(out)["status"] == "interrupted" and not (out / "STOP").exists()
    assert run(args, log=tmp_path / "end").codes == [0]
    args[args.index(out)] = tmp_path / "whole"
    assert run(args, log=tmp_path / "end").codes == [0]
    assert_same_end(out, tmp_path / "whole")


def test_a_queue_that_ends_the_job_begins_it_again(command, tmp_path):
    """The script for SLURM, with stand-ins for srun and scontrol; the first job has no time."""
    requeued, out = tmp_path / "requeued", tmp_path / "run"
    for name, body in {"srun": 'exec "$@"', "scontrol": f'echo "$@" > {requeued}'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = ["bash", "loop/launch/slurm.sh", *command, "--max-steps", "2", "--output-dir", out]
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "17"}
    for more, status in ((["--max-time", "1e-6"], "interrupted"), ([], "completed")):
        requeued.unlink(missing_ok=True)
        done = subprocess.run([*map(str, job), *more], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not re.search("torchao|pytree|not passed to", done.stderr), done.stderr  # what libraries could say
        assert status_of(out)["status"] == status
        assert (requeued.read_text() if requeued.exists() else "") == (
            "requeue 17\n" if status == "interrupted" else ""
        )


def test_two_processes_stop_with_a_checkpoint(command, tmp_path):
    """A signal to the launcher, which passes it on to both; test_interrupt.py has one to one rank alone."""
    out = tmp_path / "run"
    args = [*command, "--gradient-accumulation-steps", "2", "--output-dir", out, "--resume"]
    launch = Launch(TWO, args, tmp_path / "log")

    launch.interrupted_at(5, lambda: launch.process.terminate())
    assert set(run(args, "ddp2", log=tmp_path / "end").codes) == {0}
    args[args.index(out)] = tmp_path / "whole"
    assert set(run(args, "ddp2", log=tmp_path / "end").codes) == {0}
    assert_same_end(out, tmp_path / "whole")


def test_two_nodes_train_one_model(command, tmp_path):
    """Two launchers of one process each, as on two machines that share a folder."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [*command, "--gradient-accumulation-steps", "2", "--max-steps", "20", "--output-dir"]
    nodes = [
        Launch(
            ["--config_file", "loop/launch/ddp.yaml", "--num_machines", "2", "--num_processes", "2", "--machine_rank",
             str(node), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--rdzv_backend", "static"],
            [*args, tmp_path / "run"],
            tmp_path / f"log-{node}",
        )
        for node in range(2)
    ]  # fmt: skip
    assert [node.process.wait(120) for node in nodes] == [0, 0], nodes[0].log.read_text() + nodes[1].log.read_text()
    assert set(run([*args, tmp_path / "whole"], "ddp2", log=tmp_path / "end").codes) == {0}
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert len(metrics_of(tmp_path / "run")) == 23


def test_fsdp_without_gpus_is_refused_by_name(command, tmp_path):
    """The file reaches train.py as FSDP2; where it cannot be had nothing else is trained instead."""
    launcher = ["--config_file", "loop/launch/fsdp2.yaml", "--num_processes", "1", "--num_machines", "1"]
    launch = Launch(launcher, [*command, "--output-dir", tmp_path / "run"], tmp_path / "log")
    assert launch.process.wait(90) != 0
    assert "asked for FSDP, but it is not active" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_several_machines_get_the_same_fsdp_as_one():
    """What accelerate makes of both files."""
    asked = {}
    for file in ("fsdp2.yaml", "multi_node.yaml"):
        flags = ["--config_file", str(ROOT / "loop/launch" / file), "--num_processes", "2", "train.py"]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(flags))
        environment = prepare_multi_gpu_env(args)
        asked[file] = {name: value for name, value in environment.items() if "FSDP" in name}
    assert asked["fsdp2.yaml"] == asked["multi_node.yaml"]
    assert asked["fsdp2.yaml"]["ACCELERATE_USE_FSDP"] == "true" and asked["fsdp2.yaml"]["FSDP_VERSION"] == "2"


def test_the_memory_table_of_the_docs():
    """16 bytes a parameter, of models that are built from their real shapes, without memory."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    shapes = {
        "1.7B": (2048, 28, 16, 6144, True),
        "4B": (2560, 36, 32, 9728, True),
        "8B": (4096, 36, 32, 12288, False),
        "14B": (5120, 40, 40, 17408, False),
    }
    for readme in ("docs/speed.md", "docs/zh/speed.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        for name, (hidden, layers, heads, intermediate, tied) in shapes.items():
            config = Qwen3Config(
                vocab_size=151936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=8, head_dim=128, intermediate_size=intermediate, tie_word_embeddings=tied,
            )  # fmt: skip
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            count = sum(parameter.numel() for parameter in model.parameters())
            sizes = " | ".join(f"{16 * count / ranks / 2**30:.1f}" for ranks in (1, 2, 4, 8, 16))
            assert f"| Qwen3-{name} | {count:,} | {sizes} |" in text, (readme, name, count, sizes)
