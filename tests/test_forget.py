"""The gauge of forgetting: replies drawn from the model itself, and how much their loss rises."""

import functools
import json
import math
import shutil
import statistics

import pytest
import torch
from ranks import run
from runs import assert_same_end, curve, metrics_of, newest
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.base.errors import UserError
from data.replies import read_replies, reply_row
from model.loss import SFTModel
from model.qwen3 import load_model, load_tokenizer
from tools import replay, soup
from tools.report import write_comparison, write_report
from tools.shared.ask import Local

ARGS = "--dataset sample:60 --val-fraction 0.3 --max-steps 6 --eval-steps 3 --save-steps 3 --logging-steps 3 "
ARGS += "--num-samples 1 --sample-max-new-tokens 2 --language en"


def arguments(model, files, folder, strategy: str = "one") -> list[str]:
    """With the same rows in a step for every strategy."""
    batch = ["--gradient-accumulation-steps", "2" if strategy[-1] == "2" else "4"]
    batch += ["--lora-rank", "4", "--learning-rate", "0.05"] if strategy == "lora" else []
    return ["tiny", *ARGS.split(), *batch, "--model", model, "--forget", *files, "--output-dir", folder]


@pytest.fixture(scope="module")
def files(small_folder, tmp_path_factory):
    """Two of them: replies of the small model to held-out questions of a run, and to others."""
    folder = tmp_path_factory.mktemp("forget")
    first = ["tiny", *ARGS.split(), "--model", small_folder, "--max-steps", "1", "--output-dir", folder / "run"]
    assert run(first, log=folder / "log").codes == [0]
    with pytest.MonkeyPatch.context() as patch:
        for where, more in ((folder / "run", ()), ("sample:12", ("--out", folder / "general.jsonl"))):
            args = ["replay", where, "--sample", "--max-new-tokens", "24", "--model", small_folder, *more]
            patch.setattr("sys.argv", [*map(str, args)])
            replay.main()
    return folder / "run" / "forget.jsonl", folder / "general.jsonl"


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def loss_by_transformers(folder, rows, dtype=torch.float32) -> float:
    """Of the tokens of the replies, row by row."""
    model, total, count = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, row["prompt_length"] - 1 : -1].float()
        targets = ids[0, row["prompt_length"] :]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count


def test_replies_are_drawn_from_the_models_own_probabilities(small_folder, monkeypatch):
    """Their mean loss is then its mean entropy. Temperature 0.6 or the 20 likeliest would be far below."""
    tokenizer = load_tokenizer(str(small_folder))
    model = load_model(str(small_folder), tokenizer, gradient_checkpointing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # probabilities that are not all alike
    model.generation_config.repetition_penalty = 3.0
    writer = Local("tiny", SFTModel(model, 1024), tokenizer)
    asked = [[{"role": "user", "content": f"第{n}个问题？"}] for n in range(64)]
    losses, entropies = [], []
    pairs = [pair for n in range(0, 64, 16) for pair in writer.sample(asked[n : n + 16], 24, seed=n)]
    model.set_attn_implementation("sdpa")
    for prompt, reply in pairs:
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses += (-log_p.gather(1, torch.tensor(reply)[:, None])).flatten().tolist()
        entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
    apart = [loss - entropy for loss, entropy in zip(losses, entropies, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    assert len(apart) > 500 and 2 < statistics.fmean(entropies) < 7.6
    assert abs(statistics.fmean(apart)) < 3 * error < 0.2 * statistics.fmean(entropies)


def test_the_file_has_the_tokens_of_the_run_and_can_be_read(files, small_folder):
    own, general = map(rows_of, files)
    tokenizer = AutoTokenizer.from_pretrained(small_folder)
    held_out = (files[0].parent / "data" / "val.jsonl").read_text(encoding="utf-8")
    assert len(own) == len(held_out.splitlines()) and len(general) == 12
    for row in own:
        assert row["messages"][-2]["content"] in held_out and 0 < len(row["input_ids"]) - row["prompt_length"] <= 24
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == row["input_ids"][: row["prompt_length"]]
        assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == row["messages"][-1]["content"]


@pytest.fixture(scope="module")
def whole(files, small_folder, tmp_path_factory):
    @functools.cache
    def folder_of(strategy: str):
        folder = tmp_path_factory.mktemp(strategy) / "run"
        launch = "one" if strategy == "lora" else strategy
        done = run(arguments(small_folder, files, folder, strategy), launch, log=folder.parent / "log")
        assert set(done.codes) == {0}, done.output
        return folder

    return folder_of


@pytest.mark.parametrize("strategy", ["one", "lora"])
def test_the_figure_is_the_rise_of_transformers_own_loss(whole, files, small_folder, strategy):
    """At the last step, whose weights are those of best/ (rounded to bf16)."""
    folder = whole(strategy)
    first, *_, last = [row for row in metrics_of(folder) if "forget/kl" in row]
    assert first["step"] == 0 and first["forget/kl"] == first["forget/kl_error"] == first["forget/kl/general"] == 0.0
    own, general = map(rows_of, files)
    for name, rows in (("kl", own + general), ("kl/forget", own), ("kl/general", general)):
        rise = loss_by_transformers(folder / "best", rows) - loss_by_transformers(small_folder, rows)
        assert last[f"forget/{name}"] == pytest.approx(rise, abs=5e-4) and rise > 0.01
    assert 0 < last["forget/kl_error"] < last["forget/kl"]
    assert json.loads((folder / "run.json").read_text())["forget_rows"].startswith(f"{len(own + general)} with sha256 ")


@pytest.mark.integration
@pytest.mark.parametrize("strategy", ["ddp2", "fsdp2"])
def test_the_same_on_two_processes(whole, strategy):
    ours, theirs = ([row for row in curve(whole(s)) if "forget/kl" in row] for s in (strategy, "one"))
    for a, b in zip(ours, theirs, strict=True):
        names = [name for name in a if name.startswith("forget/")]
        assert len(names) == 4 and [a[n] for n in names] == pytest.approx([b[n] for n in names], abs=2e-4)


@pytest.mark.integration
def test_a_killed_run_goes_on_with_the_figure_of_before_training(whole, files, small_folder, tmp_path):
    args = arguments(small_folder, files, tmp_path / "run")
    assert run(args, fault="kill_in_step(5)", log=tmp_path / "log").codes == [-9]
    assert newest(tmp_path / "run").name.endswith("3")
    done = run([*args, "--resume"], log=tmp_path / "log")
    assert done.codes == [0], done.output
    assert_same_end(tmp_path / "run", whole("one"))
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"".join(files[0].read_bytes().splitlines(keepends=True)[:-1]))
    assert run([*arguments(small_folder, [other], tmp_path / "run"), "--resume"], log=tmp_path / "log").codes == [2]
    assert "forget_rows" in (tmp_path / "log").read_text()


def test_what_cannot_be_measured_is_refused_by_file_and_line(files, small_folder, tmp_path):
    tokenizer = load_tokenizer(str(small_folder))
    good = rows_of(files[0])[0]
    said = good["messages"][-1]
    ids = tokenizer("甲\u2028乙\x85丙")["input_ids"]  # ends of lines to Python, but not to JSON
    row = reply_row(good["messages"][:-1], good["input_ids"][: good["prompt_length"]], ids, tokenizer)
    (tmp_path / "ends.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(tmp_path / "ends.jsonl", tmp_path / "again.jsonl")
    assert len(read_replies((str(tmp_path / "ends.jsonl"), str(tmp_path / "again.jsonl")), tokenizer)) == 1
    assert read_replies((str(tmp_path / "ends.jsonl"),), tokenizer)[0].input_ids.tolist() == row["input_ids"]
    cases = {
        "not a reply that tools.replay --sample wrote": [
            b"{", b"[]", b"\xff", {**good, "prompt_length": len(good["input_ids"])}, {"messages": []},
            {**good, "input_ids": ["a"]}, {**good, "input_ids": [-1, 5]}, {**good, "prompt_length": "1"},
            {**good, "prompt_length": 3.0}, {**good, "input_ids": [*good["input_ids"], 10**12]},
            {**good, "messages": 3},
        ],
        "another tokenizer": [
            {**good, "messages": [*good["messages"][:-1], {**said, "content": "别的"}]},
            {**good, "input_ids": [10**7, *good["input_ids"][1:]]},
        ],
    }  # fmt: skip
    for message, rows in cases.items():
        for row in rows:
            path = tmp_path / "a.jsonl"
            line = row if isinstance(row, bytes) else json.dumps(row).encode()
            path.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
            with pytest.raises(UserError, match=r"line 2|cannot read") as error:
                read_replies((str(path),), tokenizer)
            assert message in str(error.value) or row == b"\xff"
    (tmp_path / "a.jsonl").write_bytes(b"")
    for paths in ((str(tmp_path / "a.jsonl"),), (str(tmp_path / "none.jsonl"),), (str(files[0]), str(files[0]))):
        with pytest.raises(UserError, match="--forget"):
            read_replies(paths, tokenizer)


def test_reports_and_mixtures_show_it(whole, files, small_folder, tmp_path, tool):
    folder = tmp_path / "run"
    shutil.copytree(whole("one"), folder)
    last = [row for row in metrics_of(folder) if "forget/kl" in row][-1]
    text = write_report(folder).read_text(encoding="utf-8")
    assert f"rose by {last['forget/kl']:.4f} ± {last['forget/kl_error']:.4f} nats a token until the best" in text
    assert (folder / "report" / "forget.png").exists() and "遗忘" in write_report(folder, "zh").read_text("utf-8")
    shutil.copytree(folder, tmp_path / "b" / "other")
    page = write_comparison([folder, tmp_path / "b" / "other"], "en", tmp_path / "both").read_text(encoding="utf-8")
    assert f"| forgotten at the best step, nats a token | {last['forget/kl']:.4f} | {last['forget/kl']:.4f} |" in page
    args = [small_folder, folder / "best", "--weights", 0.5, "--forget", *files, "--out", tmp_path / "soup"]
    code, said = tool(soup, *args)
    assert code == 0 and "forgotten" in said, said
    base, middle, tuned = (float(line.split()[-2]) for line in said.splitlines() if "│" in line)
    assert base == 0 < middle < tuned == pytest.approx(last["forget/kl"], abs=1e-3)
