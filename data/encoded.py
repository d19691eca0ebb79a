"""Rows -> their Examples as a datasets.Dataset: in memory if they are few, else an Arrow file in the user's cache."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy
import torch

from data.base.errors import UserError, one_line
from data.encode import Example, encode_rows
from data.reading.rows import MANY, Row
from data.split import Split

VERSION = 2  # of what is kept in files
CHUNK = 1_000  # rows that a process takes at a time


class Encoded(Sequence):
    """Examples of a datasets.Dataset; each is made when it is asked for. lengths: (n,) tokens; ends: (n,) targets up to
    the end of each row; reference: of each target its loss before training, if the method asks for it.

    If replies are compared, labels: (n,), see Example; units: the places of the examples of each pair, or reply.
    """

    def __init__(self, dataset, labels: Sequence[int] = (), units: Sequence[tuple[int, ...]] = ()):
        self.dataset, self.labels, self.units = dataset.with_format("numpy"), labels, units
        self.lengths = self.column("length")
        self.ends = numpy.cumsum(self.lengths - self.column("prompt_length"))
        self.reference: numpy.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        index = range(len(self))[index]
        example = example_of(self.dataset[index], *self.labels[index : index + 1])
        if self.reference is None:
            return example
        losses = self.reference[self.ends[index] - example.num_targets : self.ends[index]]
        return dataclasses.replace(example, reference=torch.tensor(losses))

    def __iter__(self) -> Iterator[Example]:
        labels = iter(self.labels or itertools.repeat(1))
        for columns in self.dataset.iter(CHUNK):
            for values in zip(*columns.values(), strict=True):
                yield example_of(dict(zip(columns, values, strict=True)), next(labels))

    @property
    def num_units(self) -> int:
        """What a step counts: pairs or replies if these are compared, rows otherwise."""
        return len(self.units) or len(self)

    def column(self, name: str) -> numpy.ndarray:
        return numpy.asarray(self.dataset.with_format(None)[name][:], dtype=numpy.int64)


def example_of(row: dict, label: int = 1) -> Example:
    ids, place = torch.from_numpy(row["input_ids"]), json.loads(str(row["location"]))
    return Example(ids, int(row["prompt_length"]), int(row["answer_start"]), place, label=label)


def encode_split(split: Split, encode: dict[str, Callable], max_length: int) -> dict[str, Encoded]:
    """The Examples of train, val and, if replies are compared, held; completes split.report with token counts. encode:
    side -> what makes (Encoded, problems) of its rows. Raises UserError if one is empty."""
    sides = {}
    for name, make in encode.items():
        sides[name], problems = make(getattr(split, name))
        split.report[name] = token_report(sides[name], problems)
        split.report["problems"] += problems
        if not len(sides[name]):
            raise UserError(f"{split.report['dataset']}: no {name} row fits into max_length {max_length} tokens")
    return sides


def encode_all(rows: list[Row], tokenizer, max_length: int, overlong: str) -> tuple[Encoded, list[dict]]:
    """(Examples, problems); see `encode_rows`. Many rows are encoded once: by their text, tokenizer and settings they
    are found again in the user's cache folder."""
    from datasets import Dataset, disable_progress_bars  # 0.4 s, so `--help` does without

    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        disable_progress_bars()
    if len(rows) < MANY:
        dataset = Dataset.from_dict(encode_columns(rows, tokenizer, max_length, overlong), features=features())
    else:
        dataset = kept_in_cache(rows, tokenizer, max_length, overlong)
    texts = dataset["problem"][:]
    if any(texts):
        dataset = dataset.select([number for number, text in enumerate(texts) if not text])
    return Encoded(dataset.remove_columns("problem")), [json.loads(text) for text in texts if text]


def features():
    from datasets import Features, Value

    numbers = {name: Value("int32") for name in ("prompt_length", "answer_start", "length")}
    return Features({"input_ids": [Value("int32")], **numbers, "location": Value("string"), "problem": Value("string")})


def encode_columns(rows: list[Row], tokenizer, max_length: int, overlong: str) -> dict[str, list]:
    """The columns of `features`: a line for each Example, then one for each problem."""
    examples, problems = encode_rows(rows, tokenizer, max_length, overlong)
    return {
        "input_ids": [e.input_ids.int().numpy() for e in examples] + [numpy.zeros(0, numpy.int32)] * len(problems),
        "prompt_length": [e.prompt_length for e in examples] + [0] * len(problems),
        "answer_start": [e.answer_start for e in examples] + [0] * len(problems),
        "length": [len(e) for e in examples] + [0] * len(problems),
        # As JSON, because the name of a file need not be UTF-8, and Arrow's strings are.
        "location": [json.dumps(e.location) for e in examples] + [""] * len(problems),
        "problem": [""] * len(examples) + [json.dumps(problem) for problem in problems],
    }


def kept_in_cache(rows: list[Row], tokenizer, max_length: int, overlong: str):
    """The Dataset of many rows, which a process for each core makes. The folder is whole or not there. Its name is a
    hash of our own: that of datasets changes as a fast tokenizer is used (huggingface/datasets#7982).

    Raises UserError if it cannot be written.
    """
    from datasets import Dataset, load_from_disk

    folder = cache_folder(rows, tokenizer, max_length, overlong)
    with suppress(Exception):  # not there, or damaged, in a way of its own
        dataset = load_from_disk(str(folder))
        if len(dataset) and dataset[-1]:
            return dataset
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        texts = {"location": [json.dumps(r.location) for r in rows], "messages": [json.dumps(r.messages) for r in rows]}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        made = Dataset.from_dict(texts).map(
            encode_texts,
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "overlong": overlong},
            batched=True,
            batch_size=CHUNK,
            num_proc=cores,
            remove_columns=["location", "messages"],
            features=features(),
            cache_file_name=str(temporary / "part.arrow"),
            new_fingerprint=folder.name,
            desc="tokenizing",
        )
        made.save_to_disk(str(temporary / "whole"))
        with suppress(OSError):  # another run was first
            (temporary / "whole").rename(folder)
        return load_from_disk(str(folder))
    except OSError as error:
        raise UserError(
            f"{len(rows):,} rows are kept tokenised in {folder.parent}, which cannot be written ({one_line(error)}); "
            "XDG_CACHE_HOME names another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def encode_texts(batch: dict[str, list], tokenizer, max_length: int, overlong: str) -> dict[str, list]:
    """In a worker: one of many processes, each with one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pairs = zip(batch["location"], batch["messages"], strict=True)
    rows = [Row(json.loads(place), {}, json.loads(text)) for place, text in pairs]
    return encode_columns(rows, tokenizer, max_length, overlong)


def cache_folder(rows: list[Row], tokenizer, max_length: int, overlong: str) -> Path:
    sha256 = hashlib.sha256(json.dumps([VERSION, max_length, overlong, tokenizer.chat_template]).encode())
    sha256.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        sha256.update(json.dumps([row.location, row.messages]).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "qwen3-medical-loop" / sha256.hexdigest()[:32]


def token_report(encoded: Encoded, problems: list[dict]) -> dict:
    """Counts and length percentiles of one side, in tokens."""
    lengths = numpy.sort(encoded.lengths)
    prompts, answers = encoded.column("prompt_length"), encoded.column("answer_start")
    actions = Counter(problem["action"] for problem in problems)
    return {
        "examples": len(encoded),
        "tokens": int(lengths.sum()),
        "think_tokens": int((answers - prompts).sum()),
        "answer_tokens": int((encoded.lengths - answers).sum()),
        "median_length": int(lengths[len(lengths) // 2]) if len(lengths) else 0,
        "max_length": int(lengths[-1]) if len(lengths) else 0,
        "truncated": actions["thinking shortened"],
        "dropped": actions["dropped"],
    }
