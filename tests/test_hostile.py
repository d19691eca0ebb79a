"""Broken rows and settings, folders that want to execute something, and secrets."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT, good_row, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run
from runs import files_of, newest, weights_and_moments
from transformers import AutoConfig, AutoModelForCausalLM

import train
from data.base.errors import UserError
from data.base.files import write_json, write_lines
from data.encode import encode_rows
from data.split import split_files
from loop.config import TrainConfig
from loop.record.checkpoint import fingerprints
from loop.record.run_folder import claim
from loop.start.command_line import parse_config
from model.export import export
from model.qwen3 import load_model

# --- rows ---------------------------------------------------------------------------------------------

TEXT = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=st.characters(), max_size=20),  # halves of characters too
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "<|x|>", "<|im_",
             "end|>", "\x00", "\u2028", "\ufeff", "\n", " ", "../../etc/passwd", "{{ 7*7 }}", "{% raw %}", "医",
             "👩\u200d⚕️"]
        ),
        max_size=6,
    ).map("".join),
)  # fmt: skip
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", 3]), "content": TEXT | VALUE},
    optional={"reasoning_content": TEXT | VALUE, "tool_calls": VALUE},
)
ROW = st.one_of(
    st.fixed_dictionaries({"question": TEXT, "think": TEXT, "answer": TEXT}),
    st.fixed_dictionaries({}, optional={"question": VALUE, "think": VALUE, "answer": VALUE, "messages": VALUE}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=5)}),
    VALUE,
).map(lambda row: json.dumps(row).encode())
LINE = st.one_of(ROW, ROW, ROW.map(lambda line: line[: len(line) // 2]), st.binary(max_size=40))
COUNTS = [pytest.param(300, id="300"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_any_row_is_trained_on_or_listed(count, tokenizer, tmp_path):
    """Each generated line stands among 19 good ones, so that one bad row is within what a run bears."""
    good = [json.dumps(good_row(i)).encode() for i in range(19)]
    starts, end = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    path, folder = tmp_path / "in" / "rows.jsonl", tmp_path / "out"
    path.parent.mkdir()

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(LINE, st.integers(0, 19))
    def check(line, position):
        path.write_bytes(b"\n".join([*good[:position], line, *good[position:]]) + b"\n")
        try:
            split = load(path, val_fraction=0.2, seed=1)
        except UserError as error:  # a line that falls apart into several bad ones
            assert "rows are unusable" in str(error)
            return
        assert len(split.train) + len(split.val) + len(split.report["problems"]) == split.report["rows"] >= 19
        for rows in (split.train, split.val):
            for example in encode_rows(rows, tokenizer, max_length=128, overlong="truncate")[0]:
                ids = example.input_ids.tolist()
                assert ids[-1] == end and ids.count(end) == ids.count(starts) and len(ids) <= 128
                assert 0 < example.prompt_length <= example.answer_start < len(ids)
        folder.mkdir(exist_ok=True)
        for name, lines in split_files(split).items():
            write_lines(folder / name, lines)
        assert sorted(path.name for path in folder.iterdir()) == [
            "data_report.json", "train.jsonl", "train_format.jsonl", "val.jsonl", "val_format.jsonl",
        ]  # fmt: skip
        assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
        for name in ("train", "val"):
            lines = (folder / f"{name}.jsonl").read_bytes().splitlines()
            assert len([json.loads(line) for line in lines]) == len(getattr(split, name))

    check()


# --- settings -----------------------------------------------------------------------------------------

FIELDS = {field.name: getattr(TrainConfig, field.name) for field in dataclasses.fields(TrainConfig)}
SETTING = st.one_of(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | TEXT,
    st.lists(st.integers(), max_size=2),
    st.dictionaries(TEXT, st.integers(), max_size=2),
    st.sampled_from(["bf16", "no", "linear", "drop", "offline", "tiny", "sample", "1e-4", ".inf", "0", "yes"]),
)
NAME = st.sampled_from(sorted(FIELDS)) | st.sampled_from(["learning-rate", "Seed", "lr", ""]) | TEXT
YAML = st.one_of(
    st.dictionaries(NAME, SETTING, max_size=4).map(
        lambda values: yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "replace")
    ),
    # settings as they were, some of them said again: what is accepted goes on
    st.sets(st.sampled_from(sorted(FIELDS))).map(lambda names: yaml.safe_dump({n: FIELDS[n] for n in names}).encode()),
    st.text(alphabet=string.printable, max_size=60).map(str.encode),
    st.binary(max_size=40),
    st.sampled_from([b"!!python/object/apply:os.system ['touch hacked']", b"a: &a [*a]", b"- 1", b"seed: 1\nseed: 2"]),
)  # fmt: skip
CONFIG_COUNTS = [pytest.param(24, id="24"), pytest.param(500, id="500", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", CONFIG_COUNTS)
def test_any_configuration_file_is_taken_or_refused(count, tmp_path, monkeypatch):
    """Refused with one message that names the file, or good for a dry run and for claiming its folder."""
    monkeypatch.chdir(tmp_path)
    outcomes = {"taken": 0, "refused": 0}
    file = tmp_path / "settings.yaml"

    def unreachable(*_):
        raise UserError("ModelScope is out of reach")

    monkeypatch.setattr("data.reading.source.download", unreachable)
    monkeypatch.setattr("model.qwen3.download", unreachable)

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(YAML)
    def check(text):
        file.write_bytes(text)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                AcceleratorState._reset_state(reset_partial_state=True)
                config = parse_config(["tiny", "--config", str(file)])
                train.main(["tiny", "--config", str(file), "--dry-run"])
                folder = tmp_path / "runs" / config.output_dir.lstrip("/")
                if ".." not in config.output_dir:
                    with contextlib.suppress(UserError), claim(folder, resume=False):
                        pass
                outcomes["taken"] += 1
            except SystemExit as exit:
                assert exit.code == 2
                assert said.getvalue().startswith("train.py: ") and "Traceback" not in said.getvalue()
                outcomes["refused"] += 1
        assert not (tmp_path / "hacked").exists()

    check()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert min(outcomes.values()) > count / 20, outcomes


# --- folders that want to execute something -----------------------------------------------------------


class Evil:
    """Unpickled it leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def model_folder(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = load_model("tiny", tokenizer, gradient_checkpointing=False)
    export(model, model.state_dict(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


SHORT = ["tiny", "--max-steps", "2", "--save-steps", "1", "--max-length", "256", "--sample-max-new-tokens", "8"]


def test_a_pickle_in_a_model_folder_is_not_opened(model_folder, tmp_path):
    trace = tmp_path / "trace"
    for remove in (["model.safetensors"], []):
        (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trace)))
        for name in remove:
            (model_folder / name).rename(tmp_path / name)
        args = [*SHORT, "--model", model_folder, "--output-dir", tmp_path / f"run-{len(remove)}"]
        outcome = run(args, log=tmp_path / "log")
        assert outcome.codes == [2 if remove else 0] and "Traceback" not in outcome.output, outcome.output
        for name in remove:
            (tmp_path / name).rename(model_folder / name)
        assert not trace.exists()


@pytest.mark.parametrize("model_type", ["qwen3", "evil"])
def test_code_in_a_model_folder_is_not_executed(model_type, model_folder, tmp_path):
    trace = tmp_path / "trace"
    (model_folder / "evil.py").write_text(f"import os; os.mkdir({str(trace)!r})")
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit_json(model_folder / "config.json", auto_map=classes, model_type=model_type)
    edit_json(model_folder / "tokenizer_config.json", auto_map=classes)
    outcome = run([*SHORT, "--model", model_folder, "--output-dir", tmp_path / "run"], log=tmp_path / "log")
    assert outcome.codes == [0 if model_type == "qwen3" else 2] and "Traceback" not in outcome.output, outcome.output
    assert not trace.exists()


@pytest.mark.parametrize("place", [".metadata", "shard"])
def test_a_pickle_in_a_checkpoint_is_not_opened(place, tmp_path):
    """The manifest is right, as its author would make it."""
    trace, args = tmp_path / "trace", [*SHORT, "--output-dir", tmp_path / "run", "--resume"]
    assert run(args, "one", "signal_in_step(0)", log=tmp_path / "log").codes == [0]
    folder = newest(tmp_path / "run")
    if place == ".metadata":
        (folder / "state/.metadata").write_bytes(pickle.dumps(Evil(trace)))
    else:
        state = weights_and_moments(folder)
        for kept in state["optimizer"].values():
            kept["step"] = Evil(trace)
        shutil.rmtree(folder / "state")
        dcp.save(state, checkpoint_id=folder / "state", no_dist=True)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    write_json(folder / "manifest.json", fingerprints(folder, files))
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    assert "cannot go on from" in outcome.output and not trace.exists()


def test_a_checkpoint_of_another_model_is_refused(tokenizer, model_folder, tmp_path):
    args = [*SHORT, "--output-dir", tmp_path / "run", "--resume", "--model", model_folder]
    assert run(args, "one", "signal_in_step(0)", log=tmp_path / "log").codes == [0]
    config = AutoConfig.from_pretrained(model_folder)
    config.num_hidden_layers, config.layer_types, config.intermediate_size = 1, config.layer_types[:1], 96
    model = AutoModelForCausalLM.from_config(config)
    export(model, model.state_dict(), tokenizer, tmp_path / "other")
    before = files_of(tmp_path / "run/checkpoints")
    outcome = run([*args[:-1], tmp_path / "other"], log=tmp_path / "log")
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    assert "cannot go on from" in outcome.output and "--model" in outcome.output
    assert files_of(tmp_path / "run/checkpoints") == before


# --- secrets ------------------------------------------------------------------------------------------


def test_secrets_reach_no_output(tmp_path):
    """Keys in the environment and a token in the git remote; then every byte of every output is searched."""
    names = ["SWANLAB_API_KEY", "HF_TOKEN", "MODELSCOPE_API_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"]
    names += ["AWS_SECRET_ACCESS_KEY"]
    secrets = {name: f"s3cr3t{index}X9fQ2vLkT7" for index, name in enumerate(names)}
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://me:s3cr3tREMOTE@example.org/a.git"], check=True)
    (tmp_path / "home").mkdir()
    args = [*SHORT, "--output-dir", "run", "--swanlab-mode", "offline"]
    environment = {k: v for k, v in os.environ.items() if k != "SWANLAB_MODE"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args],
        cwd=tmp_path,
        env={**environment, **secrets, "HOME": str(tmp_path / "home")},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert list((tmp_path / "run/swanlog").rglob("*.swanlab")) and (tmp_path / "run/best").is_dir()
    outputs = {**files_of(tmp_path / "run"), **files_of(tmp_path / "home"), "out": done.stdout, "err": done.stderr}
    assert [name for name, content in outputs.items() if b"s3cr3t" in content] == []


def test_a_member_of_an_enum_is_all_that_getattr_may_name():
    """Python 3.11.0 to 3.11.3 pickle one as getattr(kind, name)."""
    import io
    import pickle

    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

    from loop.record.safe_pickle import MetadataUnpickler

    class Attribute:
        def __init__(self, *of):
            self.of = of

        def __reduce__(self):
            return getattr, self.of

    def read(*of):
        return MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(*of)))).load()

    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert read(_MEM_FORMAT_ENCODING, member.name) is member
    with pytest.raises(pickle.UnpicklingError):
        read(TensorProperties, "__init__")
    with pytest.raises(KeyError):
        read(_MEM_FORMAT_ENCODING, "__init__")
