"""Whole runs through the command line, as a user starts them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import good_row
from ranks import run
from runs import TIMES, files_of, metrics_of

from loop.record.checkpoint import checkpoints
from loop.samples import prompts
from model.generate import load_for_generation, reply_to

SHORT = ["tiny", "--max-steps", "12", "--eval-steps", "4", "--save-steps", "4", "--logging-steps", "3",
         "--sample-max-new-tokens", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run([*SHORT, "--output-dir", out], log=out.parent / "log")
    assert done.codes == [0], done.output
    return out, done.output


def test_what_a_run_leaves(finished):
    out, stdout = finished
    rows = metrics_of(out)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 4, 8, 12]
    assert [row["step"] for row in rows if "train/loss" in row] == [3, 6, 9, 12]
    evals = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert evals[0] > evals[-1] and rows[-2]["eval/best_loss"] == min(evals)
    last = [row for row in rows if "train/loss" in row][-1]
    assert {"train/think_loss", "train/answer_loss", "train/grad_norm", "train/learning_rate", *TIMES} <= last.keys()
    assert last["train/epoch"] == pytest.approx(12 / 27)
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000012", "step-00000008"]
    trainer = json.loads((out / "checkpoints/step-00000012/trainer.json").read_text())
    assert trainer["step"] == 12 and trainer["tokens_seen"] == last["train/tokens_seen"]
    assert trainer["best_loss"] == min(evals)
    assert "[answer]" in stdout and "12 answers of the best model: closed" in stdout
    assert {path.name for path in (out / "data").iterdir()} == {
        "train.jsonl", "val.jsonl", "train_format.jsonl", "val_format.jsonl", "data_report.json",
    }  # fmt: skip


def test_the_exported_folder_stands_alone(finished):
    """In a clean process, with transformers alone, the model has the evaluation loss that was reported."""
    out, _ = finished
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert model.dtype == torch.bfloat16, model.dtype
model = model.float()
loss = count = 0
for line in open(sys.argv[2]):
    row = json.loads(line)
    prompt = [{"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["input"]}]
    prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + row["output"] + "<|im_end|>")["input_ids"]])
    logits = model(ids).logits[0, start - 1 : -1]
    loss += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
    count += ids.shape[1] - start
g = model.generation_config
print(json.dumps([loss / count, g.eos_token_id, tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])]))
"""
    command = [sys.executable, "-c", code, str(out / "best"), str(out / "data/val_format.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr
    loss, ends, expected_ends = json.loads(done.stdout)
    assert loss == pytest.approx(metrics_of(out)[-2]["eval/best_loss"], abs=2e-3)  # bf16 weights
    assert ends == expected_ends
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= {
        path.name for path in (out / "best").iterdir()
    }


def test_a_finished_run_is_neither_overwritten_nor_changed(finished, tmp_path):
    out, _ = finished
    before = files_of(out)
    done = run([*SHORT, "--output-dir", out], log=tmp_path / "log")
    assert done.codes == [2] and "already holds a run" in done.output and "--resume" in done.output
    assert files_of(out) == before
    done = run([*SHORT, "--output-dir", out, "--resume"], log=tmp_path / "log")
    assert done.codes == [0] and "is finished" in done.output
    before.pop("data/data_report.json"), (after := files_of(out)).pop("data/data_report.json")
    assert after == before


def test_early_stopping_keeps_the_best(tmp_path):
    """A learning rate that ruins the model: the first evaluation stays the best, and it is what is exported."""
    out = tmp_path / "out"
    args = ["--learning-rate", "0.5", "--eval-steps", "1", "--early-stopping-patience", "2", "--warmup-ratio", "0"]
    done = run(["tiny", *args, "--num-samples", "0", "--output-dir", out], log=tmp_path / "log")
    assert done.codes == [0]
    evals = [row["eval/loss"] for row in metrics_of(out) if "eval/loss" in row]
    assert len(evals) == 3 and min(evals) == evals[0]
    assert "early stopped: step 2" in done.output and "at step 0" in done.output
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000002"]


def test_a_run_that_diverges_stops_and_names_the_rows(tmp_path):
    """A model whose weights hold a NaN: every gradient norm is NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, broken, good = tmp_path / "out", tmp_path / "broken", tmp_path / "good"
    assert run(["tiny", "--max-steps", "1", "--num-samples", "0", "--output-dir", good]).codes == [0]
    model = AutoModelForCausalLM.from_pretrained(good / "best")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(good / "best").save_pretrained(broken)
    args = ["tiny", "--model", broken, "--eval-steps", "100", "--output-dir", out]
    done = run(args, log=tmp_path / "log")
    assert done.codes == [2] and "Traceback" not in done.output
    assert "diverged" in done.output and "4 steps in a row" in done.output
    assert done.output.count("skipped, nothing updated") == 4 and "sample.jsonl:" in done.output
    assert not (out / "best").exists() and not checkpoints(out / "checkpoints")


def test_dialogues_and_rows_without_thinking_train(jsonl, tmp_path):
    turns = [
        {"role": "user", "content": "我发烧了。"},
        {"role": "assistant", "content": "多少度？", "reasoning_content": "先问体温。"},
        {"role": "user", "content": "三十八度五。"},
        {"role": "assistant", "content": "多喝水，注意休息。"},
    ]
    rows = [good_row(i) for i in range(10)] + [
        {"messages": [*turns[:2], {**turns[2], "content": f"{i}"}, turns[3]]} for i in range(10)
    ]
    out = tmp_path / "out"
    args = ["tiny", "--dataset", jsonl(rows), "--max-steps", "2", "--sample-max-new-tokens", "8", "--output-dir", out]
    done = run([*args, "--per-device-train-batch-size", "3"], log=tmp_path / "log")
    assert done.codes == [0]
    report = json.loads((out / "data/data_report.json").read_text())
    assert report["rows"] == 20 and report["without_thinking"] == 10 and report["unusable"] == 0
    assert "2 optimizer steps of 12 rows" in done.output


def test_swanlab_gets_the_same_numbers_offline(train_py, tmp_path):
    """No account, no network, no terminal: the run is written for a later `swanlab sync`."""
    out = tmp_path / "out"
    args = ["--max-steps", "2", "--logging-steps", "1", "--sample-max-new-tokens", "8",
            "--output-dir", out, "--swanlab-mode"]  # fmt: skip
    done = train_py("tiny", *args, "offline", SWANLAB_MODE=None, SWANLAB_PROJECT="名字", HOME=str(tmp_path))
    assert "swanlab sync" in done.stdout
    (folder,) = (out / "swanlog").glob("run-*")
    stored = b"".join(path.read_bytes() for path in folder.glob("*.swanlab"))
    assert (
        stored.count(b"train/loss") >= 2
        and b"eval/best_loss" in stored
        and b"samples/training" in stored
        and b"samples/best" in stored
    )
    args[args.index(out)] = tmp_path / "other"
    nobody = {"SWANLAB_MODE": None, "HOME": str(tmp_path / "nobody")}
    refusal = run(["tiny", *args, "online"], log=tmp_path / "log", **nobody)
    assert refusal.codes == [2] and "swanlab login" in refusal.output and not (tmp_path / "other/data").exists()


def test_replies_are_split_by_token_id(finished, split, monkeypatch):
    """One at a time, in one batch and in several; a prompt that fills the context gets an empty reply."""
    model, tokenizer = load_for_generation(finished[0] / "best", torch.device("cpu"))
    asked = prompts(split.val[:3], tokenizer)
    together = reply_to(model, tokenizer, asked, max_new_tokens=20)
    assert together == [reply_to(model, tokenizer, [prompt], max_new_tokens=20)[0] for prompt in asked]
    monkeypatch.setattr("model.generate.BATCH", 2)
    too_long = "长" * model.config.max_position_embeddings
    replies = reply_to(model, tokenizer, [*asked[:2], too_long, asked[2]], max_new_tokens=20)
    assert replies == [*together[:2], ("", "", False, False), together[2]]
    assert reply_to(model, tokenizer, [too_long], max_new_tokens=20) == [("", "", False, False)]

    from model.generate import split_reply

    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for text, expected in {
        "<think>\n想\n</think>\n\n答<|im_end|><|endoftext|>": ("想", "答", True, True),
        "<think>\n想": ("想", "", False, False),
        "<think>\n\n</think>\n\n答": ("", "答", True, False),
    }.items():
        assert split_reply(tokenizer(text)["input_ids"], tokenizer, ends) == expected


def test_an_export_interrupted_between_its_renames_is_put_back(finished, tmp_path):
    from model.export import restore_export

    best = tmp_path / "best"
    shutil.copytree(finished[0] / "best", tmp_path / ".old-best")
    restore_export(best)
    assert files_of(best) == files_of(finished[0] / "best")
    restore_export(best)
    assert not (tmp_path / ".old-best").exists()


@pytest.mark.slow
def test_transformers_4_computes_the_same_from_the_export(finished, tmp_path):
    """What an older vLLM brings, installed beside: the names of settings it knows, and the same logits.

    It needs a package index.
    """
    out, _ = finished
    best = tmp_path / "best"
    shutil.copytree(out / "best", best)
    config = json.loads((best / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 1e6  # as Qwen3-1.7B, not the default
    (best / "config.json").write_text(json.dumps(config))
    target = tmp_path / "packages"
    packages = ["transformers==4.57.6", "--target", str(target), "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *packages, "--no-deps"], check=True)
    more = ["tokenizers>=0.22,<0.23", "huggingface-hub>=0.34,<1", "--target", str(target), "--quiet", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", "install", *more], check=True)
    code = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).float()
ids = tokenizer("<|im_start|>user\\n头痛怎么办？<|im_end|>\\n", return_tensors="pt")["input_ids"].repeat(1, 8)
torch.save({"version": transformers.__version__, "ids": ids, "logits": model(ids).logits.detach()}, sys.argv[2])
"""
    found = {}
    for name, path in (("5", ""), ("4", str(target))):
        command = [sys.executable, "-c", code, str(best), str(tmp_path / name)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
        )
        assert done.returncode == 0, done.stderr
        found[name] = torch.load(tmp_path / name)
        assert found[name]["version"].startswith(name)
    assert torch.equal(found["4"]["ids"], found["5"]["ids"])
    torch.testing.assert_close(found["4"]["logits"], found["5"]["logits"], rtol=1e-4, atol=1e-4)
