"""The command line: presets, files, flags, and every mistake answered by one message."""

import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import good_row
from ranks import run
from runs import status_of

from loop.config import PRESETS, TrainConfig
from loop.record.progress import Progress
from loop.start.command_line import parse_config
from loop.start.resolve import choose_precision


def refused(train_py, *args, **env) -> str:
    """What a mistake prints: exit status 2, no traceback, nothing on stdout."""
    done = train_py(*args, check=False, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.replace("│", " ").split())


def told(args, tmp_path, fault="", **env) -> str:
    """The same where torch is needed to find the mistake."""
    outcome = run(args, "one", fault, tmp_path / "log", **env)
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    return outcome.output


def test_later_wins(tmp_path):
    file = tmp_path / "中文 名.yaml"
    file.write_text(
        "learning_rate: 2e-5\nseed: 7\nresume: true\nmax-grad-norm: 0.5\noutput_dir: 输出 一\nmax_steps: -1\n"
    )
    config = parse_config(["tiny", "--config", str(file), "--seed", "8", "--max_grad_norm=0.25", "--no-resume"])
    expected = {"learning_rate": 2e-5, "seed": 8, "max_grad_norm": 0.25, "resume": False, "output_dir": "输出 一"}
    assert config == dataclasses.replace(PRESETS["tiny"], **expected)
    assert parse_config([]) == TrainConfig()


def test_values_as_people_write_them_in_yaml(tmp_path):
    """Nothing is the default, a bare no is the choice `no`, a ~ is the home folder."""
    file = tmp_path / "run.yaml"
    file.write_text("system_prompt:\nrun_name: ~\nmixed_precision: no\ncompile: off\noutput_dir: ~/runs/first\n")
    config, plain = parse_config(["medical", "--config", str(file)]), TrainConfig()
    assert (config.system_prompt, config.run_name) == (plain.system_prompt, plain.run_name)
    assert (config.mixed_precision, config.compile) == ("no", "off")
    assert config.output_dir == str(Path.home() / "runs/first")
    assert parse_config(["--output-dir", "~/a"]).output_dir == str(Path.home() / "a")


def test_the_experiment_as_it_was_run():
    c = TrainConfig()
    assert (c.model, c.dataset) == ("Qwen/Qwen3-1.7B", ("krisfu/delicate_medical_r1_data",))
    assert (c.max_length, c.val_fraction, c.num_train_epochs, c.learning_rate) == (2048, 0.1, 2, 1e-4)
    assert (c.per_device_train_batch_size, c.gradient_accumulation_steps, c.per_device_eval_batch_size) == (1, 4, -1)
    assert (c.lr_scheduler_type, c.warmup_ratio, c.weight_decay, c.max_grad_norm) == ("linear", 0, 0, 1.0)
    assert (c.gradient_checkpointing, c.mixed_precision, c.seed) == ("auto", "auto", 42)
    assert (c.eval_steps, c.early_stopping_patience, c.early_stopping_min_delta) == (100, 3, 0)
    assert (c.logging_steps, c.save_steps, c.save_total_limit) == (10, 400, 2)
    assert (c.swanlab_project, c.run_name) == ("qwen3-sft-medical", "qwen3-1.7b")
    assert c.output_dir == "outputs/qwen3-1.7b-medical"


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--learning-rat", "3"], ["--learning-rat", "--learning-rate"]),
        (["--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
        (["--lr-scheduler-type", "liner"], ["'liner'", "linear"]),
        (["tinny"], ["no preset 'tinny'", "'tiny'"]),
        (["--config"], ["--config needs"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--eval-steps", "0"], ["eval_steps", "at least 1", "not 0"]),
        (["--val-fraction", "1.5"], ["val_fraction", "1.5"]),
        (["--learning-rate", "nan"], ["learning_rate", "nan"]),
        (["--seed", "20250601123456"], ["seed", "4,294,967,296"]),
        (["--max-time", "-1"], ["max_time", "at least 0"]),
        (["--max-steps", "3", "tiny"], ["the preset comes first: train.py tiny --max-steps 3"]),
        (["--resume", "tiny"], ["the preset comes first: train.py tiny --resume"]),
    ],
)
def test_a_wrong_command_line_is_one_message(train_py, args, wanted):
    message = refused(train_py, *args)
    assert all(word in message for word in wanted), message
    assert refused(train_py, *args, RANK="1") == ""  # said once, whatever the number of processes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("learning_rat: 3", ["'learning_rat'", "'learning_rate'"]),
        ("learning_rate: fast", ["learning_rate", "'fast'", "float"]),
        ("seed: true", ["seed", "True", "int"]),
        ("lr_scheduler_type: liner", ["'liner'", "linear"]),
        ("save_total_limit: 1", ["save_total_limit", "at least 2"]),
        ("- a list", ["setting: value"]),
        ("a: [", ["cannot read"]),
    ],
)
def test_a_wrong_yaml_file_is_one_message_with_its_name(train_py, tmp_path, text, wanted):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refused(train_py, "tiny", "--config", file)
    assert all(word in message for word in ["run.yaml", *wanted]), message


def test_help_is_quick_and_heavy_imports_wait(train_py):
    shown = train_py("--help").stdout
    assert "--gradient-accumulation-steps" in shown and "---" not in shown.replace("─", "-").replace("----", "")
    code = (
        "import sys, train; train.parse_config(['tiny']); print({'torch', 'transformers', 'swanlab'} & {*sys.modules})"
    )
    done = train_py(launcher=(sys.executable, "-c", code))
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["model", "dataset"])
def test_what_is_not_there_is_named(tmp_path, name):
    message = told(["tiny", "--output-dir", tmp_path / "out", f"--{name}", "nowhere.jsonl"], tmp_path)
    assert "nowhere.jsonl" in message and "ModelScope" in message


def test_a_folder_that_is_no_model(tmp_path):
    assert "no config.json" in told(["tiny", "--output-dir", tmp_path / "out", "--model", tmp_path], tmp_path)


def test_modelscope_out_of_reach_is_one_message(tmp_path):
    """Nothing listens on that port: what a machine without network meets, only sooner."""
    out = tmp_path / "out"
    message = told(["--output-dir", out], tmp_path, MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert "krisfu/delicate_medical_r1_data" in message and "train.py tiny" in message
    assert not any(out.rglob("*.json*"))


def test_a_word_that_is_a_value_is_no_preset():
    assert parse_config(["--run-name", "tiny"]).run_name == "tiny"


def test_a_project_that_swanlab_would_refuse(tmp_path):
    args = ["tiny", "--swanlab-project", "医疗 微调", "--swanlab-mode", "offline", "--output-dir", tmp_path / "out"]
    assert "--swanlab-project '医疗 微调'" in told(args, tmp_path) and not (tmp_path / "out/data").exists()


def test_what_the_disk_cannot_hold_is_refused_before_a_weight_is_loaded(tmp_path):
    """--dry-run says it and goes on."""
    args = ["tiny", "--max-steps", "9", "--save-steps", "1", "--output-dir", tmp_path / "out"]
    fault = "(disk_of(0.005), kill_in_loading())"
    outcome = run(args, "one", fault, tmp_path / "log")
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    assert "--save-total-limit" in outcome.output and "0.0 GB free" in outcome.output
    dry = run([*args, "--dry-run"], "one", fault, tmp_path / "log")
    assert dry.codes == [0] and "not enough" in dry.output


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_a_terminal_that_lacks_characters(encoding, tmp_path, jsonl):
    """What it cannot show stands there as a number; the run ends as any other."""
    rows = jsonl([{**good_row(i), "question": f"头晕🙂{i}？"} for i in range(12)], "数据.jsonl")
    args = ["tiny", "--dataset", rows, "--max-steps", "1", "--sample-max-new-tokens", "8", "--output-dir"]
    outcome = run([*args, tmp_path / "输出"], log=tmp_path / "log", STDIO=encoding)
    assert outcome.codes == [0] and status_of(tmp_path / "输出")["status"] == "completed"
    assert (tmp_path / "输出/report.md").exists()


def test_a_file_name_that_is_no_utf8(tmp_path, jsonl):
    name = os.fsdecode(b"\xd2\xbd\xc1\xc6.jsonl")
    rows = jsonl([good_row(i) for i in range(12)], name)
    args = ["tiny", "--dataset", rows, "--max-steps", "1", "--num-samples", "0", "--output-dir", tmp_path / "out"]
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [0] and status_of(tmp_path / "out")["status"] == "completed", outcome.output


def test_a_dry_run_names_no_file_that_it_does_not_write(tmp_path, jsonl):
    rows = jsonl([good_row(i // 2) for i in range(40)])
    outcome = run(["tiny", "--dataset", rows, "--dry-run"], log=tmp_path / "log")
    assert outcome.codes == [0] and "more, which a run lists in data_report.json" in outcome.output


def test_rows_longer_than_the_models_positions(tmp_path):
    outcome = run(["tiny", "--max-length", "2000", "--dry-run"], log=tmp_path / "log")
    assert outcome.codes == [0] and "--max-length 2000 is more than the 1024 positions" in outcome.output


def test_without_what_only_linux_has(tmp_path):
    """Windows has no fcntl, resource, SIGHUP, sysconf or sched_getaffinity, and opens no folders."""
    args = ["tiny", "--max-steps", "1", "--num-samples", "0", "--output-dir", tmp_path / "out"]
    outcome = run(args, "one", "as_on_windows()", tmp_path / "log")
    assert outcome.codes == [0] and status_of(tmp_path / "out")["status"] == "completed", outcome.output


def test_the_precision_is_what_the_device_has_and_stays_that_of_the_run(tmp_path):
    """AVX2 emulates bf16: fp32 there, and a run that began in bf16 goes on so, with a warning."""
    args = ["tiny", "--mixed-precision", "auto", "--num-samples", "0", "--max-steps", "6", "--resume", "--output-dir"]
    for before, after in (("AVX512", "AVX2"), ("AVX2", "AVX512")):
        out, precision = tmp_path / before, "bf16" if before == "AVX512" else "no"
        stop = f"(capability('{before}'), signal_in_step(2))"
        first = run([*args, out], "one", stop, tmp_path / "log")
        assert first.codes == [0] and f"mixed precision: {precision}" in first.output, first.output
        assert json.loads((out / "run.json").read_text())["mixed_precision"] == precision
        second = run([*args, out], "ddp2", f"capability('{after}')", tmp_path / "log")
        assert second.codes == [0, 0] and f"mixed precision: {precision}" in second.output, second.output
        assert ("emulates bf16" in second.output) == (after == "AVX2")
    fault = "capability('AVX2' if rank() else 'AVX512')"
    mixed = run([*args, tmp_path / "mixed"], "ddp2", fault, tmp_path / "log")
    assert set(mixed.codes) == {2} and "some processes have bf16 and some have not" in mixed.output


def test_auto_takes_bf16_from_ampere_on(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for capability, precision in {(7, 5): "no", (8, 0): "bf16", (9, 0): "bf16"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, capability=capability: capability)
        assert choose_precision(TrainConfig()).mixed_precision == precision
        assert choose_precision(TrainConfig(mixed_precision="bf16")).mixed_precision == "bf16"
    # The host's CPU says nothing of another accelerator.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    for available in (True, False):
        monkeypatch.setattr("loop.start.resolve.is_bf16_available", lambda available=available: available)
        assert choose_precision(TrainConfig()).mixed_precision == ("bf16" if available else "no")


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_device_without_fp64(mixed_precision, tmp_path):
    """Training, evaluation, checkpoint, export and answers, through the command line."""
    args = ["tiny", "--max-steps", "2", "--eval-steps", "1", "--save-steps", "1", "--sample-max-new-tokens", "4"]
    args += ["--mixed-precision", mixed_precision, "--output-dir", tmp_path / "out"]
    outcome = run(args, "one", "refuse_fp64()", tmp_path / "log")
    assert outcome.codes == [0] and status_of(tmp_path / "out")["status"] == "completed", outcome.output
    fault = (
        "(refuse_fp64(), before(__import__('loop.evaluate').evaluate, 'score', __import__('torch').zeros(1).double))"
    )
    assert run([*args[:-1], tmp_path / "other"], "one", fault, tmp_path / "log").codes == [1]  # it does refuse


def test_the_bar_fits_into_80_columns(monkeypatch):
    """With the most that it has to show."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    progress = Progress(100_000, 99_998)
    progress.stepped(num_tokens=1)
    row = {"train/loss": 12.34567, "train/learning_rate": 1.23456e-05, "perf/tokens_per_s": 123_456.7}
    progress.show(99_999, row)
    progress.bar.refresh()
    progress.bar.close()
    shown = [line.rstrip() for line in terminal.getvalue().replace("\r", "\n").splitlines()]
    assert max(map(len, shown)) <= 80
    assert "99999/100000" in shown[-1] and "loss=12.3457, lr=1.23e-05, tokens_per_s=123,457" in shown[-1], shown


def test_a_package_that_fails_is_not_called_missing(tmp_path):
    """A peft that cannot be imported because of something else, and one that is not there."""
    args = ["tiny", "--lora-rank", "2", "--max-steps", "1", "--output-dir", tmp_path / "out"]
    broken = told(args, tmp_path, fault="cannot_import('peft', 'socksio is not installed')")
    assert "socksio is not installed" in broken and "pip install" not in broken
    assert 'pip install -e ".[lora]"' in told(args, tmp_path, fault="cannot_import('peft')")


def test_dry_run_shows_everything_and_writes_nothing(train_py, tmp_path):
    out = tmp_path / "out"
    done = train_py("tiny", "--dry-run", "--language", "en", "--output-dir", out, FORCE_COLOR="1", NO_COLOR=None)
    shown = yaml.safe_load(done.stdout.split("\ndata  ")[0])
    acts = {"memory": "speed", "gradient_checkpointing": "off", "micro_batch_tokens": 16384, "compile": "off"}
    acts |= {"max_steps": 2160, "swanlab_mode": "disabled", "dry_run": True, "output_dir": str(out)}
    acts |= {"dataset": ["sample"], "per_device_train_batch_size": 2, "language": "en"}
    preset = json.loads(json.dumps(dataclasses.asdict(PRESETS["tiny"])))
    assert shown == preset | acts  # no "auto" is left
    assert "2,160 optimizer steps of 8 rows" in done.stdout and "800 rows read" in done.stdout
    assert "--- think: " in done.stdout and "<|im_end|>" in done.stdout
    assert "\033[33m<think>" in done.stdout and "\033[32m" in done.stdout
    assert not out.exists()
