"""The table of losses: against transformers, the same however rows are packed, and what is measured with it."""

import json
import math
import random
import statistics

import pytest
import torch
from conftest import ROOT, good_row
from ranks import run
from runs import metrics_of, status_of

from data.contexts import exam_rows
from data.encode import encode_rows
from loop.evaluate import losses, rise_of
from loop.score import Scored, loss_of, score
from tools import compare_models, rows, soup

OWN = '''"""Measures of my own."""

from loop.evaluate import Measure, loss_of

LONG = 5
WIDE = LONG + 1


def evaluators(data, config):
    long = [row for row in data.val if len(data.tokenizer.decode(row.input_ids[row.answer_start :])) > LONG]
    hits = lambda table: {part: sum(line.correct for line in table if line.part == part) for part in ("think", "stop")}
    assert WIDE == LONG + 1
    return [Measure("eval/long_answers", "loss of long answers", long, loss_of),
            Measure("hits/of", "hits", data.val[:5], hits, every=2 * config.eval_steps, higher_is_better=True)]
'''


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{**good_row(i), "answer": "多喝水，注意休息。" if i % 2 else "好。"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["tiny", "--dataset", path, "--max-steps", 4, "--eval-steps", 1, "--num-samples", 0, "--save-steps", 9,
            "--val-fraction", 0.3, "--language", "en"]  # fmt: skip


def test_a_table_is_what_transformers_computes_row_by_row(examples, make_model, tokenizer, accelerator):
    """Of rows, of the same rows with other parts, and of tokens that are asked for after a row; in any packing."""
    model, own = make_model(dtype=torch.float64), examples[:6]
    middle = [row.__class__(row.input_ids, row.prompt_length, row.answer_start, row.location, (), (("middle", 1, 4),))
              for row in own]  # fmt: skip
    asked = exam_rows([tokenizer.decode(row.input_ids[:9]) for row in own], tokenizer, ("A", "是"))
    forwards = []
    everything = [*own, *asked, *middle]
    table = score(model, everything, accelerator, check=lambda: forwards.append(1), batch_size=1)
    assert (len(forwards) == 12 and not model.causal_lm.training) or model.training
    tables = [score(model, everything, accelerator, batch_size=size) for size in (5, -1)]
    for other in tables:
        for one, two in zip(table, other, strict=True):
            assert one[:2] == two[:2] and one[3:] == two[3:] and one.loss_sum == pytest.approx(two.loss_sum, rel=1e-12)
    expected = []
    model.causal_lm.set_attn_implementation("sdpa")
    for row in everything:
        logits = model.causal_lm(row.input_ids[None]).logits[0].log_softmax(-1).detach()
        targets = [(n, int(row.input_ids[n])) for n in range(row.prompt_length, len(row))]
        targets += [(len(row), token) for token in row.next_tokens]
        found = [(-logits[n - 1, token].item(), int(logits[n - 1].argmax()) == token) for n, token in targets]
        for part, begin, end in row.parts:
            sums, hits = zip(*found[begin:end], strict=True)
            expected.append((row.location, part, math.fsum(sums), end - begin, sum(hits)))
    for ours, theirs in zip(table, expected, strict=True):
        assert ours == (*theirs[:2], pytest.approx(theirs[2], rel=1e-9), *theirs[3:])
    assert {line.part for line in table} == {"think", "answer", "close", "stop", "A", "是", "middle"}
    assert score(model, [], accelerator) == [] and math.isnan(loss_of([]))
    with pytest.raises(KeyboardInterrupt):
        score(model, own, accelerator, check=lambda: exec("raise KeyboardInterrupt"))


def test_measures_of_a_step_file_are_everywhere_on_every_launch(args, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN, encoding="utf-8")
    curves = {}
    for strategy in ("one", "ddp2", "fsdp2"):
        out = tmp_path / strategy
        more = ["--step-file", own, "--step-set", "LONG=4", "--output-dir", out]
        more += ["--gradient-accumulation-steps", 4 if strategy == "one" else 2]
        done = run([*args, *more], strategy, log=tmp_path / "log", DRAW="1" if strategy == "one" else "")
        assert set(done.codes) == {0}, done.output
        curves[strategy] = [row for row in metrics_of(out) if "eval/loss" in row]
        report = (out / "report.md").read_text(encoding="utf-8")
        assert "- `eval/long_answers`: loss of long answers ↓" in report and "(LONG = 4)" in report
        assert "| 1 | " in report and "hits/of/stop" in report
        last = curves[strategy][-1]
        assert f" {last['eval/long_answers']:.4f} |" in report
    assert (tmp_path / "one/report/own.png").stat().st_size > 10_000
    assert ["hits/of/think" in row for row in curves["one"]] == [True, False, True, False, True]
    for row in curves["one"]:
        table = [json.loads(line) for line in (tmp_path / "one/eval_rows.jsonl").open(encoding="utf-8")]
        now = [line for line in table if line["step"] == row["step"]]
        whole = sum(line[part][0] for line in now for part in ("think", "answer"))
        assert whole / sum(line[part][1] for line in now for part in ("think", "answer")) == pytest.approx(
            row["eval/loss"], rel=1e-12
        )
    for strategy in ("ddp2", "fsdp2"):
        for ours, theirs in zip(curves[strategy], curves["one"], strict=True):
            assert ours["eval/long_answers"] == pytest.approx(theirs["eval/long_answers"], rel=1e-5)
    entry = json.loads((tmp_path / "one/run.json").read_text())["step_files"][0]
    assert entry["set"] == {"LONG": 4} and entry["imports"].keys() == {"loop/step.py"}
    assert (tmp_path / "one/code/loop/step.py").read_bytes() == (ROOT / "loop/step.py").read_bytes()


WRONG = {
    "return [1]": "returns a list of loop.evaluate.Measure",
    'return [Measure("mine", "", data.val, loss_of)]': "'mine' cannot be the name of a figure",
    'return [Measure("eval/loss", "", data.val, loss_of)]': "'eval/loss' cannot be the name of a figure",
    'return [Measure("my/own", "", data.val, loss_of, every=3)]': "no multiple of eval_steps",
    'return [Measure("my/own", "", data.split.val, loss_of)]': "a list of examples",
    'return [Measure("my/own", "", (row for row in data.val), loss_of)]': "a list of examples",
    'return [Measure("my/own", "", [], loss_of, None)]': "no multiple of eval_steps",
    'return [Measure("eval/loss/x", "", [], loss_of)]': "cannot be the name of a figure",
    'return [Measure("a/b", "", [], loss_of, 4)]\n\n\nMETRIC_FOR_BEST_MODEL = "a/b"': "not measured at each evaluation",
    'return [Measure("a/b", "", [], lambda table: {})]\n\n\nMETRIC_FOR_BEST_MODEL = 5': "which no evaluation gives",
    "return data.nothing": "evaluators in own.py, line 5: AttributeError",
    'return [Measure("my/own", "", data.val, lambda table: "x")]': "the measure my/own gives 'x'",
    'return [Measure("my/own", "", data.val, lambda table: 1 / 0)]': "the measure my/own in own.py, line 5: Zero",
    'return [Measure("my/own", "", data.val[data.rank :], loss_of)]': "wants other rows on one process than on another",
    'return []\n\n\nMETRIC_FOR_BEST_MODEL = "my/own"': "which no evaluation gives",
    'return [Measure("a/b", "", data.val, loss_of, 0, True)]\n\n\nMETRIC_FOR_BEST_MODEL = "a/b"': "higher is better",
}


@pytest.mark.parametrize("code", WRONG)
def test_a_measure_that_cannot_be_made_is_refused(code, args, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(f"from loop.evaluate import Measure, loss_of\n\n\ndef evaluators(data, config):\n    {code}\n")
    strategy = "ddp2" if "rank" in code else "one"
    more = ["--eval-steps", 2, "--step-file", own, "--output-dir", tmp_path / "run"]
    done = run([*args, *more], strategy, log=tmp_path / "log")
    assert 2 in done.codes and WRONG[code] in done.output and "Traceback" not in done.output, done.output


def test_the_same_rows_have_the_same_losses_in_a_run_and_in_every_tool(args, small_folder, tool, tmp_path, monkeypatch):
    """Of a run that changes no weight, so that best/ is what it evaluated: to the bit."""
    out, model = tmp_path / "run", str(small_folder)
    more = ["--model", model, "--learning-rate", 0, "--test-fraction", 0.2, "--think-probe", "--output-dir", out]
    done = run([*args, *more], log=tmp_path / "log")
    assert done.codes == [0], done.output
    first, *_ = evaluations = [row for row in metrics_of(out) if "eval/loss" in row]
    assert {row["eval/loss"] for row in evaluations} == {first["eval/loss"]} and status_of(out)["best_step"] == 0
    assert tool(rows, out)[0] == 0
    found = [json.loads(line) for line in (out / "rows.jsonl").open(encoding="utf-8")]
    kept = [json.loads(line) for line in (out / "eval_rows.jsonl").open(encoding="utf-8")]
    by_tool = sorted(tuple(line["after"].values()) for line in found if line["side"] == "val")
    by_run = sorted(tuple(line[part][0] / line[part][1] for part in ("think", "answer")) for line in kept
                    if line["step"] == 0)  # fmt: skip
    assert by_tool == by_run
    seen = []
    for module in (compare_models, soup):
        monkeypatch.setattr(module, "losses", lambda table: seen.append(losses(table)) or seen[-1])
    best, val = out / "best", out / "data/val.jsonl"
    assert tool(compare_models, model, best, "--dataset", val, "--out", tmp_path / "c", "--max-new-tokens", 2)[0] == 0
    assert tool(soup, model, best, "--weights", 0.5, "--out", tmp_path / "soup")[0] == 0
    names = [name for name in seen[0] if f"eval/{name}" in first]
    assert len(names) == 9 and len(seen) == 5  # two models; weights 0, 0.5 and 1 of equal models
    for figures in seen:
        assert all(figures[name] == first[f"eval/{name}"] for name in names)


def test_the_error_of_a_rise_is_that_of_drawing_rows_again():
    """Over many draws of 60 rows of unequal length the rise varies by its own estimate; and by hand for two rows."""
    drawn = random.Random(0)

    def tables() -> list[list[Scored]]:
        found = [[], []]
        for row in range(60):
            count, hard = drawn.randint(20, 400), drawn.gauss(0, 0.3)
            for table, shift in zip(found, (0.0, 0.02 + drawn.gauss(0, 0.05)), strict=True):
                for part, share in (("think", count), ("answer", count // 2)):
                    table.append(Scored(str(row), part, share * (2 + hard + shift), share, 0))
        return found

    rises, errors = zip(*(rise_of(*tables(), {"think": 1.0, "answer": 1.0}) for _ in range(400)), strict=True)
    assert statistics.mean(rises) == pytest.approx(0.02, abs=0.001)
    assert statistics.stdev(rises) == pytest.approx(statistics.mean(errors), rel=0.1)
    before = [Scored("a", "answer", 10.0, 10, 0), Scored("b", "answer", 40.0, 20, 0)]
    after = [Scored("a", "answer", 13.0, 10, 0), Scored("b", "answer", 40.0, 20, 0)]
    rise, error = rise_of(before, after, {"answer": 1.0})
    assert rise == pytest.approx(0.1) and error == pytest.approx(math.sqrt((2**2 + 2**2) * 2) / 30)
    assert math.isnan(rise_of(before[:1], after[:1], {"answer": 1.0})[1])
    assert rise_of(before, after, {"answer": 0.5})[0] == pytest.approx(0.05)
    assert rise_of(before, after[:1], {"answer": 1.0})[0] == pytest.approx(0.3)  # of the rows that are in both
    assert math.isnan(rise_of(before, [], {"answer": 1.0})[0])


def test_rows_that_are_packed_together_are_those_of_a_pass_of_their_own(split, tokenizer, make_model, accelerator):
    examples, _ = encode_rows(split.val, tokenizer, 512, "error")
    model = make_model()
    alone, both = score(model, examples[:4], accelerator), score(model, examples, accelerator)
    for one, two in zip(alone, both, strict=False):
        assert one == (*two[:2], pytest.approx(two.loss_sum, rel=1e-6), *two[3:])
