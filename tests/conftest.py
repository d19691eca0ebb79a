import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# Before torch is imported: one thread a process, nobody's SwanLab account, no hub.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"ACCELERATE_USE_CPU": "true", "SWANLAB_MODE": "disabled", "NO_COLOR": "1"}
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more would be a pool of processes, which takes seconds to begin
for name in ("SWANLAB_API_KEY", "SWANLAB_PROJECT", "FORCE_COLOR"):
    os.environ.pop(name, None)

# As in a job in the background, or under nohup; tests send them.
for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), default)

import pytest
import small  # noqa: F401
import torch
from accelerate import Accelerator
from ranks import run

from data.encode import encode_rows
from data.split import Split, load_split
from loop.config import PRESETS, Resolved
from model.export import export
from model.loss import SFTModel
from model.qwen3 import load_model
from model.tiny import tiny_tokenizer

ROOT = Path(__file__).parent.parent
# Real rows and the real tokenizer, where they lie beside the checkout; tests that use them skip without.
REAL = ROOT.parent / "shared" / "real"
SYSTEM = "你是一个医学专家。"
THINK, ANSWER = "先想一想，再回答。", "多喝水🙂，注意休息。"  # what the model of `best` replies


def settings(**changes) -> Resolved:
    """Of a step in a test: peak 1e-3, no warm-up."""
    own = {"learning_rate": 1e-3, "warmup_ratio": 0.0, "memory": "speed"}
    return Resolved(**{**dataclasses.asdict(PRESETS["tiny"]), **own, **changes})


def load(*datasets, **changes) -> Split:
    """The split of a tenth for validation, with a short system prompt; datasets: 120 rows of the sample without one."""
    names = tuple(map(str, datasets)) or ("sample:120",)
    return load_split(settings(**{"dataset": names, "system_prompt": SYSTEM, "val_fraction": 0.1} | changes))


def peaks(optimizers: list) -> list:
    """Notes each group's peak, as `prepare` does."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A folder with the small model, for runs of which some are forked and some are not."""
    split = load(system_prompt="")
    tokenizer = tiny_tokenizer(split.texts())
    torch.manual_seed(1)
    model = load_model("tiny", tokenizer, gradient_checkpointing=False)
    folder = tmp_path_factory.mktemp("model") / "small"
    export(model, model.state_dict(), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def best(tmp_path_factory):
    """A model that has learned one reply to every question, in dialogues of up to three turns."""
    folder = tmp_path_factory.mktemp("chat")
    reply = {"role": "assistant", "content": ANSWER, "reasoning_content": THINK}
    rows = [
        {"messages": [m for k in range(turns) for m in ({"role": "user", "content": f"第{i + k}个问题？"}, reply)]}
        for turns in (1, 2, 3)
        for i in range(15)
    ]
    rows += [{"question": f"第{i}个问题？", "think": "", "answer": ANSWER} for i in range(20, 35)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "tiny",
        "--dataset",
        folder / "rows.jsonl",
        "--max-steps",
        "100",
        "--eval-steps",
        "100",
        "--num-samples",
        "2",
    ]
    done = run([*args, "--output-dir", folder / "run"], log=folder / "log")
    assert done.codes == [0] and "stopped 100%" in done.output, done.output
    return folder / "run" / "best"


@pytest.fixture(autouse=True)
def english(monkeypatch):
    """Messages stay English, whatever the language of a run; tests/test_language.py has the Chinese ones."""
    monkeypatch.setattr("data.base.language.SPOKEN", English(language="en"))


class English(dict):
    def __setitem__(self, name, value) -> None:
        pass


@pytest.fixture
def accelerator():
    """A new one for each test, for some tests reset what all of them share."""
    return Accelerator(mixed_precision="no")


@pytest.fixture(scope="session")
def split():
    return load()


@pytest.fixture(scope="session")
def tokenizer(split):
    return tiny_tokenizer(split.texts())


@pytest.fixture(scope="session")
def examples(split, tokenizer):
    return encode_rows(split.train, tokenizer, max_length=512, overlong="error")[0]


@pytest.fixture
def make_model(tokenizer):
    """A fresh tiny SFTModel, the same weights at every call."""

    def make(
        gradient_checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        loss_chunk: int = 10**6,
    ) -> SFTModel:
        torch.manual_seed(0)
        return SFTModel(load_model("tiny", tokenizer, gradient_checkpointing, compile=compile), loss_chunk).to(dtype)

    return make


@pytest.fixture
def train_py():
    """Runs `python train.py ...` (or another launcher) as a user would, from the repository root."""

    def run(*args, launcher=(sys.executable,), check=True, timeout=180, **env) -> subprocess.CompletedProcess:
        """env: variables to set, or None to leave out"""
        command = [*launcher, "train.py", *map(str, args)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={name: value for name, value in {**os.environ, **env}.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    return run


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool's main; returns (exit status, what it said)."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (objects, or raw bytes for broken lines) to a file and returns its path."""

    def write(rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def good_row(index: int) -> dict:
    return {"question": f"第{index}个问题？", "think": f"先想第{index}步。\n", "answer": f"第{index}个回答。"}
