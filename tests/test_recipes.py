"""Step files: what is refused, what is recorded, and each recipe killed and resumed under every strategy."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, good_row, peaks, settings
from ranks import run
from runs import assert_same_end, metrics_of, newest, weights_and_moments
from safetensors.torch import load_file

from data.base.errors import UserError
from data.batches import make_batch
from loop.start.step_file import load_step_file

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
COMPARE = ("dpo", "kto")  # replies, in tests/test_preference.py
STEP = ROOT / "loop/step.py"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    args = ["tiny", "--dataset", rows, "--max-steps", "20", "--val-fraction", "0.3", "--eval-steps", "10"]
    args += ["--save-steps", "4", "--logging-steps", "1", "--max-length", "192", "--early-stopping-patience", "0"]
    args += ["--num-samples", "0", "--warmup-ratio", "0"]

    def arguments(strategy: str, *more) -> list:
        return [*args, "--gradient-accumulation-steps", 4 if strategy == "one" else 2, *more]

    return arguments


# DDP's state is that of one process, FSDP2's is in shards; references and random numbers are made on each rank, which
# test_methods.py kills too.
KILLED = [(recipe, "one") for recipe in RECIPES if recipe not in COMPARE]
KILLED += [(recipe, "ddp2") for recipe in ("noise", "rho")]
KILLED += [(recipe, "fsdp2") for recipe in ("ema", "muon", "noise", "sam")]


@pytest.mark.integration
@pytest.mark.parametrize(("recipe", "strategy"), KILLED)
def test_a_recipe_killed_and_resumed_ends_with_the_same_bits(recipe, strategy, command, tmp_path):
    short = ["--max-steps", 10, "--eval-steps", 5, "--step-file", ROOT / f"recipes/{recipe}.py", "--output-dir"]
    args = command(strategy, *short)
    for name, fault in (("whole", ""), ("run", "kill_in_step(5)"), ("run", "")):
        outcome = run([*args, tmp_path / name, "--resume"], strategy, fault, tmp_path / "log")
        assert -9 in outcome.codes if fault else set(outcome.codes) == {0}, outcome.output
    assert "resumed from" in outcome.output
    for name in ("whole", "run"):
        (tmp_path / name / "samples.jsonl").touch()
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    losses = [row["eval/loss"] for row in metrics_of(tmp_path / "run") if "eval/loss" in row]
    assert losses[-1] < losses[0] - (0.01 if recipe == "freeze" else 0.1)
    if recipe == "noise":  # the same numbers on any number of ranks
        one = run([*command("one", *args[len(command(strategy)) :]), tmp_path / "one"], "one", "", tmp_path / "log")
        assert one.codes == [0]
        first = [row for row in metrics_of(tmp_path / "one") if "eval/loss" in row]
        assert first[1]["eval/loss"] == pytest.approx(losses[1], abs=1e-4)


EXPECT = re.compile(r"Expect: python train.py ((?:tiny|preference) [^:]*):\s(eval/\S+) (\S+)\.\n")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_ends_where_it_says(recipe, tmp_path):
    """On `tiny` as a reader has it, not the smaller one of the tests."""
    command, name, value = EXPECT.search((ROOT / f"recipes/{recipe}.py").read_text(encoding="utf-8")).groups()
    args = [*command.split(), "--num-samples", 0, "--output-dir", tmp_path / "run"]
    outcome = run(args, "one", "tiny_as_it_is()", tmp_path / "log")
    assert outcome.codes == [0], outcome.output
    last = [row for row in metrics_of(tmp_path / "run") if "eval/loss" in row][-1]
    assert last["step"] == 20 and last[name] == pytest.approx(float(value), abs=0.02)


def steps(recipe, model, examples, accelerator, number=4, **changes):
    """(module, optimizers) of a recipe after some steps."""
    method = load_step_file(str(ROOT / f"recipes/{recipe}.py"))
    config = settings(**changes)
    optimizers = peaks(method.make_optimizers(model, config))
    for step in range(number):
        batch = make_batch(examples[step * 2 : step * 2 + 2], batch_size=1, step=step, seed=step)
        assert method.train_step(model, optimizers, batch, accelerator, 1.0, config).finite
    return method, optimizers


def test_layerwise_rates_act(make_model, examples, accelerator):
    """In AdamW's first step each element moves by its rate."""
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps("layerwise_lr", model, examples, accelerator, number=1)
    top = len(model.causal_lm.model.layers) + 1
    for name, parameter in model.named_parameters():
        depth = int(name.split("layers.")[1][0]) + 1 if "layers." in name else 0 if "embed" in name else top
        moved = (parameter - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * 0.9 ** (top - depth), rel=0.02), name


def test_muon_trains_the_matrices_at_its_own_rate(make_model, examples, accelerator):
    """Muon's update is near orthogonal: its root mean square is that of the scaling, whatever the gradient."""
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, (_, muon) = steps("muon", model, examples, accelerator, number=1)
    held = {p for group in muon.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "layers." in name
        assert (parameter in held) == is_matrix
        if is_matrix:
            update = (parameter - before[name]).double() / 1e-3
            assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.5), name  # AdamW: 1


def test_sam_takes_the_gradient_at_the_worst_point_near_by(make_model, examples, accelerator):
    """Against the two passes written with autograd alone."""
    expected = make_model(dtype=torch.float64)
    batch = make_batch(examples[:2], batch_size=2).micro_batches
    inputs = batch[0].inputs
    parameters = list(expected.parameters())
    first = torch.autograd.grad(expected(**inputs).mean(), parameters)
    norm = torch.cat([gradient.flatten() for gradient in first]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, first, strict=True):
            parameter += 0.05 * gradient / norm
    second = torch.autograd.grad(expected(**inputs).mean(), parameters)
    assert len(batch) == 1

    model, found = make_model(dtype=torch.float64), []
    before = [parameter.detach().clone() for parameter in model.parameters()]

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            found.extend(parameter.grad.clone() for parameter in model.parameters())

    method = load_step_file(str(ROOT / "recipes/sam.py"))
    optimizers = peaks([Keep(model.parameters(), lr=0.0)])
    whole = make_batch(examples[:2], batch_size=2)
    method.train_step(model, optimizers, whole, accelerator, 1.0, settings(max_grad_norm=0))
    for ours, theirs, old in zip(found, second, first, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(ours, old, rtol=1e-4, atol=1e-6)
    for parameter, weight in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, weight)


def test_the_average_is_evaluated_and_is_that_of_the_weights(make_model, examples, accelerator):
    model = make_model()
    method = load_step_file(str(ROOT / "recipes/ema.py"))
    optimizers = peaks(method.make_optimizers(model, settings()))
    with method.evaluated_weights(model, optimizers):  # nothing is averaged yet
        pass
    average = None
    for n in range(1, 6):
        batch = make_batch(examples[n : n + 1], batch_size=1)
        method.train_step(model, optimizers, batch, accelerator, 1.0, settings())
        weight = model.causal_lm.lm_head.weight.detach().double()
        decay = min(0.999, (1 + n) / (10 + n))
        average = weight.clone() if average is None else decay * average + (1 - decay) * weight
    kept = model.causal_lm.lm_head.weight.detach().clone()
    with pytest.raises(KeyError), method.evaluated_weights(model, optimizers):
        torch.testing.assert_close(model.causal_lm.lm_head.weight.double(), average, rtol=1e-5, atol=1e-7)
        raise KeyError  # the weights come back after an error too
    assert torch.equal(model.causal_lm.lm_head.weight, kept) and not torch.allclose(kept.double(), average)


def test_the_average_is_exported(command, tmp_path):
    args = command("one", "--step-file", ROOT / "recipes/ema.py", "--output-dir", tmp_path / "run")
    assert run(args, log=tmp_path / "log").codes == [0]
    state = weights_and_moments(newest(tmp_path / "run"))["optimizer"]["causal_lm.model.norm.weight"]
    exported = load_file(tmp_path / "run/best/model.safetensors")["model.norm.weight"]
    assert torch.equal(exported, state["average"].bfloat16()) and state["updates"] == 20


def edited(tmp_path, name: str, *edits):
    text = STEP.read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


ADAMW = "[torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)]"
BAD = {
    "no_file.py": ([], "there is no step file"),
    "syntax.py": ([("def lr_multiplier(", "def (")], "syntax.py, line"),
    "forgets.py": ([("if p.ndim < 2]", "if p.ndim < 1]")], "norm.weight is in no group"),
    "two.py": ([("fused=True)]", "fused=True), torch.optim.SGD(parameters)]")], "embed_tokens.weight is in 2 groups"),
    "twice.py": ([("if p.ndim < 2]", "if p.ndim < 9]")], "twice.py, line 28: ValueError: some parameters"),
    "one.py": ([(ADAMW, ADAMW[1:-1])], "make_optimizers in one.py returned AdamW; it returns a list"),
    "tuple.py": ([(f"return {ADAMW}", f"o = {ADAMW}[0]\n    return o, o")], "tuple.py returned (AdamW, AdamW)"),
    "no_rate.py": ([(ADAMW, "[torch.optim.Adafactor(groups, lr=None)]")], "no_rate.py"),
    "scheduler.py": (
        [(f"return {ADAMW}", f"o = {ADAMW}\n    torch.optim.lr_scheduler.LambdaLR(o[0], lambda n: 1.0)\n    return o")],
        "write it in lr_multiplier",
    ),
    "closure.py": ([(ADAMW, "[torch.optim.LBFGS(parameters)]")], "closure.py, line"),
    "returns_nothing.py": ([("    return metrics\n", "")], "train_step in returns_nothing.py returned NoneType"),
    "raises.py": ([("import math\n", "import math\n\nnot_there\n")], "raises.py, line 11: NameError: name 'not_there'"),
    "misses.py": ([("import math\n", "import not_there\n")], "misses.py, line 9: ModuleNotFoundError"),
    "typo.py": (
        [("optimizer.zero_grad(", "optimizer.zero_gradient(")],
        "train_step in typo.py, line 78: AttributeError",
    ),
    "nan_rate.py": ([("    warmup_steps = ", "    return math.nan\n    warmup_steps = ")], "nan_rate.py gave nan"),
    "cannot.py": ([(ADAMW, "[torch.zeros(2) @ torch.zeros(3)]")], "make_optimizers in cannot.py, line"),
    "counts.py": (
        [
            ("    return metrics\n", "    SEEN.append(1)\n    return metrics\n"),
            ("import torch\n", "import torch\n\nSEEN = []\n"),
        ],
        "train_step in counts.py changes the global SEEN",
    ),
    "attribute.py": ([("    return metrics\n", "    optimizer.mine = 1\n    return metrics\n")], "changes AdamW.mine"),
    "group.py": (
        [("    return metrics\n", '    optimizers[0].param_groups[0]["k"] = 1\n    return metrics\n')],
        "'k' of group 0 of AdamW",
    ),
    "object.py": (
        [
            (
                "    return metrics\n",
                "    optimizer.state[next(model.parameters())]['x'] = object()\n    return metrics\n",
            )
        ],
        "holds a object",
    ),
    "no_parameter.py": (
        [("    return metrics\n", "    optimizer.state['x']['y'] = 1\n    return metrics\n")],
        "optimizer.state['x'] is of no parameter",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_step_file_is_refused_before_a_weight_is_loaded(name, command, tmp_path):
    edits, message = BAD[name]
    path = edited(tmp_path, name, *edits) if edits else tmp_path / name
    args = command("one", "--step-file", path, "--output-dir", tmp_path / "run")
    outcome = run(args, "one", "kill_in_loading()", tmp_path / "log")
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    assert message in outcome.output and name in outcome.output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_run_says_which_code_trained_it_and_where_that_changed(command, tmp_path):
    """AdamW for 5 steps, another rate for the embeddings for 3, then Muon."""
    out = tmp_path / "run"
    group = '{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},'
    own_rate = '{"params": [model.causal_lm.model.embed_tokens.weight], "lr": 0.1 * config.learning_rate},\n'
    rest = "[p for p in parameters if p.ndim >= 2 and p is not model.causal_lm.model.embed_tokens.weight]"
    slow = edited(tmp_path, "slow.py", (group, own_rate + f'{{"params": {rest}, "name": "layers"}},'))
    args = command("one", "--output-dir", out, "--resume")
    assert run(args, "one", "signal_in_step(4)", tmp_path / "log").codes == [0]
    second = run([*args, "--step-file", slow], "one", "signal_in_step(7)", tmp_path / "log")
    assert second.codes == [0] and "another step file from step 5 on: step.py -> slow.py" in second.output
    shutil.copytree(out, tmp_path / "whole")
    muon = ["--step-file", ROOT / "recipes/muon.py"]
    third = run([*args, *muon], "one", "signal_in_step(11)", tmp_path / "log")
    assert third.codes == [0] and "their state begins anew" in third.output
    assert run([*args, *muon], log=tmp_path / "log").codes == [0]
    whole = [*command("one"), *muon, "--output-dir", tmp_path / "whole", "--resume"]
    assert run(whole, log=tmp_path / "log").codes == [0]
    for name in ("whole", "run"):
        (tmp_path / name / "samples.jsonl").touch()
    assert_same_end(out, tmp_path / "whole")
    entries = json.loads((out / "run.json").read_text())["step_files"]
    assert [(entry["from_step"], entry["optimizers"]) for entry in entries] == [
        (0, ["AdamW"]), (5, ["AdamW"]), (8, ["AdamW", "Muon"]),
    ]  # fmt: skip
    assert (out / "code/step.py").read_bytes() == STEP.read_bytes()
    for entry in entries:
        assert hashlib.sha256((out / "code" / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    report = (out / "report.md").read_text(encoding="utf-8")
    assert all(entry["sha256"][:12] in report for entry in entries) and "从第 8 步起" in report
    rows = {row["step"]: row for row in metrics_of(out) if "train/loss" in row}
    assert rows[7]["train/learning_rate"] == pytest.approx(0.1 * rows[7]["train/learning_rate/layers"])


def test_ranks_that_drift_apart_are_noticed(command, tmp_path):
    """Noise from each rank's own generator: DDP's weights are no longer one model."""
    noise = "    for optimizer in optimizers:\n        for group"
    own = "    for p in model.parameters():\n        p.grad += 1e-3 * torch.randn_like(p)\n"
    path = edited(tmp_path, "drift.py", (noise, own + noise))
    args = command("ddp2", "--step-file", path, "--output-dir", tmp_path / "run")
    outcome = run(args, "ddp2", "", tmp_path / "log")
    assert set(outcome.codes) == {2} and "Traceback" not in outcome.output, outcome.output
    assert "drifted apart" in outcome.output and "batch.seed" in outcome.output
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_the_preset_better_on_the_embedded_sample_and_a_report_that_names_what_it_does(tmp_path):
    out = tmp_path / "run"
    args = ["better", "--dataset", "sample:60", "--model", "tiny", "--mixed-precision", "no", "--max-steps", 4]
    args += ["--eval-steps", 2, "--num-samples", 0, "--max-length", 512, "--language", "en", "--output-dir", out]
    done = run(args, log=tmp_path / "log")
    assert done.codes == [0], done.output
    assert [step["file"] for step in json.loads((out / "run.json").read_text())["step_files"]] == ["ema.py"]
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "- the step file `code/ema.py`: EMA: an exponential average" in report
    assert "- `learning_rate` 2e-05 instead of 0.0001\n- `warmup_ratio` 0.05 instead of 0.0\n" in report


def test_a_step_file_is_what_it_changes(make_model, examples, accelerator, tmp_path):
    """A loss of its own acts in the step of loop/step.py; a step that wraps the original does not call itself, and the
    original it wraps uses the file's own loss."""
    own = tmp_path / "own.py"
    own.write_text(
        "from loop import step\nfrom loop.step import forward_backward as plain, train_step as original\n"
        "TIMES = 2\nTWICE = 2 * TIMES\n\n"
        "def forward_backward(model, batch, accelerator, config):\n"
        "    sums = plain(model, batch, accelerator, config)\n"
        "    for p in model.parameters():\n        p.grad *= TWICE\n    return sums\n\n"
        "def train_step(*args):\n    assert step.train_step is original\n    return original(*args)\n"
    )
    norms = {}
    for name, settings_of_file in {"loop/step.py": [], str(own): [], str(own) + " ": ["TIMES=3"]}.items():
        method, model = load_step_file(name.strip(), settings_of_file), make_model()
        optimizers = peaks(method.make_optimizers(model, settings()))
        batch = make_batch(examples[:2], batch_size=1)
        norms[name] = method.train_step(model, optimizers, batch, accelerator, 1.0, settings()).grad_norm
    plain, doubled, tripled = norms.values()
    assert doubled == pytest.approx(4 * plain, rel=1e-6) and tripled == pytest.approx(6 * plain, rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("RHO", "NAME=VALUE sets a constant"),
        ("ETA=1", "its constants are RHO"),
        ("RHO=much", "the file has 0.05, so it takes a value of type float"),
        ("RHO=True", "a value of type float"),
        ("RHO=nan", "a value of type float"),
        ("RHO=1e400", "a value of type float"),
        ("RHO={1}", "numbers, texts, lists and the like"),
    ],
)
def test_a_constant_that_cannot_be_set_is_refused(setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_step_file("recipes/sam.py", [setting])


def test_constants_are_set_and_a_name_that_is_almost_one_is_told(tmp_path, capsys):
    assert load_step_file("recipes/sam.py", ["RHO = 1"]).RHO == 1.0
    own = tmp_path / "own.py"
    own.write_text(
        'TEXT: str = "a"\nPAIR = (1, 2)\nNONE = None\nN = 3\n\ndef train_steps():\n    pass\n\n'
        "def lr_multiplier(step, max_steps, config):\n    return 1.0\n"
    )
    method = load_step_file(str(own), ["TEXT=b=c", "PAIR=(3, 4)", "NONE=7", "N=4"])
    assert (method.TEXT, method.PAIR, method.NONE, method.N) == ("b=c", (3, 4), 7, 4)
    assert method.STEP_SET == {"TEXT": "b=c", "PAIR": (3, 4), "NONE": 7, "N": 4}
    assert "train_steps is no function of a step; is train_step meant?" in capsys.readouterr().err
    with pytest.raises(UserError, match="so it takes a value of type int"):
        load_step_file(str(own), ["N=4.5"])
    own.write_text("x = 1\n")
    with pytest.raises(UserError, match="has none of the functions"):
        load_step_file(str(own))


def test_what_a_step_file_imports_is_recorded(command, tmp_path):
    """From beside it and below, and from the project outside of loop/ and model/; a constant that is set anew counts
    as another step file."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/inner.py").write_text("VALUE = 1\n")
    (tmp_path / "beside.py").write_text("from parts.inner import VALUE\n")
    own = tmp_path / "own.py"
    own.write_text(
        "\ufeffimport beside\nfrom data.template import OPEN\nfrom loop.step import train_step as plain\n"
        "from model.loss import SFTModel\nfrom recipes.sam import forward_backward\n\nRATE = 1.0\n\n"
        "def lr_multiplier(step, max_steps, config):\n    return RATE\n"
    )
    out = tmp_path / "run"
    args = command("one", "--step-file", own, "--max-steps", 4, "--output-dir", out, "--resume")
    assert run(args, "one", "signal_in_step(1)", tmp_path / "log").codes == [0]
    second = run([*args, "--step-set", "RATE=0.5"], log=tmp_path / "log")
    assert second.codes == [0] and "another step file from step 2 on: own.py -> own.py" in second.output
    assert "(RATE = 0.5)" in (out / "report.md").read_text(encoding="utf-8")
    first, second = json.loads((out / "run.json").read_text())["step_files"]
    names = ["beside.py", "data/template.py", "loop/step.py", "parts/inner.py", "recipes/sam.py"]
    assert sorted(first["imports"]) == names and second["set"] == {"RATE": 0.5} and "set" not in first
    for name in names:
        assert hashlib.sha256((out / "code" / name).read_bytes()).hexdigest() == first["imports"][name]


def test_recipes_are_short():
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 45, path


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    """A file of that name there comes first."""
    monkeypatch.chdir(tmp_path)
    assert load_step_file("recipes/ema.py").DECAY == 0.999
    (tmp_path / "recipes").mkdir()
    code = (ROOT / "recipes/ema.py").read_text(encoding="utf-8").replace("0.999", "0.5")
    (tmp_path / "recipes/ema.py").write_text(code, encoding="utf-8")
    assert load_step_file("recipes/ema.py").DECAY == 0.5
