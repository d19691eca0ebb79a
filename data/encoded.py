"""All Examples of a side of the split: flat arrays, for many rows made in parallel and kept in a file."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy
import torch

from data.base.errors import UserError
from data.encode import Example, encode_rows
from data.reading.rows import MANY, Row, show_progress
from data.split import Split

CHUNK = 1_000  # rows that a process takes at a time
VERSION = 1  # of what is kept in files
OPTIONS: list = []  # in a worker: tokenizer, max_length, overlong


class Encoded(Sequence):
    """Examples whose tokens are views of one array, which may lie in a file.

    ids (T,) int32: all examples end to end. spans (n, 4) int64: of each its end in ids, prompt_length, answer_start and
    the number of its row.
    """

    def __init__(self, ids: numpy.ndarray, spans: numpy.ndarray, rows: Sequence[Row]):
        self.ids, self.spans, self.rows = ids, spans, rows
        self.lengths = numpy.diff(spans[:, 0], prepend=0)  # (n,) tokens

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        index = range(len(self))[index]
        end, prompt_length, answer_start, row = self.spans[index].tolist()
        ids = torch.from_numpy(self.ids[end - int(self.lengths[index]) : end])
        return Example(ids, prompt_length, answer_start, self.rows[row].location)


class Wordings:
    """Other wordings of training examples, which came from the rewrites of their rows."""

    def __init__(self, train: Encoded, rewrites: Encoded, owners: list[int]):
        """owners: of each row of rewrites the number of the row in train that it rewrites."""
        self.train, self.rewrites = train, rewrites
        places = {row: place for place, row in enumerate(train.spans[:, 3].tolist())} if owners else {}
        self.numbers: dict[int, list[int]] = {}  # place in train -> numbers in rewrites
        for number, row in enumerate(rewrites.spans[:, 3].tolist()):
            if (place := places.get(owners[row])) is not None:
                self.numbers.setdefault(place, []).append(number)

    def in_epoch(self, epoch: int) -> Sequence[Example]:
        """As many examples as without rewrites: of each one wording, in the next epoch the next one. The examples do
        not all begin with their first wording, so each epoch has some of each."""
        return InEpoch(self, epoch) if self.numbers else self.train

    @property
    def lengths(self) -> numpy.ndarray:
        """(n,) tokens of the longest wording of each example."""
        lengths = self.train.lengths.copy()
        for place, numbers in self.numbers.items():
            lengths[place] = max(lengths[place], self.rewrites.lengths[numbers].max())
        return lengths


class InEpoch(Sequence):
    """The training examples, each in the wording of one epoch."""

    def __init__(self, wordings: Wordings, epoch: int):
        self.wordings, self.epoch = wordings, epoch

    def __len__(self) -> int:
        return len(self.wordings.train)

    def __getitem__(self, index: int) -> Example:
        numbers = self.wordings.numbers.get(index, [])
        wording = (index + self.epoch) % (1 + len(numbers))
        return self.wordings.rewrites[numbers[wording - 1]] if wording else self.wordings.train[index]


def encode_split(split: Split, tokenizer, max_length: int, overlong: str) -> tuple[Encoded, Encoded, Wordings]:
    """The Examples of train and val, and the other wordings of train; completes split.report with token counts. Raises
    UserError if train or val is empty."""
    sides = []
    for name, rows in (("train", split.train), ("val", split.val)):
        encoded, problems = encode_all(rows, tokenizer, max_length, overlong)
        split.report[name] = token_report(encoded, problems)
        split.report["problems"] += problems
        if not encoded:
            raise UserError(f"{split.report['dataset']}: no {name} row fits into max_length {max_length} tokens")
        sides.append(encoded)
    reworded = [(number, row) for number, owner in enumerate(split.train) for row in owner.reworded]
    rewrites, problems = encode_all([row for _, row in reworded], tokenizer, max_length, overlong)
    split.report["problems"] += problems
    return sides[0], sides[1], Wordings(sides[0], rewrites, [number for number, _ in reworded])


def encode_all(rows: list[Row], tokenizer, max_length: int, overlong: str) -> tuple[Encoded, list[dict]]:
    """(Examples, problems); see `encode_rows`. Many rows are encoded once: by their text, tokenizer and settings they
    are found again in the user's cache folder."""
    if len(rows) < MANY:
        ids, spans, problems = encode_chunk(rows, 0, tokenizer, max_length, overlong)
        spans[:, 0] = spans[:, 0].cumsum()
        return Encoded(ids, spans, rows), problems
    folder = cache_folder(rows, tokenizer, max_length, overlong)
    if not is_sound(folder):
        shutil.rmtree(folder, ignore_errors=True)
        write_cache(folder, rows, tokenizer, max_length, overlong)
    spans = numpy.load(folder / "spans.npy")
    # Copy on write: torch wants arrays that could be written to.
    ids = numpy.memmap(folder / "ids.bin", numpy.int32, mode="c") if len(spans) else numpy.zeros(0, numpy.int32)
    return Encoded(ids, spans, rows), json.loads((folder / "problems.json").read_text(encoding="utf-8"))


def is_sound(folder: Path) -> bool:
    """Whether a folder of the cache holds as many tokens as it says."""
    try:
        spans = numpy.load(folder / "spans.npy")
        return (folder / "ids.bin").stat().st_size == 4 * (spans[-1, 0] if len(spans) else 0)
    except (OSError, ValueError, IndexError):
        return False


def cache_folder(rows: list[Row], tokenizer, max_length: int, overlong: str) -> Path:
    sha256 = hashlib.sha256(json.dumps([VERSION, max_length, overlong, tokenizer.chat_template]).encode())
    sha256.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        sha256.update(json.dumps([row.location, row.messages]).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "qwen3-medical-loop" / sha256.hexdigest()[:32]


def write_cache(folder: Path, rows: list[Row], tokenizer, max_length: int, overlong: str) -> None:
    """The folder is whole or not there. Raises UserError if it cannot be written."""
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{len(rows):,} rows are kept tokenised in {folder.parent}, which cannot be written ({error.strerror}); "
            "XDG_CACHE_HOME names another place"
        ) from error
    all_spans, all_problems = [], []
    with (temporary / "ids.bin").open("wb") as file:
        for ids, spans, problems in encode_in_parallel(rows, tokenizer, max_length, overlong):
            file.write(ids)
            all_spans.append(spans)
            all_problems += problems
    spans = numpy.concatenate(all_spans)
    spans[:, 0] = spans[:, 0].cumsum()
    numpy.save(temporary / "spans.npy", spans)
    (temporary / "problems.json").write_text(json.dumps(all_problems), encoding="utf-8")
    with suppress(OSError):  # another run was first
        temporary.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)


def encode_in_parallel(rows: list[Row], tokenizer, max_length: int, overlong: str) -> Iterable[tuple]:
    """What `encode_chunk` returns, chunk after chunk, from a process for each core."""
    starts = range(0, len(rows), CHUNK)
    chunks = ([Row(row.location, {}, row.messages) for row in rows[start : start + CHUNK]] for start in starts)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options = (tokenizer, max_length, overlong)  # sent once to each process: a tokenizer is megabytes
    with ProcessPoolExecutor(cores, get_context("spawn"), start_worker, options) as pool:
        bar = show_progress(rows, "tokenizing")
        for chunk in pool.map(encode_in_worker, chunks, starts):
            bar.update(min(CHUNK, len(rows) - bar.n))
            yield chunk
        bar.close()


def start_worker(*options) -> None:
    """A process for each core, each with one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    OPTIONS[:] = options


def encode_in_worker(rows: list[Row], start: int) -> tuple:
    return encode_chunk(rows, start, *OPTIONS)


def encode_chunk(rows: list[Row], start: int, tokenizer, max_length: int, overlong: str) -> tuple:
    """(ids, spans with lengths in place of ends, problems) of the rows from number `start` on."""
    examples, problems = encode_rows(rows, tokenizer, max_length, overlong)
    numbers = {row.location: start + index for index, row in enumerate(rows)}
    spans = [(len(e), e.prompt_length, e.answer_start, numbers[e.location]) for e in examples]
    ids = torch.cat([e.input_ids for e in examples]).int() if examples else torch.zeros(0, dtype=torch.int32)
    return ids.numpy(), numpy.array(spans, dtype=numpy.int64).reshape(-1, 4), problems


def token_report(encoded: Encoded, problems: list[dict]) -> dict:
    """Counts and length percentiles of one side, in tokens."""
    lengths = numpy.sort(encoded.lengths)
    actions = Counter(problem["action"] for problem in problems)
    return {
        "examples": len(encoded),
        "tokens": int(lengths.sum()),
        "think_tokens": int((encoded.spans[:, 2] - encoded.spans[:, 1]).sum()),
        "answer_tokens": int((encoded.lengths - encoded.spans[:, 2]).sum()),
        "median_length": int(lengths[len(lengths) // 2]) if len(lengths) else 0,
        "max_length": int(lengths[-1]) if len(lengths) else 0,
        "truncated": actions["thinking shortened"],
        "dropped": actions["dropped"],
    }
