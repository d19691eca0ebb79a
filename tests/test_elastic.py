"""The same run on one process or several, under DDP or FSDP2, however a step is cut, and across changes of these."""

import json
from collections import Counter

import pytest
import torch
from conftest import good_row
from ranks import run
from runs import assert_same, assert_same_end, curve, metrics_of, newest, status_of, weights_and_moments

from loop.record.checkpoint import checkpoints

pytestmark = pytest.mark.integration

# 31 rows, 12 a step: windows of 12, 12 and 7 rows.
ARGS = ["tiny", "--max-steps", "10", "--val-fraction", "0.2", "--eval-steps", "5", "--logging-steps", "1"]
ARGS += ["--learning-rate", "1e-4", "--max-length", "192", "--early-stopping-patience", "0", "--save-steps", "100",
         "--sample-max-new-tokens", "8"]  # fmt: skip
# strategy, rows in a micro-batch, micro-batches, rows in an evaluation micro-batch, tokens in a micro-batch
CUTS = [
    ("one", 1, 12, 1, 0),
    ("one", 3, 4, 2, 0),
    ("one", 12, 1, 8, 10_000),
    ("ddp2", 1, 6, 1, 250),
    ("ddp3", 2, 2, 5, 0),
    ("fsdp2", 2, 3, 4, 0),
    ("fsdp2", 1, 6, 1, 400),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [good_row(i) for i in range(39)]
    for index, line in enumerate(lines):  # lengths that differ, or means of means would do
        line["think"] += "再想。" * (index % 7)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def cut(rows, strategy, batch_size, accumulation, eval_batch_size, out, tokens=0) -> list:
    return [
        *ARGS, "--dataset", rows, "--output-dir", out, "--per-device-train-batch-size", batch_size,
        "--gradient-accumulation-steps", accumulation, "--per-device-eval-batch-size", eval_batch_size,
        "--micro-batch-tokens", tokens,
    ]  # fmt: skip


def largest_difference(ours, theirs) -> float:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max((largest_difference(ours[key], theirs[key]) for key in ours), default=0.0)
    if isinstance(ours, torch.Tensor):
        return (ours.double() - theirs.double()).abs().max().item()
    if isinstance(ours, (int, float)):
        return abs(ours - theirs)
    return 0.0 if ours == theirs else float("inf")


@pytest.mark.parametrize(
    ("fault", "tolerance", "cuts"),
    [("in_fp64()", 1e-12, CUTS), ("", 1e-5, [CUTS[0], CUTS[3], CUTS[5]])],
    ids=["fp64", "fp32"],
)
def test_neither_ranks_nor_cuts_change_a_number(rows, fault, tolerance, cuts, tmp_path):
    """6 steps, two epochs with a short last window: every metric row, weight and moment."""
    reference = None
    for number, (strategy, *sizes, tokens) in enumerate(cuts):
        out = tmp_path / f"{number}-{strategy}"
        args = [*cut(rows, strategy, *sizes, out, tokens), "--max-steps", 6, "--eval-steps", 3]
        outcome = run(args, strategy, fault, tmp_path / "log")
        assert set(outcome.codes) == {0}, outcome.output
        result = weights_and_moments(newest(out))["model"], curve(out)
        reference = reference or result
        assert largest_difference(result[0], reference[0]) <= tolerance, cuts[number]
        assert len(result[1]) == len(reference[1]) == 6 + 3 + 1  # train, evaluations, the best model's format
        for ours, theirs in zip(result[1], reference[1], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                scale = max(1.0, abs(theirs[name]))  # of the perplexity, the norm and the counts
                if name == "train/grad_norm" and tolerance == 1e-5:
                    scale *= 10  # torch's fp32 norm of a large matrix on a CPU errs by that much
                assert abs(ours[name] - theirs[name]) <= tolerance * scale, (cuts[number], theirs["step"], name)


def rows_given(folder) -> tuple[list[Counter], Counter]:
    """(the rows of each step, the rows of all evaluations), over all ranks"""
    steps, evaluations = {}, Counter()
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, tokens = json.loads(line)
            (evaluations if step < 0 else steps.setdefault(step, Counter()))[tuple(tokens)] += 1
    return [steps[step] for step in sorted(steps)], evaluations


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """(folder, rows of each step, rows of all evaluations) of a run on one process"""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "rows").mkdir()
    args = cut(rows, "one", 1, 12, 4, folder / "run")
    outcome = run(args, "one", f"record_rows({str(folder / 'rows')!r})", folder / "log")
    assert outcome.codes == [0], outcome.output
    return folder / "run", *rows_given(folder / "rows")


@pytest.mark.parametrize(("strategy", "sizes"), [("ddp2", (3, 2, 3)), ("ddp3", (2, 2, 5)), ("fsdp2", (1, 6, 1))])
def test_every_row_once_an_epoch_and_once_an_evaluation(rows, whole, strategy, sizes, tmp_path):
    _, steps, evaluations = whole
    for epoch in (steps[:3], steps[3:6], steps[6:9]):
        assert [sum(step.values()) for step in epoch] == [12, 12, 7]
        assert set(sum(epoch, Counter()).values()) == {1} and len(sum(epoch, Counter())) == 31
    assert set(evaluations.values()) == {3} and len(evaluations) == 8
    (tmp_path / "rows").mkdir()
    fault = f"record_rows({str(tmp_path / 'rows')!r})"
    outcome = run(cut(rows, strategy, *sizes, tmp_path / "run"), strategy, fault, tmp_path / "log")
    assert set(outcome.codes) == {0}, outcome.output
    assert rows_given(tmp_path / "rows") == (steps, evaluations)


def test_a_run_goes_on_on_any_number_of_processes(rows, whole, tmp_path):
    """One run handed from one process to DDP, to FSDP2, to three processes and back, one step or two on each."""
    out, seen = tmp_path / "run", tmp_path / "rows"
    seen.mkdir()
    args = [*cut(rows, "one", 1, 12, 4, out), "--resume"]
    legs = ["one", "ddp2", "one", "fsdp2", "ddp2", "fsdp2", "one", "ddp3", "fsdp2"]
    for step, strategy in enumerate(legs, start=1):
        again = tmp_path / f"again-{step}"
        fault = f"(record_rows({str(seen)!r}), resave({str(again)!r}), signal_in_step({step - 1}))"
        before = newest(out) if step > 1 else None
        outcome = run(args, strategy, fault, tmp_path / "log")
        assert set(outcome.codes) == {0} and status_of(out)["status"] == "interrupted", outcome.output
        assert newest(out).name == f"step-{step:08d}"
        if before:
            assert_same(weights_and_moments(*checkpoints(again)), weights_and_moments(before))
            world = {"one": 1, "ddp3": 3}.get(strategy, 2)
            assert f"gradient_accumulation_steps {12 // world} x {world} processes)" in outcome.output
    refusal = run(args, "ddp5", log=tmp_path / "log")
    assert set(refusal.codes) == {2} and "Traceback" not in refusal.output
    for flag in ("--num_processes 5", "--per-device-train-batch-size", "--gradient-accumulation-steps"):
        assert flag in refusal.output
    assert set(run(args, "one", f"record_rows({str(seen)!r})", tmp_path / "log").codes) == {0}
    assert status_of(out)["status"] == "completed"
    assert rows_given(seen)[0] == whole[1]
    for ours, theirs in zip(metrics_of(out), metrics_of(whole[0]), strict=True):
        for name in theirs:
            if "loss" in name:
                assert abs(ours[name] - theirs[name]) <= 1e-5, (theirs["step"], name)


def test_an_untied_head_trains_resumes_and_exports(tokenizer, rows, tmp_path):
    """Qwen3-8B and larger: the head is a matrix of its own, trained, sharded and exported as one."""
    from transformers import AutoModelForCausalLM

    from model.export import export
    from model.qwen3 import load_model

    torch.manual_seed(3)
    model = load_model("tiny", tokenizer, gradient_checkpointing=False)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    export(model, model.state_dict(), tokenizer, tmp_path / "untied")
    ends = {}
    for strategy, accumulation in (("one", 12), ("fsdp2", 6)):
        args = [*cut(rows, strategy, 1, accumulation, 4, tmp_path / strategy), "--model", tmp_path / "untied"]
        assert set(run(args, strategy, log=tmp_path / "log").codes) == {0}
        best = AutoModelForCausalLM.from_pretrained(tmp_path / strategy / "best").state_dict()
        assert (best["lm_head.weight"] - best["model.embed_tokens.weight"]).abs().max() > 0.01
        assert (best["lm_head.weight"] - model.lm_head.weight.bfloat16()).abs().max() > 1e-4  # it was trained
        args[args.index(tmp_path / strategy)] = tmp_path / f"{strategy}-resumed"
        assert set(run(args, strategy, "signal_in_step(4)", tmp_path / "log").codes) == {0}
        assert set(run([*args, "--resume"], strategy, log=tmp_path / "log").codes) == {0}
        assert_same_end(tmp_path / f"{strategy}-resumed", tmp_path / strategy)
        ends[strategy] = metrics_of(tmp_path / strategy)[-2]["eval/loss"]
    assert abs(ends["one"] - ends["fsdp2"]) <= 1e-5
