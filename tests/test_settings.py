"""Every setting acts: changed alone, something else is planned, printed, trained or written."""

import dataclasses
import json
import re

import pytest
from conftest import good_row
from ranks import run
from runs import curve

from data.replies import reply_row
from data.template import generation_prompt
from loop.config import TrainConfig
from model.qwen3 import load_tokenizer

pytestmark = pytest.mark.integration
ARGS = "tiny --max-steps 2 --eval-steps 1 --logging-steps 1 --save-steps 1 --num-samples 0 --sample-max-new-tokens 40 "
ARGS += "--max-length 96 --val-fraction 0.3"
# setting -> (flags of both runs, flags of the second one); {x} is a file of the folder.
CHANGES = {
    "dataset": ("", "--dataset {other}"),
    "columns": ("", "--columns think=note"),
    "system_prompt": ("", "--system-prompt 简短回答。"),
    "max_length": ("", "--max-length 36"),
    "overlong": ("--max-length 39", "--overlong drop"),
    "val_fraction": ("", "--val-fraction 0.5"),
    "split_seed": ("", "--split-seed 7"),
    "val_dataset": ("", "--val-dataset {other}"),
    "test_fraction": ("", "--test-fraction 0.2"),
    "exclude": ("", "--exclude {exam}"),
    "train_liked": ("--dataset {rows} {liked}", "--train-liked"),
    "group_by": ("", "--group-by dep"),
    "model": ("", "--model {small}"),
    "lora_rank": ("", "--lora-rank 2"),
    "frozen": ("--lora-rank 2", "--frozen nf4"),
    "mixed_precision": ("", "--mixed-precision bf16"),
    "memory": ("", "--memory 32g"),
    "gradient_checkpointing": ("", "--gradient-checkpointing on"),
    "compile": ("--max-steps 1", "--compile loss"),
    "step_file": ("", "--step-file recipes/layerwise_lr.py"),
    "step_set": ("--step-file recipes/layerwise_lr.py", "--step-set DECAY=0.5"),
    "per_device_train_batch_size": ("", "--per-device-train-batch-size 3"),
    "gradient_accumulation_steps": ("", "--gradient-accumulation-steps 2"),
    "micro_batch_tokens": ("", "--micro-batch-tokens 60"),
    "think_weight": ("", "--think-weight 0"),
    "answer_weight": ("", "--answer-weight 0.5"),
    "learning_rate": ("", "--learning-rate 1e-4"),
    "lr_scheduler_type": ("", "--lr-scheduler-type cosine"),
    "warmup_ratio": ("", "--warmup-ratio 0.9"),
    "weight_decay": ("", "--weight-decay 0.9"),
    "max_grad_norm": ("", "--max-grad-norm 0.01"),
    "num_train_epochs": ("--max-steps -1 --num-train-epochs 1", "--num-train-epochs 2"),
    "max_steps": ("", "--max-steps 1"),
    "seed": ("", "--seed 7"),
    "eval_steps": ("", "--eval-steps 2"),
    "think_probe": ("", "--think-probe"),
    "exam": ("", "--exam {exam}"),
    "exam_steps": ("--exam {exam}", "--exam-steps 2"),
    "forget": ("--model {small}", "--forget {forget}"),
    "early_stopping_patience": (
        "--max-steps 3 --warmup-ratio 0 --early-stopping-min-delta 9",
        "--early-stopping-patience 1",
    ),
    "early_stopping_min_delta": (
        "--max-steps 3 --warmup-ratio 0 --early-stopping-patience 1",
        "--early-stopping-min-delta 9",
    ),
    "num_samples": ("", "--num-samples 1"),
    "sample_budget": ("--num-samples 1", "--sample-budget 1e-6"),
    "sample_max_new_tokens": ("--num-samples 1 --max-steps 60 --eval-steps 60", "--sample-max-new-tokens 1"),
    "output_dir": ("", "--output-dir {rows}-elsewhere"),
    "logging_steps": ("", "--logging-steps 2"),
    "save_steps": ("", "--save-steps 2"),
    "save_total_limit": ("--max-steps 3", "--save-total-limit 3"),
    "language": ("", "--language en"),
    "swanlab_project": ("--swanlab-mode offline", "--swanlab-project other"),
    "run_name": ("", "--run-name other"),
    "swanlab_mode": ("", "--swanlab-mode offline"),
    "max_time": ("", "--max-time 1e-9"),
    "resume": ("--max-time 1e-9", "--resume"),
    "dry_run": ("", "--dry-run"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_folder):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{**good_row(i), "dep": f"科{i % 2}", "note": f"另想{i}。"} for i in range(24)]
    messages = [{"role": "user", "content": "好吗？"}, {"role": "assistant", "content": "好。"}]
    choices = {"A": "甲", "B": "乙"}
    contents = {
        "rows": rows,
        "other": [{**row, "question": f"别的{row['question']}"} for row in rows],
        "exam": [{"question": row["question"], "option": choices, "answer": "B"} for row in rows[:6]],
        "liked": [{"id": "1", "verdict": "like", "messages": messages}, *rows[:9]],
    }
    tokenizer = load_tokenizer(str(small_folder))
    prompt = tokenizer(generation_prompt(messages[:1], tokenizer), add_special_tokens=False)["input_ids"]
    contents["forget"] = [reply_row(messages[:1], prompt, [7, 8, n], tokenizer) for n in (9, 10, 11)]
    for name, lines in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in contents} | {"small": small_folder}


@pytest.fixture(scope="module")
def baselines():
    """What came of a run with some flags of CHANGES, made once."""
    return {}


def what_came_of(out, output: str) -> tuple:
    """All that a person can see, without times and without the settings as such."""
    texts = {
        str(path.relative_to(out)): path.read_text(encoding="utf-8")
        for path in sorted(out.rglob("*"))
        if path.suffix in (".jsonl", ".md") and path.name != "metrics.jsonl" and "swanlog" not in path.parts
    }
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if "swanlog" not in path.parts)
    texts["files"] = "\n".join([*files, *(["swanlog"] if (out / "swanlog").exists() else [])])
    shown = re.sub(r"\d+\.\d+ (?:of|GB)|tokens_per_s=\S+|eta=\S+|peak memory.*|sha256 \w+", "", output)
    rates = [[row, row.get("train/grad_norm")] for row in (curve(out) if (out / "metrics.jsonl").exists() else [])]
    return {name: re.sub(r"\d{4}-\d\d-\d\dT\S+|\d:\d\d:\d\d|`python.*|.*(?:GiB|内存|速度|speed).*", "", text)
            for name, text in texts.items()}, shown.replace(str(out), "OUT"), json.dumps(rates)  # fmt: skip


def test_every_setting_is_tried():
    """But for one that changes no figure: test_score.py counts the forwards by it."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == {*CHANGES, "per_device_eval_batch_size"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_acts(name, files, baselines, tmp_path):
    both, changed = (text.format(**files).split() for text in CHANGES[name])
    found = [baselines[" ".join(both)]] if " ".join(both) in baselines and name != "resume" else []
    for more in ([], changed)[len(found) :]:
        out = tmp_path / "run"
        args = [*ARGS.split(), "--output-dir", out, "--dataset", files["rows"], *both, *more]
        if name == "resume" and more:
            args = [arg for arg in args if arg not in ("--max-time", "1e-9")]
        outcome = run(args, log=tmp_path / "log", SWANLAB_MODE=None if "--swanlab-mode" in args else "disabled")
        assert outcome.codes == [0], outcome.output
        found.append(what_came_of(out, outcome.output) if out.exists() else None)
        if not more:
            baselines[" ".join(both)] = found[0]
        if name not in ("resume", "output_dir") and out.exists():
            out.rename(tmp_path / f"run-{len(found)}")
    assert found[0] != found[1]


def test_the_same_command_gives_the_same(files, tmp_path):
    """Or the test above could not fail."""
    found = []
    for _ in range(2):
        out = tmp_path / "run"
        outcome = run([*ARGS.split(), "--output-dir", out, "--dataset", files["rows"]], log=tmp_path / "log")
        assert outcome.codes == [0], outcome.output
        found.append(what_came_of(out, outcome.output))
        out.rename(tmp_path / f"before-{len(found)}")
    assert found[0] == found[1]
