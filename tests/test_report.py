"""The report and the comparison: every figure in them against what they are made from."""

import json
import math
import re
import shutil
import sys

import pytest
from ranks import run
from runs import metrics_of

from data.base.errors import UserError
from data.reading.source import SAMPLE
from loop.score import Scored
from tools.compare_models import main as compare
from tools.report import main as report
from tools.report import write_report
from tools.reports.pages import quote
from tools.reports.record import best_and_last, collapse, judge
from tools.shared.answers import keyword_overlap, overlap

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A run on few rows that gets worse on the others, and stops early."""
    out = tmp_path_factory.mktemp("report") / "run"
    rows = out.parent / "rows.jsonl"
    rows.write_bytes(b"".join(SAMPLE.read_bytes().splitlines(keepends=True)[:50]))
    args = ["tiny", "--dataset", rows, "--val-fraction", "0.7", "--learning-rate", "0.005", "--eval-steps", "5"]
    args += ["--sample-max-new-tokens"]
    args += ["16", "--early-stopping-patience", "2", "--language", "en", "--output-dir", str(out)]
    done = run(args, log=out.parent / "log", DRAW="1")
    assert done.codes == [0], done.output
    assert f"report: {out}/report.md" in done.output
    return out


@pytest.fixture
def tool(monkeypatch, capsys):
    """Calls the main() of a tool with arguments; returns what it prints."""

    def call(main, *args) -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, args)])
        main()
        return capsys.readouterr().out

    return call


def test_the_figures_of_the_report_are_those_of_the_record(overfitted):
    text = (overfitted / "report.md").read_text()
    evaluations = [row for row in metrics_of(overfitted) if "eval/loss" in row]
    best = min(evaluations, key=lambda row: row["eval/loss"])
    last = evaluations[-1]
    after = next(row for row in evaluations if row["step"] > best["step"])
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if " % | " in line and line.startswith("| ")]
    assert len(table) == len(evaluations) > 3
    names = ["eval/loss", "eval/think_loss", "eval/answer_loss"]
    for cells, row in zip(table, evaluations, strict=True):
        assert cells[0] == str(row["step"]) + (" (best)" if row is best else "")
        assert [float(cell) for cell in cells[2:5]] == [round(row[name], 4) for name in names]
        assert float(cells[6].rstrip(" %")) == round(100 * row["eval/think_accuracy"], 1)
    rise = last["eval/loss"] - best["eval/loss"]
    assert "**Yes.**" in text and "stopped early at step" in text
    assert f"lowest at step {best['step']} (epoch {best['step'] / 4:.2f}), {best['eval/loss']:.4f}" in text  # 15 rows
    assert f"from the evaluation at step {after['step']} on" in text
    found = re.search(r"rose by ([\d.]+) ± ([\d.]+) \(paired, 35 rows\), more than twice", text)
    assert float(found[1]) == round(rise, 4) and 0 < 2 * float(found[2]) < rise
    train = [row for row in metrics_of(overfitted) if "train/loss" in row]
    at_best = [row for row in train if row["step"] <= best["step"]][-1]
    assert f"fell by another {at_best['train/loss'] - train[-1]['train/loss']:.4f}" in text
    for name in ("loss", "parts", "training"):
        assert f"report/{name}.png" in text and (overfitted / f"report/{name}.png").read_bytes().startswith(PNG)
    assert text.count("### Question") == 5 and "32 validation questions" in text


def test_both_languages_say_the_same(overfitted, tmp_path, tool):
    run = tmp_path / "run"
    shutil.copytree(overfitted, run)
    assert f"{run}/report.zh.md" in tool(report, run, "--language", "zh")
    zh = (run / "report.zh.md").read_text()
    assert "已早停" in zh and "**是。**" in zh and "早停" in zh
    assert (run / "report.md").read_text() == (overfitted / "report.md").read_text()  # both lie side by side
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", zh)
    assert len(pictures) == 3 and all((run / picture).read_bytes().startswith(PNG) for picture in pictures)
    figures = [[line.split("|")[3:6] for line in text.splitlines() if " % | " in line and line.startswith("| ")]
               for text in (zh, (overfitted / "report.md").read_text())]  # fmt: skip
    assert figures[0] == figures[1]


def test_what_the_report_says_of_the_run_itself(overfitted):
    text = (overfitted / "report.md").read_text()
    launches = json.loads((overfitted / "run.json").read_text())["launches"]
    assert len(launches) == 1 and f"| began | {launches[0]['began']}; wall time 0:00:" in text
    assert launches[0]["command"] in text
    parameters = json.loads((overfitted / "run_status.json").read_text())["num_trainable_parameters"]
    assert f"{parameters:,} |" in text


def test_several_runs_side_by_side(overfitted, tmp_path, tool):
    """One of other rows, one without training yet."""
    folders = [tmp_path / "runs" / name for name in ("first", "second", "third")]
    for folder in folders:
        shutil.copytree(overfitted, folder)
    settings = json.loads((folders[1] / "run.json").read_text())
    changed = {"learning_rate": 0.001, "val_rows": "34 with sha256 0"}
    (folders[1] / "run.json").write_text(json.dumps(settings | changed))
    rows = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"eval/loss": row["eval/loss"] - 0.5} if "eval/loss" in row else row for row in rows]
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *_ = (folders[2] / "metrics.jsonl").read_text().splitlines()
    (folders[2] / "metrics.jsonl").write_text(first + "\n")
    said = tool(report, *folders)
    assert said.strip() == str(tmp_path / "runs/runs.md")
    text = (tmp_path / "runs/runs.md").read_text()
    losses = [min(row["eval/loss"] for row in metrics_of(folder) if "eval/loss" in row) for folder in folders]
    assert f"| best evaluation loss | {losses[0]:.4f} | {losses[1]:.4f} | {losses[2]:.4f} |" in text
    assert "**second**: evaluated on other validation rows, so the losses cannot be compared." in text
    assert f"**third**: {losses[2] - losses[0]:+.4f} with one seed, which says nothing about other seeds; over" in text
    assert "| `learning_rate` | 0.005 | 0.001 | 0.005 |" in text and "`val_rows`" in text and "`seed`" not in text
    assert (tmp_path / "runs/runs.png").read_bytes().startswith(PNG)
    tool(report, folders[0], folders[2], "--language", "zh", "--out", tmp_path / "zh")
    text = (tmp_path / "zh/runs.md").read_text()
    assert f"| 最低评估损失 | {losses[0]:.4f} | {losses[2]:.4f} |" in text and "没有差别" in text
    for others, message in {
        (tmp_path,): "is no folder of a run",
        (overfitted,): "name one for runs.md and runs.png with --out",
        (folders[0],): "one run is named twice",
    }.items():
        with pytest.raises(SystemExit, match=message):
            tool(report, folders[0], *others)


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        (
            (2.0, 2.5, 2.6),
            "costs 0.5000 nats a token less than without, and 0.6000 less than with another row's. The ans",
        ),
        ((2.0, 2.5, 1.5), "The thinking does not help the answer"),
        ((2.0, 2.5, 2.001), "is not clear"),
        (("nan", "nan", "nan"), None),
    ],
)
def test_what_the_report_says_of_thinking_and_of_an_exam(overfitted, tmp_path, probe, sentence):
    """Both of which a launch may have begun in the middle of a run."""
    run = tmp_path / "run"
    shutil.copytree(overfitted, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    late = [row for row in rows if "eval/loss" in row][1:]
    for row in late:
        row |= {f"think_probe/{name}": loss for name, loss in zip(("own", "none", "other"), probe, strict=True)}
        row |= {"exam/accuracy": 0.25, "exam/questions": 400, "eval/close_accuracy": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(run).read_text()
    assert (sentence in text) if sentence else ("Does the thinking help" not in text)
    assert (
        f"400 questions of multiple choice, of which the model answered right 25.0 % at step {late[0]['step']}" in text
    )
    assert "at most ±4.9 points" in text and "nan" not in text


def test_a_run_without_training_rows_knows_its_epochs(overfitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(overfitted, run)
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "eval/loss" in line]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert "(epoch 0.00), evaluation loss" not in write_report(run).read_text()


def test_a_killed_run_is_reported_as_one(overfitted, tmp_path, tool):
    """What a kill in the middle leaves: the status says running, and the last line is cut."""
    run = tmp_path / "run"
    shutil.copytree(overfitted, run)
    status = json.loads((run / "run_status.json").read_text())
    (run / "run_status.json").write_text(json.dumps({**status, "status": "running", "step": 0}))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    samples = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text("".join(samples[:6]))
    tool(report, run)
    text = (run / "report.md").read_text()
    step = json.loads(lines[3])["step"]
    assert f"its process is gone, --resume goes on at step {step} of" in text
    assert "The model in training (step" in text and text.count("### Question") == 3


def test_an_interrupted_run_is_reported_where_it_stands(overfitted, tmp_path):
    """Which may be some steps after its last row."""
    run = tmp_path / "run"
    shutil.copytree(overfitted, run)
    (run / "run_status.json").write_text(json.dumps({"status": "interrupted", "step": 77}))
    assert "interrupted, --resume goes on at step 77 of" in write_report(run).read_text()


def test_without_samples_and_without_training_there_is_still_a_report(overfitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(overfitted, run)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    row = {name: value for name, value in first.items() if not name.startswith("format")}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "samples.jsonl").unlink()
    assert "**Not known yet.**" in write_report(run).read_text()


def test_what_is_no_run_is_told(overfitted, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no folder of a run"):
            write_report(folder)
    run = tmp_path / "run"
    shutil.copytree(overfitted, run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no finished evaluation yet"):
        write_report(run)


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([7.0, 6.0, 5.0], "falling"),
        ([7.0, 5.0, 6.0], "overfitting"),
        ([7.0, 5.0, 5.01], "plateau"),
        ([5.0, 6.0, 7.0], "worse"),
        ([5.0], "early"),
        ([7.0, 5.0, math.nan], "nonfinite"),
        ([5.0, math.nan], "nonfinite"),
        ([math.nan, 5.0, 6.0], "overfitting"),
        ([7.0, 5.0, math.nan, 6.0], "overfitting"),
    ],
)
def test_the_verdict(losses, kind):
    """Of two rows whose losses differ by 0.1 more at each evaluation: a rise of 0.01 is no overfitting then."""
    evaluations = [{"step": 10 * index, "eval/loss": loss, "decides": loss} for index, loss in enumerate(losses)]
    train = [{"step": step, "train/loss": 7 - step / 10} for step in range(1, 10 * len(losses))]
    best, last = best_and_last(evaluations)
    tables = {row["step"]: [Scored(str(n), "answer", 10 * (row["decides"] + n * row["step"] / 100), 10, 0)
                            for n in (-0.5, 0.5)] for row in (best, last)}  # fmt: skip
    verdict = judge(evaluations, train, tables, {})
    assert verdict.kind == kind and verdict.rise == pytest.approx(last["decides"] - best["decides"], abs=1e-12)
    assert judge(evaluations, train, {}, {}).kind == kind.replace("overfitting", "plateau")  # nothing is known then


def test_a_reply_cannot_break_the_page():
    """CommonMark with tables and strikethrough, as rich's parser reads it, shows each character and nothing else."""
    from html import unescape

    from markdown_it import MarkdownIt
    from test_page import replies

    parser = MarkdownIt("commonmark").enable(["strikethrough", "table"])
    for text in replies(300):
        page = parser.render(quote(text))
        assert set(re.findall(r"</?(\w+)", page)) <= {"blockquote", "p", "br"}, page
        shown = unescape(re.sub(r"<[^>]+>", "", page))
        assert shown.split() == text.replace("\u202e", "\\u202e").split()


# --- two models -------------------------------------------------------------------------------------------


def test_overlap_counts_characters():
    """Against ROUGE-L by hand: the longest common subsequence of 多喝水吧 and 多喝热水 is 多喝水."""
    same = overlap(["多喝水，注意休息。"], ["多喝水，注意休息。"])
    assert same == {"rouge_l": 1.0, "bleu": pytest.approx(100.0)}
    part = overlap(["多喝水吧"], ["多喝热水"])
    assert part["rouge_l"] == pytest.approx(3 / 4) and 0 < part["bleu"] < 100
    assert overlap(["甲乙丙丁"], ["春夏秋冬"])["rouge_l"] == 0.0


def test_keywords_are_counted_as_words():
    found = keyword_overlap(["建议您多喝温水，注意休息。"], ["多喝温水，注意保暖和休息，必要时去医院检查。"])
    # 温水 注意 休息 of 温水 注意 保暖 休息 医院 检查, and of 建议 温水 注意 休息
    assert found["keyword_recall"] == pytest.approx(3 / 6) and found["keyword_precision"] == pytest.approx(3 / 4)
    assert keyword_overlap([""], ["多喝温水"]) == {"keyword_recall": 0.0, "keyword_precision": 0.0}


def test_a_repeated_text_is_collapsed():
    assert collapse("甲乙。" * 400 + "完") == "甲乙。甲乙。[… × 400]完"
    text = "多喝水，多休息，多吃蔬菜。哈哈哈。"
    assert collapse(text) == text


def test_comparing_a_model_with_itself_and_with_a_worse_one(overfitted, tmp_path, tool):
    args = ["tiny", "--max-steps", "1", "--num-samples", "0"]
    assert run([*args, "--output-dir", tmp_path / "base"]).codes == [0]
    models = [tmp_path / "base/best", overfitted / "best"]
    val = overfitted / "data/val.jsonl"
    options = ["--dataset", val, "--num-rows", "4", "--max-new-tokens", "8"]
    out = overfitted / "compare"
    shown = tool(compare, *models, *options)
    with pytest.raises(SystemExit, match="holds a comparison already"):
        tool(compare, *models, *options)
    found = json.loads((out / "compare.json").read_text())
    base, tuned = found["models"]
    assert found["rows"] == 35 and len(base["replies"]) == 4
    evaluations = [row for row in metrics_of(overfitted) if "eval/loss" in row]
    expected = min(evaluations, key=lambda row: row["eval/loss"])
    assert tuned["loss"] == pytest.approx(expected["eval/loss"], abs=5e-3)  # bf16 weights
    assert tuned["perplexity"] == pytest.approx(math.exp(tuned["loss"]))
    assert tuned["loss"] < base["loss"] and f"{tuned['loss'] - base['loss']:+.4f}" in shown
    text = (out / "compare.md").read_text()
    assert tuned["think_perplexity"] == pytest.approx(math.exp(tuned["think_loss"]))
    assert text.count("## Question") == 4 and f"{tuned['answer_perplexity']:.4f}" in text


def test_a_comparison_that_cannot_be_made_is_told(overfitted, tmp_path, jsonl, monkeypatch):
    best = overfitted / "best"
    for arguments, message in {
        (best, tmp_path, "--dataset", overfitted / "data/val.jsonl"): "has no config.json",
        (best, best, "--dataset", tmp_path / "none.jsonl"): "none.jsonl",
        (best, best, "--dataset", jsonl([{"question": "?"}])): "rows.jsonl:1 has no answer",
        (best, best): "name rows that neither model was trained on with --dataset",
    }.items():
        monkeypatch.setattr(sys, "argv", ["tools.compare_models", *map(str, arguments), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="^tools.compare_models: .*" + message):
            compare()
    assert not (tmp_path / "out").exists()
