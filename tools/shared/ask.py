"""Many replies of a model, local or behind an OpenAI-compatible endpoint, and a file of lines that are made from them.

What was made is in the file after every CHUNK rows. A file that was cut off goes on where it ended.
"""

import argparse
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

from data.base.console import warn
from data.base.errors import UserError, cannot_import, one_line
from data.reading.rows import Row, read_given
from data.reading.texts import split_thinking
from data.template import generation_prompt
from loop.config import TrainConfig
from loop.record.run_folder import read_run
from model.generate import Reply, chat_tokenizer, ready_to_generate, reply_to
from model.loss import SFTModel
from tools.reports.record import read_rows, read_side

CHUNK = 16  # rows at a time
ASKED = "asked"
RETRIES = 3  # of a request that failed, with pauses
THINKING = 4096  # tokens more for a served model that thinks without being asked to
MAX_USELESS = 64  # rows in a row of which nothing can be used: then something is wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", metavar="ROWS", help="a run's folder (its training rows), or a dataset as in train.py")
    parser.add_argument("--model", help="a folder or a ModelScope id; default: the model that the run began with")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint that answers, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--url-model", metavar="NAME", help="its name of the model; OPENAI_API_KEY is its key")
    parser.add_argument("--columns", nargs="+", default=[], help="which column is which, as in train.py")
    parser.add_argument("--out", type=Path, help="a new .jsonl file")
    parser.add_argument("--resume", action="store_true", help="go on with a file that was cut off")


def read_source(args: argparse.Namespace, name: str) -> tuple[list[Row], dict]:
    """The rows that args name, and the settings of their run; of rows without a run these have no `dataset`. Fills in
    args.model and args.out. name: of the file in a run's folder. Raises UserError."""
    folder = Path(args.rows)
    is_run = (folder / "run.json").is_file()
    run = read_run(folder) if is_run else {"system_prompt": TrainConfig.system_prompt, "max_length": 2048, "seed": 0}
    given = read_given(args.columns)
    rows = read_side(folder, "train") if is_run else read_rows(args.rows, run["system_prompt"], given)
    args.model = args.model or run.get("model")
    args.out = args.out or (folder / name if is_run else None)
    if is_run and args.columns:
        raise UserError(f"{args.rows} is a run, which knows its columns: leave --columns out")
    if not args.model or not args.out:
        raise UserError(f"{args.rows} is no run: name the model with --model and a file with --out")
    if not rows:
        raise UserError(f"{args.rows} has no training rows")
    if args.out.exists() and not args.resume:
        raise UserError(f"{args.out} exists already; --resume goes on with it, --out names another file")
    if (args.url is None) != (args.url_model is None):
        raise UserError("--url and --url-model come together: where the endpoint is, and what it calls the model")
    return rows, run


class Local:
    """A model of this process."""

    def __init__(self, name: str, model: SFTModel, tokenizer):
        """tokenizer: that of training, for `tiny`; others are asked in their own form, which may have no thinking."""
        self.causal_lm = model.causal_lm
        self.tokenizer = tokenizer if name == "tiny" else chat_tokenizer(name)

    def ask(
        self, dialogues: list[list[dict]], max_new_tokens: int, thinking: bool, seed: int, **sampling
    ) -> list[Reply]:
        """Drawn with the model's own generation_config, but for sampling."""
        torch.manual_seed(seed)
        own = self.causal_lm.generation_config
        own = {name: getattr(own, name) for name in ("temperature", "top_k", "top_p")}
        sampling = {"do_sample": True, **own, **sampling}
        prompts = [generation_prompt(dialogue, self.tokenizer, thinking) for dialogue in dialogues]
        with ready_to_generate(self.causal_lm):
            return reply_to(
                self.causal_lm,
                self.tokenizer,
                prompts,
                max_new_tokens,
                generate=lambda **inputs: self.causal_lm.generate(**(inputs | sampling)),
            )


class Endpoint:
    """A model behind an OpenAI-compatible endpoint; it thinks or not as it pleases."""

    def __init__(self, url: str, model: str):
        try:
            import openai
        except ImportError as error:
            raise cannot_import(error, "openai", "endpoint") from None
        self.url, self.model, self.failure = url, model, openai.OpenAIError
        self.refusals = (openai.BadRequestError, openai.UnprocessableEntityError)
        self.warned = False
        key = os.environ.get("OPENAI_API_KEY") or "none"
        if not key.isascii() or not is_url(url):
            raise UserError("OPENAI_API_KEY is no key" if is_url(url) else f"--url {url!r} is no http address")
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES)

    def ask(self, dialogues: list[list[dict]], max_new_tokens: int, thinking: bool, **sampling) -> list[Reply]:
        """Raises UserError if the endpoint is down."""
        options = {"max_tokens": max_new_tokens + (0 if thinking else THINKING), **sampling}
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda dialogue: self.reply(dialogue, **options), dialogues))

    def reply(self, dialogue: list[dict], **options) -> Reply:
        """Without an answer if it is not one that can be read."""
        try:
            found = self.client.chat.completions.create(model=self.model, messages=dialogue, **options)
        except self.refusals as error:  # of this one request, by a filter of contents, say
            if not self.warned:
                warn(f"{self.url} refused a request: {one_line(error)}")
            self.warned = True
            return Reply("", "", closed=False, stopped=False)
        except self.failure as error:
            raise UserError(
                f"{self.url} does not answer: {one_line(error)}; what was made is kept, and --resume goes on"
            ) from None
        except ValueError:  # no JSON
            return Reply("", "", closed=False, stopped=False)
        try:
            choice = found.choices[0]
            think, answer = split_thinking(choice.message.content)
            fields = (getattr(choice.message, name, None) for name in ("reasoning_content", "reasoning"))
            think = think or next(filter(None, fields), "")
            return Reply(think.strip(), answer.strip(), closed=True, stopped=choice.finish_reason == "stop")
        except (AttributeError, IndexError, TypeError, ValueError):  # another answer than the protocol's
            return Reply("", "", closed=False, stopped=False)


def is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def make_lines(path: Path, number: int, make: Callable, position: Callable) -> Counter:
    """Appends to a file what `make` returns for a range of numbers: of each a line or None, and a Counter of what
    became of it: `used` if it is of use, ASKED if the model was asked at all. position: of the lines that are there,
    the number to go on with; None if they are of other rows.

    CHUNK rows at a time, the same ones after --resume, so that a local model draws the same. Rows of no use are kept
    back until the next one that is of use, so that --resume asks for them again if an endpoint had begun to answer
    nonsense. Raises UserError if MAX_USELESS of them follow each other.
    """
    lines, whole = lines_of(path)
    start = position(lines) if lines else 0
    if start is None:
        raise UserError(f"{path} was made from other rows; name another file with --out")
    counts, held = Counter(), []
    useless = 0  # rows asked in vain since the last one that was of use
    with path.open("ab") as file, tqdm(total=number, initial=start, unit="row", disable=None) as bar:
        file.truncate(len(whole))
        for first in range(start - start % CHUNK, number, CHUNK):
            numbers = range(first, min(first + CHUNK, number))
            for line, became in make(numbers)[max(0, start - first) :]:
                counts += became
                held.append(line)
                useless = 0 if became["used"] else useless + became[ASKED]
                if not useless:
                    file.writelines(map(to_bytes, filter(None, held)))
                    file.flush()
                    held = []
            if useless >= MAX_USELESS or (useless and numbers[-1] + 1 == number and not counts["used"] and not lines):
                raise UserError(
                    f"nothing could be used of the replies to the last {useless} rows (of all in this launch: "
                    f"{reasons(counts)}); {path} has what was made before, and --resume goes on"
                )
            bar.update(len(numbers))
        file.writelines(map(to_bytes, filter(None, held)))
    return counts


def to_bytes(line: dict) -> bytes:
    return json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


def lines_of(path: Path) -> tuple[list[dict], bytes]:
    """The lines that a file holds, and their text, without one that a kill cut off. Raises UserError if it holds
    something else."""
    if not path.exists():
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        return [], b""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) for line in lines) or (text and not lines):
        raise UserError(f"{path} is not what this tool writes; name another file with --out")
    return lines, whole


def say_how_to_train(args: argparse.Namespace, settings: dict, datasets: list[str]) -> None:
    """The flags that these rows bring; those of the run stay."""
    flags = ["--dataset", *datasets]
    data = Path(args.rows) / "data"
    if "dataset" in settings:
        flags += ["--val-dataset", str(data / "val.jsonl")]
        flags += ["--exclude", str(data / "test.jsonl")] if (data / "test.jsonl").exists() else []
    if columns := args.columns or settings.get("columns"):
        flags += ["--columns", *columns]
    print(f"train on it, with the run's other flags: accelerate launch train.py {shlex.join(flags)} --output-dir OTHER")


def reasons(counts: Counter) -> str:
    found = ", ".join(f"{what} {count:,}" for what, count in counts.most_common() if what not in ("used", ASKED))
    return found or "none"
