"""Many replies of a model, local or behind an OpenAI-compatible endpoint, and a file of rows that are made from them.

What was made is in the file after every CHUNK questions. A file that was cut off goes on where it ended.
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
from transformers import GenerationConfig

from data.base.console import warn
from data.base.errors import UserError, cannot_import, one_line
from data.reading.rows import Row, read_given
from data.reading.texts import split_thinking
from data.template import generation_prompt
from loop.config import TrainConfig
from loop.record.run_folder import read_run
from model.generate import Reply, chat_tokenizer, generate_ids, ready_to_generate, reply_to
from model.loss import SFTModel
from model.tiny import TINY
from tools.shared.runs import read_rows, read_side

CHUNK = 16  # questions at a time
RETRIES = 3  # of a request that failed, with pauses
THINKING = 4096  # extra tokens for a server whose model thinks although thinking is off
MAX_USELESS = 64  # questions in a row of which nothing can be used: then something is wrong
OF = "of"  # column: the question that a row was made from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", metavar="ROWS", help="a run's folder (its training rows), or a dataset as in train.py")
    parser.add_argument("--model", help="a folder or a hub id; default: the model that the run began with")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint that answers, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--url-model", metavar="NAME", help="its name of the model; OPENAI_API_KEY is its key")
    parser.add_argument("--columns", nargs="+", default=[], help="which column is which, as in train.py")
    parser.add_argument("--out", type=Path, help="a new .jsonl file")
    parser.add_argument("--resume", action="store_true", help="go on with a file that was cut off")


def read_source(args: argparse.Namespace, name: str, side: str = "train") -> tuple[list[Row], dict]:
    """The rows that args name (of a run those of one side), each question once, and the settings of their run; of rows
    without a run these have no `dataset`. Fills in args.model and args.out. name: of the file in a run's folder.
    Raises UserError."""
    folder = Path(args.rows)
    is_run = (folder / "run.json").is_file()
    run = read_run(folder) if is_run else {"system_prompt": TrainConfig.system_prompt, "max_length": 2048, "seed": 0}
    rows = read_side(folder, side) if is_run else read_rows(args.rows, run["system_prompt"], read_given(args.columns))
    args.model = args.model or run.get("model")
    args.out = args.out or (folder / name if is_run else None)
    if is_run and args.columns:
        raise UserError(f"{args.rows} is a run, which knows its columns: leave --columns out")
    if not args.model or not args.out:
        raise UserError(f"{args.rows} is no run: name the model with --model and a file with --out")
    if not rows:
        raise UserError(f"{args.rows} has no rows to ask")
    if args.out.exists() and not args.resume:
        raise UserError(f"{args.out} exists already; --resume goes on with it, --out names another file")
    if (args.url is None) != (args.url_model is None):
        raise UserError("--url and --url-model come together: where the endpoint is, and what it calls the model")
    return list({question_of(row): row for row in reversed(rows)}.values())[::-1], run


def question_of(row: Row) -> str:
    """What a row asks, all turns of it."""
    return "\n".join(row.asked)


class Local:
    """A model of this process."""

    def __init__(self, name: str, model: SFTModel, tokenizer):
        """tokenizer: that of training. `ask` takes the model's own form, which may have no thinking, if it has one."""
        self.causal_lm, self.trained = model.causal_lm, tokenizer
        self.tokenizer = tokenizer if name in TINY else chat_tokenizer(name)

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

    def sample(self, dialogues: list[list[dict]], max_new_tokens: int, seed: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, reply) of each as token ids, in the form that is trained. Drawn from the model's own probabilities:
        temperature 1, nothing cut off or held down by its generation_config."""
        torch.manual_seed(seed)
        own = self.causal_lm.generation_config
        plain = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
        prompts = [generation_prompt(dialogue, self.trained) for dialogue in dialogues]
        try:
            self.causal_lm.generation_config = plain
            with ready_to_generate(self.causal_lm):
                return generate_ids(self.causal_lm, self.trained, prompts, max_new_tokens, do_sample=True,
                                    temperature=1.0, top_k=0, top_p=1.0)  # fmt: skip
        finally:
            self.causal_lm.generation_config = own


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
            choice = found.choices[0]
            think, answer = split_thinking(choice.message.content)
            fields = (getattr(choice.message, name, None) for name in ("reasoning_content", "reasoning"))
            think = think or next(filter(None, fields), "")
            return Reply(think.strip(), answer.strip(), closed=True, stopped=choice.finish_reason == "stop")
        except self.refusals as error:  # of this one request, by a filter of contents, say
            if not self.warned:
                warn(f"{self.url} refused a request: {one_line(error)}")
            self.warned = True
        except self.failure as error:
            raise UserError(
                f"{self.url} does not answer: {one_line(error)}; what was made is kept, and --resume goes on"
            ) from None
        except (AttributeError, IndexError, TypeError, ValueError):  # no JSON, or not the protocol's
            pass
        return Reply("", "", closed=False, stopped=False)


def is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def make_rows(path: Path, questions: list[str], make: Callable[[range], list[tuple[list[dict], str]]]) -> Counter:
    """Appends to a file the rows that `make` returns for each of a range of questions, with the reason if they are
    fewer than could be. Returns the reasons of this launch.

    CHUNK questions at a time, the same ones after --resume, so that a local model draws the same; it goes on after the
    last question of which the file has a row. Raises UserError if MAX_USELESS questions in a row give none.
    """
    rows, whole = rows_of(path)
    start = questions.index(rows[-1].get(OF)) + 1 if rows and rows[-1].get(OF) in questions else 0
    if rows and not start:
        raise UserError(f"{path} was made from other rows; name another file with --out")
    reasons, useless, number = Counter(), 0, len(questions)
    with path.open("ab") as file, tqdm(total=number, initial=start, unit="row", disable=None) as bar:
        file.truncate(len(whole))
        for first in range(start - start % CHUNK, number, CHUNK):
            numbers = range(first, min(first + CHUNK, number))
            for n, (made, why) in zip(numbers, make(numbers), strict=True):
                if n >= start:
                    reasons.update(why)
                    useless = 0 if made else useless + 1
                    lines = ({**row, OF: questions[n]} for row in made)
                    file.writelines(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
                                    for line in lines)  # fmt: skip
            file.flush()
            if useless >= MAX_USELESS or (numbers[-1] + 1 == number and useless == number):
                raise UserError(
                    f"nothing could be used of the replies to the last {useless} questions (of all in this launch: "
                    f"{listed(reasons)}); {path} has what was made before, and --resume goes on"
                )
            bar.update(numbers[-1] + 1 - bar.n)
    return reasons


def rows_of(path: Path) -> tuple[list[dict], bytes]:
    """The rows that a file holds, and their text, without one that a kill cut off. Raises UserError if it holds
    something else."""
    if not path.exists():
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        return [], b""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError:
        rows = [None]
    if not all(isinstance(row, dict) and "messages" in row for row in rows) or (text and not rows):
        raise UserError(f"{path} is not what this tool writes; name another file with --out")
    return rows, whole


def say_how_to_train(args: argparse.Namespace, settings: dict) -> None:
    """The flags that take these rows in beside those of the run; the run's own flags stay."""
    if "dataset" in settings:
        data = Path(args.rows) / "data"
        flags = ["--dataset", str(data / "train.jsonl"), str(args.out), "--val-dataset", str(data / "val.jsonl")]
        flags += ["--exclude", str(data / "test.jsonl")] if (data / "test.jsonl").exists() else []
        flags += ["--columns", *settings["columns"]] if settings.get("columns") else []
        print(f"train on it, with the run's other flags: accelerate launch train.py {shlex.join(flags)} "
              "--output-dir OTHER")  # fmt: skip


def listed(reasons: Counter) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in reasons.most_common()) or "none"
