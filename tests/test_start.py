"""A run can always begin or go on, on every launch that the README names, and nothing good is replaced."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, good_row
from ranks import run
from runs import assert_same_end, metrics_of, status_of
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from model.export import header_of
from model.tiny import tiny_tokenizer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(40)), encoding="utf-8")
    return ["tiny", "--dataset", path, "--max-steps", "8", "--eval-steps", "2", "--save-steps", "4", "--logging-steps",
            "1", "--num-samples", "1", "--sample-max-new-tokens", "4"]  # fmt: skip


def test_a_run_killed_before_its_first_checkpoint_begins_again(args, tmp_path):
    """And what it had made stays, however often that happens."""
    again = [*args, "--save-steps", "100", "--output-dir", tmp_path / "run", "--resume"]
    for _ in range(2):
        assert run(again, "one", "kill_in_step(5)", tmp_path / "log").codes == [-9]
    outcome = run(again, log=tmp_path / "log")
    assert outcome.codes == [0] and "begins again at step 0; what it had made is kept as" in outcome.output
    kept = sorted(path.name for path in (tmp_path / "run").iterdir() if "-of-" in path.name or "-until-" in path.name)
    assert [name.split(".")[0] for name in kept] == [
        "best-of-step-4", "best-of-step-4-2", "eval_rows-until-step-5-2", "eval_rows-until-step-5",
        "metrics-until-step-5-2", "metrics-until-step-5",
        "samples-until-step-5-2", "samples-until-step-5",
    ]  # fmt: skip
    assert header_of(tmp_path / "run/best-of-step-4")["step"] == 4
    whole = [*args, "--save-steps", "100", "--output-dir", tmp_path / "whole"]
    assert run(whole, log=tmp_path / "log").codes == [0]
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert len(json.loads((tmp_path / "run/run.json").read_text())["launches"]) == 3


def test_a_best_model_that_is_newer_than_the_checkpoint_is_not_replaced_by_a_worse_one(args, tmp_path):
    """Killed after the evaluation of step 6, with the checkpoint of step 4; then the rate is almost 0."""
    out = tmp_path / "run"
    more = [*args, "--output-dir", out, "--resume"]
    assert run(more, "one", "kill_in_step(7)", tmp_path / "log").codes == [-9]
    step, loss = (header_of(out / "best")[name] for name in ("step", "deciding_loss"))
    assert step == 6
    slow = tmp_path / "slow.py"
    text = (ROOT / "loop/step.py").read_text().replace('group["initial_lr"] * multiplier', 'group["initial_lr"] * 1e-6')
    slow.write_text(text)
    outcome = run([*more, "--step-file", slow], log=tmp_path / "log")
    assert outcome.codes == [0] and "best/ stays that of step 6" in outcome.output, outcome.output
    assert header_of(out / "best")["step"] == status_of(out)["best_step"] == 6
    assert header_of(out / "best")["deciding_loss"] == status_of(out)["best_loss"] == loss
    assert min(row["eval/loss"] for row in metrics_of(out) if "eval/loss" in row) > loss
    assert "`best/` 是第 6 步的模型" in (out / "report.md").read_text()
    assert {json.loads(line)["step"] for line in (out / "samples.jsonl").open() if '"best"' in line} == {6}


def test_machines_that_share_no_folder_are_refused(args, tmp_path):
    (tmp_path / "other").mkdir()
    more = [*args, "--output-dir", os.path.relpath(tmp_path / "run")]
    outcome = run(more, "ddp2", f"elsewhere({str(tmp_path / 'other')!r})", tmp_path / "log")
    assert 2 in outcome.codes and "process 1 does not see" in outcome.output and "Traceback" not in outcome.output


def test_under_ddp_the_main_process_answers_alone(args, tmp_path):
    outcome = run([*args, "--output-dir", tmp_path / "run"], "ddp2", "answers_on_main_alone()", tmp_path / "log")
    assert outcome.codes == [0, 0], outcome.output
    assert any("format/closed" in row for row in metrics_of(tmp_path / "run"))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Small folders of the other families that the README names."""
    sizes = dict(vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=True)  # fmt: skip
    tokenizer = tiny_tokenizer(["问题回答"])
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    folders = {}
    for name, kind, config in (("qwen2", Qwen2ForCausalLM, Qwen2Config), ("llama", LlamaForCausalLM, LlamaConfig)):
        folders[name] = tmp_path_factory.mktemp(name) / name
        torch.manual_seed(0)
        kind(config(**sizes, **ends)).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize(("strategy", "lora"), [("one", 2), ("ddp2", 0), ("fsdp2", 0), ("fsdp2", 2)])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_every_family_trains_on_every_launch(family, strategy, lora, families, args, tmp_path):
    more = ["--model", families[family], "--max-steps", "2", "--lora-rank", lora, "--output-dir", tmp_path / "run"]
    outcome = run([*args, *more], strategy, log=tmp_path / "log")
    assert set(outcome.codes) == {0}, outcome.output
    losses = [row["eval/loss"] for row in metrics_of(tmp_path / "run") if "eval/loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("where", ["| head -1", "> /dev/full"])
def test_a_run_goes_on_without_its_output(where, args, tmp_path):
    command = " ".join(
        map(str, [sys.executable, "train.py", *args, "--max-steps", 1, "--output-dir", tmp_path / "run"])
    )
    shell, env = ["bash", "-o", "pipefail", "-c"], {**os.environ, "SWANLAB_MODE": "disabled"}
    done = subprocess.run([*shell, f"{command} {where}"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert status_of(tmp_path / "run")["status"] == "completed" and (tmp_path / "run/report.md").exists()
    assert ("stdout cannot be written to" in done.stderr) == ("full" in where)


def test_a_script_can_ask_for_the_folder_of_a_run(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: from/file\n")
    cases = {
        ("better",): "outputs/qwen3-1.7b-medical-better",
        ("lora", "--output_dir", "x y"): "x y",
        ("--config", str(tmp_path / "run.yaml")): "from/file",
        ("tiny", "--output-dir=z", "--resume"): "z",
    }
    for arguments, folder in cases.items():
        command = [sys.executable, "-m", "loop.start.command_line", *arguments]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == folder + "\n"


def test_what_decides_is_the_loss_that_is_trained(args, tmp_path):
    """The weights of the loss, or a figure that the step file names; a name that is none is told."""
    outcome = run([*args, "--think-weight", "0", "--output-dir", tmp_path / "run"], log=tmp_path / "log")
    assert outcome.codes == [0], outcome.output
    rows = [row for row in metrics_of(tmp_path / "run") if "eval/loss" in row]
    report = json.loads((tmp_path / "run/data/data_report.json").read_text())["val"]
    share = report["answer_tokens"] / (report["think_tokens"] + report["answer_tokens"])
    for row in rows:
        assert row["eval/weighted_loss"] == pytest.approx(row["eval/answer_loss"] * share)
    best = min(rows, key=lambda row: row["eval/answer_loss"])
    assert status_of(tmp_path / "run")["best_step"] == best["step"]
    assert "`eval/weighted_loss`（思考权重 0.0，回答权重 1.0）" in (tmp_path / "run/report.md").read_text()
    for figure, code in (("eval/think_loss", 0), ("eval/nothing", 2)):
        own = tmp_path / "own.py"
        own.write_text((ROOT / "loop/step.py").read_text() + f'\n\nMETRIC_FOR_BEST_MODEL = "{figure}"\n')
        outcome = run([*args, "--step-file", own, "--output-dir", tmp_path / figure[5:]], log=tmp_path / "log")
        assert outcome.codes == [code] and "Traceback" not in outcome.output
    rows = [row for row in metrics_of(tmp_path / "think_loss") if "eval/loss" in row]
    best = min(rows, key=lambda row: row["eval/think_loss"])
    assert status_of(tmp_path / "think_loss")["best_loss"] == best["eval/think_loss"]
    assert "eval/nothing" in outcome.output and "eval/answer_loss" in outcome.output


def test_a_run_speaks_its_language(args, tmp_path):
    for language, word in (("zh", "训练完成：第 8 步"), ("en", "completed: step 8")):
        more = ["--language", language, "--output-dir", tmp_path / language]
        outcome = run([*args, *more], log=tmp_path / "log", CHINESE="1")
        assert outcome.codes == [0] and word in outcome.output, outcome.output
