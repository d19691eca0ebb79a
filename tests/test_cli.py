"""The command line: presets, files, flags, and every mistake answered by one message."""

import dataclasses
import sys

import pytest
import yaml
from ranks import run

from loop.command_line import parse_config
from loop.config import PRESETS, TrainConfig


def refused(train_py, *args, **env) -> str:
    """What a mistake prints: exit status 2, no traceback, nothing on stdout."""
    done = train_py(*args, check=False, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.replace("│", " ").split())


def told(args, tmp_path, **env) -> str:
    """The same where torch is needed to find the mistake."""
    outcome = run(args, log=tmp_path / "log", **env)
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


def test_the_experiment_as_it_was_run():
    c = TrainConfig()
    assert (c.model, c.dataset) == ("Qwen/Qwen3-1.7B", "krisfu/delicate_medical_r1_data")
    assert (c.max_length, c.val_fraction, c.num_train_epochs, c.learning_rate) == (2048, 0.1, 2, 1e-4)
    assert (c.per_device_train_batch_size, c.gradient_accumulation_steps, c.per_device_eval_batch_size) == (1, 4, 1)
    assert (c.lr_scheduler_type, c.warmup_ratio, c.weight_decay, c.max_grad_norm) == ("linear", 0, 0, 1.0)
    assert (c.gradient_checkpointing, c.mixed_precision, c.seed) == ("auto", "bf16", 42)
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
    assert "--gradient-accumulation-steps" in train_py("--help").stdout
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


def test_dry_run_shows_everything_and_writes_nothing(train_py, tmp_path):
    out = tmp_path / "out"
    done = train_py("tiny", "--dry-run", "--output-dir", out, FORCE_COLOR="1", NO_COLOR=None)
    shown = yaml.safe_load(done.stdout.split("\ndata  ")[0])
    acts = {"memory": "speed", "gradient_checkpointing": "off", "micro_batch_tokens": 16384, "compile": "off"}
    acts |= {"max_steps": 648, "swanlab_mode": "disabled", "dry_run": True, "output_dir": str(out)}
    assert shown == dataclasses.asdict(PRESETS["tiny"]) | acts  # no "auto" is left
    assert "648 optimizer steps of 4 rows" in done.stdout and "120 rows read" in done.stdout
    assert "--- think: " in done.stdout and "<|im_end|>" in done.stdout
    assert "\033[33m<think>" in done.stdout and "\033[32m\n\n" in done.stdout
    assert not out.exists()
