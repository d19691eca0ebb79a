"""A race, through its command line: what it trains, what it concludes, and that it goes on after a kill."""

import json
import os
import shutil
import signal

import pytest
from ranks import Race
from runs import metrics_of, status_of

from tools.report import write_comparison

pytestmark = pytest.mark.integration
FLAGS = "tiny --dataset sample:60 --val-fraction 0.2 --test-fraction 0.2 --max-steps 8 --eval-steps 4 --num-samples 0"
FLAGS += " --logging-steps 2 --save-steps 2 --language en --seeds 42 43"
AGAINST = ("recipes/ema.py", "fast=--learning-rate 0.02")


def arguments(out, *more, against=AGAINST) -> list:
    return [*FLAGS.split(), *(word for one in against for word in ("--against", one)), *more, "--out", out]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    done = Race(arguments(folder / "out"), folder / "log").wait()
    assert done.codes == [0], done.output
    return folder / "out", done.output


def figures(out) -> dict:
    """What is concluded, without times."""
    found = json.loads((out / "runs.json").read_text())
    test = found["test"] and {**found["test"], "runs": sorted(found["test"]["runs"])}
    return {**found, "test": test, "candidates": [{**one, "time": None} for one in found["candidates"]]}


def test_every_candidate_runs_with_every_seed_and_is_compared(whole):
    out, said = whole
    names = [f"{name}-{seed}" for name in ("tiny", "ema", "fast") for seed in (42, 43)]
    assert all(status_of(out / name)["status"] == "completed" for name in names)
    runs = {name: json.loads((out / name / "run.json").read_text()) for name in names}
    assert len({run["val_rows"] for run in runs.values()}) == 1  # one split for all
    assert [runs[name]["seed"] for name in names] == [42, 43] * 3 and runs["fast-42"]["learning_rate"] == 0.02
    best = {name: min(row["eval/loss"] for row in metrics_of(out / name) if "eval/loss" in row) for name in names}
    for one in figures(out)["candidates"]:
        assert one["losses"] == {seed: best[f"{one['name']}-{seed}"] for seed in ("42", "43")}
        if one["name"] != "tiny":
            apart = [best[f"{one['name']}-{seed}"] - best[f"tiny-{seed}"] for seed in (42, 43)]
            assert one["best"]["mean"] == pytest.approx(sum(apart) / 2) and one["best"]["n"] == 2
            # Over the rows it is the same mean, because both seeds have the same rows.
            assert one["rows"][0] == pytest.approx(one["best"]["mean"], rel=1e-6) and one["rows"][1] > 0
            assert f"{one['name']}: {one['verdict']}" in said
            assert one["fixed"]["n"] == 2
    text = (out / "runs.md").read_text()
    assert "# 6 runs side by side, 3 candidates" in text and "corrected for 2 comparisons" in text


def test_test_rows_are_measured_once_and_it_says_so(whole):
    out, _ = whole
    test = json.loads((out / "test.json").read_text())
    assert [len(losses) for losses in test["losses"].values()] == [2, 2] and "tiny" in test["losses"]
    assert "On the test rows, measured once, on " in (out / "runs.md").read_text()


def test_the_ledger_has_a_line_for_each_run_and_each_candidate(whole, tmp_path):
    out, _ = whole
    head, *lines = [line.split("\t") for line in (out / "runs.tsv").read_text().splitlines()]
    assert head == ["date", "command", "step_file", "settings", "n", "mean", "sd", "verdict"]
    assert all(len(line) == 8 for line in lines) and [line[4] for line in lines] == ["1"] * 6 + ["2"] * 3
    ema = next(line for line in lines if line[4] == "2" and line[2].startswith("ema.py"))
    losses = figures(out)["candidates"][1]["losses"].values()
    assert float(ema[5]) == round(sum(losses) / 2, 4) and ema[7] == figures(out)["candidates"][1]["verdict"]
    assert "python -m tools.race tiny" in ema[1] and "seed=" not in ema[3] and "test_fraction=0.2" in ema[3]
    run = next(line for line in lines if line[4] == "1" and "fast-43" in line[1])
    assert "learning_rate=0.02" in run[3] and "seed=43" in run[3] and "completed at step 8" in run[7]
    # A race that is over is shown again: nothing is trained, nothing added.
    before = (out / "runs.tsv").read_bytes(), (out / "runs.json").read_bytes()
    assert Race(arguments(out), tmp_path / "log").wait().codes == [0]
    assert ((out / "runs.tsv").read_bytes(), (out / "runs.json").read_bytes()) == before


def test_runs_that_differ_in_the_seed_alone_are_one_column(whole, tmp_path):
    out, _ = whole
    folders = [out / f"{name}-{seed}" for seed in (42, 43) for name in ("tiny", "fast")]
    text = write_comparison(folders, "en", tmp_path).read_text()
    assert "| | tiny | fast |" in text and "| seeds | 42, 43 | 42, 43 |" in text
    assert "| `learning_rate` | 0.005 | 0.02 |" in text and "`seed`" not in text
    assert "±" in next(line for line in text.splitlines() if line.startswith("| best evaluation loss"))


def test_a_race_that_is_killed_three_times_ends_with_the_same_table(whole, tmp_path):
    """While a run trains, which goes on by itself and is waited for; between runs; while it measures."""
    out, log = tmp_path / "out", tmp_path / "log"
    moments = (
        lambda: (out / "tiny-42/metrics.jsonl").exists() and (out / "tiny-42/checkpoints").exists(),
        lambda: (out / "tiny-43/run_status.json").exists(),
        lambda: (out / "fast-43/report.md").exists(),
    )
    for moment in moments:
        race = Race(arguments(out), log)
        race.until(moment)
        race.kill()
    assert Race(arguments(out), log).wait().codes == [0], log.read_text()
    assert figures(out) == figures(whole[0])


def test_a_race_that_is_stopped_stops_its_runs_with_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    race = Race(arguments(out, "--max-steps", "4000", against=()), tmp_path / "log")
    race.until(lambda: (out / "tiny-42/checkpoints").exists())
    os.kill(race.process.pid, signal.SIGINT)
    done = race.wait()
    assert done.codes == [130] and "stopped; the same command goes on" in done.output
    assert status_of(out / "tiny-42")["status"] == "interrupted" and not (out / "tiny-43/checkpoints").exists()


def test_a_run_that_diverges_is_a_result(tmp_path):
    step = tmp_path / "blow.py"
    lines = ["def micro_batch_loss(model, micro_batch, batch, config):", "    losses = model(**micro_batch.inputs)"]
    step.write_text("\n".join([*lines, "    return losses.sum() * float('nan'), losses", ""]))
    out = tmp_path / "out"
    done = Race(arguments(out, "--seeds", "42", against=(step,)), tmp_path / "log").wait()
    assert done.codes == [0], done.output
    assert status_of(out / "blow-42")["status"] == "diverged" and "diverged in 1 of 1 runs (seed 42)" in done.output
    assert not (out / "test.json").exists()  # there is no other candidate that could be the best
    assert "diverged at step" in (out / "runs.tsv").read_text()


def test_what_cannot_be_raced_is_refused_before_anything_is_trained(tmp_path, whole):
    step = tmp_path / "wrong.py"
    step.write_text("def micro_batch_loss(model, micro_batch, batch, config):\n    return 1 / 0\n")
    (dry := tmp_path / "dry.yaml").write_text("dry_run: true\n")
    cases = [
        (arguments(tmp_path / "a", against=(tmp_path / "none.py",)), "there is no step file"),
        (arguments(tmp_path / "a", against=(step,)), "wrong-42 cannot be trained"),
        (arguments(tmp_path / "a", against=("--learning-rates 1",)), "learning-rates"),
        (arguments(tmp_path / "a", against=("recipes/ema.py", "recipes/ema.py")), "two candidates have the name ema"),
        (arguments(tmp_path / "a", "--seed", "7", against=()), "--seed is what the race sets itself"),
        (arguments(tmp_path / "a", against=("--output_dir=x",)), "--output_dir=x is what the race sets itself"),
        (arguments(tmp_path / "a", against=("x=--seeds 7",)), "as many seeds as the race has are needed, 2"),
        (arguments(tmp_path / "a", against=("x=--seeds 7 7",)), "different ones"),
        (arguments(tmp_path / "a", against=("x=--seeds a b",)), "different ones"),
        (arguments(tmp_path / "a", against=("it's",)), "is no command line"),
        (arguments(tmp_path / "a", "--launch", "'x"), "is no command line"),
        (arguments(tmp_path / "a", against=("",)), "no --against is empty"),
        (arguments(tmp_path / "a", against=("Tiny=--weight-decay 1",)), "two candidates have the name Tiny"),
        (arguments(tmp_path / "a", against=("--config " + str(dry),)), "dry_run trains nothing"),
        (arguments(step), "--out is a folder"),
        (arguments(tmp_path / "a", "--jobs", "0"), "--jobs is at least 1"),
        (arguments(whole[0], "--weight-decay", "0.1"), "was trained with another weight_decay"),
    ]
    for args, message in cases:
        done = Race(args, tmp_path / "log").wait()
        assert done.codes[0] in (1, 2) and message in done.output and "Traceback" not in done.output, done.output
        assert not [*(tmp_path / "a").glob("*/checkpoints")]


def test_a_race_can_be_moved_and_its_test_rows_stay_used_up(whole, tmp_path):
    """In another folder, and with a candidate less: what was measured stays, and it says that this was before."""
    out = tmp_path / "moved"
    shutil.copytree(whole[0], out)
    assert Race(arguments(out), tmp_path / "log").wait().codes == [0], (tmp_path / "log").read_text()
    assert figures(out)["candidates"] == figures(whole[0])["candidates"]
    test = json.loads((out / "test.json").read_text())
    other = next(name for name in ("ema", "fast") if name not in test["losses"])
    done = Race(arguments(out, against=[one for one in AGAINST if other in one]), tmp_path / "log").wait()
    assert done.codes == [0] and "and not again for what was changed or added since" in (out / "runs.md").read_text()
    assert json.loads((out / "test.json").read_text()) == test
    (out / "test.json").write_text("{")
    assert "cannot be read; put it back" in Race(arguments(out), tmp_path / "log").wait().output


def test_rows_without_thinking_and_losses_that_are_not_finite_are_no_error(whole, tmp_path):
    """Nor a run from before the losses of rows were kept, beside one that has them."""
    out = tmp_path / "runs"
    for name in ("tiny-42", "tiny-43", "ema-42", "ema-43"):
        shutil.copytree(whole[0] / name, out / name)
        path = out / name / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"eval/think_loss": "nan"} if "eval/loss" in row else row for row in rows]
        if name == "ema-43":
            rows = [
                row | {"eval/loss": "nan", "eval/weighted_loss": "nan"} if row["step"] == 4 else row for row in rows
            ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "tiny-42" / "eval_rows.jsonl").unlink()
    text = write_comparison(sorted(out.iterdir()), "en", tmp_path / "page").read_text()
    assert "| loss of thinking, answer, at the best step | -, " in text
    found = json.loads((tmp_path / "page/runs.json").read_text())["candidates"][1]
    of_43 = (
        found["losses"]["43"] - json.loads((tmp_path / "page/runs.json").read_text())["candidates"][0]["losses"]["43"]
    )
    assert found["rows"][0] == pytest.approx(of_43, rel=1e-6)


def test_groups_of_runs_keep_names_of_their_own(whole, tmp_path):
    """exp-1 and exp-2 of another step file are no `exp` both."""
    for name, source in (("exp-1", "tiny-42"), ("exp-2", "ema-42"), ("run-1", "fast-42"), ("run-2", "fast-43")):
        shutil.copytree(whole[0] / source, tmp_path / "runs" / name)
    text = write_comparison(sorted((tmp_path / "runs").iterdir()), "en", tmp_path).read_text()
    assert "| | exp-1 | exp-2 | run |" in text


def test_an_edited_step_file_is_not_shown_under_its_old_figures(tmp_path):
    """Nor one whose import was edited, nor another memory profile under the figures of `auto`."""
    step, helper = tmp_path / "own.py", tmp_path / "rates.py"
    helper.write_text("RATE = 0.5\n")
    step.write_text("import rates\n\n\ndef lr_multiplier(step, max_steps, config):\n    return rates.RATE * 1.0\n")
    args = arguments(tmp_path / "out", "--seeds", "42", "--test-fraction", "0", against=(step,))
    done = Race(args, tmp_path / "log").wait()
    assert done.codes == [0] and "with one seed, which says nothing about other seeds" in done.output, done.output
    done = Race([*args, "--memory", "32g"], tmp_path / "log").wait()
    assert done.codes == [1] and "tiny-42 was trained with another memory;" in done.output
    for file, old, new in ((helper, "0.5", "0.25"), (helper, "0.25", "0.5"), (step, "1.0", "0.5")):
        file.write_text(file.read_text().replace(old, new))
        done = Race(args, tmp_path / "log").wait()
        assert ("own-42 was trained with another step file" in done.output) == (new != "0.5" or file == step)


def test_a_candidate_may_have_seeds_of_its_own(tmp_path):
    """To see what the seed alone does: the preset against itself."""
    args = arguments(tmp_path / "out", "--test-fraction", "0", "--split-by-seed", "--jobs", "2",
                     against=("other=--seeds 44 45",))  # fmt: skip
    done = Race(args, tmp_path / "log").wait()
    assert done.codes == [0], done.output
    assert status_of(tmp_path / "out/other-45")["status"] == "completed"
    assert "other: evaluated on other validation rows" in done.output
