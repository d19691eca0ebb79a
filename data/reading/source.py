"""--dataset NAME -> the files that it means: the embedded sample, a file, a folder, or a set on a hub."""

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data.base.errors import UserError
from data.reading.hub import download, hub_id
from data.reading.read import FILE_TYPES, file_type

SAMPLE = Path(__file__).parent.parent / "sample.jsonl"
EMBEDDED = {"sample": SAMPLE, "sample-feedback": SAMPLE.with_name("sample_feedback.jsonl")}
SPLIT = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|dev|eval|test)(?=[^a-z]|$)")
# owner/name[@revision][/file]; of a revision only Hugging Face's own references have slashes.
ON_HUB = re.compile(r"([^/]*/[^/@]*(?:@(?:refs/\w+/\w+|[^/]*))?)(?:/(.*))?")
NUMBER = re.compile(r"\d+")
LEFT_BEHIND = {"__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
NO_DATA = {"dataset_infos.json", "dataset_info.json", "data_report.json"}


class Source(NamedTuple):
    """One name of --dataset, NAME[:PART][:AMOUNT]."""

    name: str  # as it was given, without the amount
    splits: dict[str, list[Path]]  # split -> files, the one to read first; "" if names tell none apart
    part: str  # the split to take of a file that holds several; empty if none was named
    amount: str  # rows to take: 500, 10%, or empty for all

    @property
    def files(self) -> list[Path]:
        return next(iter(self.splits.values()))

    @property
    def notes(self) -> list[str]:
        """What is not read."""
        _, *others = self.splits.items()
        named = ((split, files) for split, files in others if split and is_set(files))
        notes = [f"split {split} is not read; --val-dataset {self.name}:{split} takes it" for split, _ in named]
        single = (path for split, files in others if not split or not is_set(files) for path in files)
        return notes + [f"{path} is not read; --val-dataset {path} takes it" for path in single]

    @property
    def label(self) -> str:
        """Short, for a metric's name."""
        name = self.name if Path(self.name).exists() else re.sub(r"@[^:]*", "", self.name)  # without a revision
        name, _, part = Path(name).name.partition(":")
        stem = name.split(".")[0] or name
        return f"{stem}-{part}" if part else stem

    def number_of(self, rows: int) -> int:
        """Of so many rows those that :500 or :10% takes."""
        if self.amount.endswith("%"):
            return max(1, round(rows * float(self.amount[:-1]) / 100))
        return min(rows, int(self.amount or rows))


def is_set(files: list[Path]) -> bool:
    """Whether they are named together rather than each by itself."""
    return len(files) > 1 or files[0].is_dir()


def find_source(text: str, order: tuple[str, ...] = ("train",)) -> Source:
    """order: of splits, of which the first that is there is read. Raises UserError if there is no such file, or if it
    is not clear which of several is meant."""
    name, part, amount = parse(text)
    plain = name.removesuffix(f":{part}") if part else name
    path = Path(plain).expanduser()
    if amount.endswith("%") and float(amount[:-1]) > 100:
        raise UserError(f"{text}: at most 100 % of its rows can be taken")
    if part and (plain in EMBEDDED or (path.is_file() and file_type(path) not in (".json", ".jsonl"))):
        raise UserError(f"{text}: {plain} holds no {part!r}; an amount of rows is :1000 or :10%")
    if plain in EMBEDDED:
        return Source(name, {"": [EMBEDDED[plain]]}, part, amount)
    if path.is_file():
        if file_type(path) is None:
            raise UserError(f"{plain}: a dataset file ends in {', '.join(FILE_TYPES)} (or these with .gz)")
        return Source(name, {"": [path]}, part, amount)
    if path.is_dir():
        return Source(name, in_order(splits_of_folder(path, part, name), part, order, name), "", amount)
    found = ON_HUB.fullmatch(plain)
    there, file = found.groups("") if found else ("", "")
    is_missing_file = file_type(path) is not None and not file
    if is_missing_file or plain.startswith((".", "/", "~")) or not hub_id(there):
        raise UserError(
            f"there is no dataset file {plain!r}; name a file ({', '.join(FILE_TYPES)}), a folder of them, "
            "a ModelScope dataset id (owner/name, owner/name@REVISION), one of Hugging Face (hf:owner/name), "
            "or `sample`"
        )
    return Source(name, in_order(splits_of_hub(there, file, part), part, order, name), "", amount)


def parse(text: str) -> tuple[str, str, str]:
    """(name with its part, part, amount)"""
    if len(text) > 1000:
        raise UserError(f"{text[:60]}... is too long for the name of a dataset")
    if Path(text).expanduser().exists():
        return text, "", ""
    name, amount = text, ""
    if match := re.fullmatch(r"(.+):(\d+|\d+(?:\.\d+)?%)", text):
        name, amount = match.groups()
    if not Path(name).expanduser().exists() and (match := re.fullmatch(r"(?!hf:[^:]*$)(.+):([^:/\\]+)", name)):
        return name, match.group(2), amount
    return name, "", amount


def public_name(text: str) -> str:
    """A name of --dataset without the folders above a local file, which are private."""
    name, part, amount = parse(text)
    plain = name.removesuffix(f":{part}") if part else name
    path = Path(plain).expanduser()
    return ":".join(filter(None, (path.name if path.exists() else plain, part, amount)))


def in_order(splits: dict[str, list[Path]], part: str, order: tuple[str, ...], name: str) -> dict[str, list[Path]]:
    """With the split first that is read: the first of `order` that is there, or else the files of none. Raises
    UserError if there are several and none of these."""
    if SPLIT.fullmatch(part.lower()) or len(splits) == 1:
        return {"": [path for files in splits.values() for path in files]}
    wanted = [split for split in (*order, "") if split in splits]
    if not wanted:
        examples = " or ".join(f"{name}:{split}" for split in splits)
        raise UserError(f"{name} holds the splits {', '.join(splits)}; choose one: {examples}")
    return {split: splits[split] for split in [*wanted, *(split for split in splits if split not in wanted)]}


def splits_of_folder(folder: Path, part: str, name: str) -> dict[str, list[Path]]:
    """Of a folder of data files, of a copy of a hub's set with its README, or of what datasets' save_to_disk wrote."""
    if (folder / "dataset_dict.json").is_file():  # of several splits
        splits = {path.parent.name: [path.parent] for path in folder.glob("*/state.json")}
        splits = dict(sorted(splits.items(), key=lambda item: item[0] != "train"))
        if part not in ("", *splits) or not splits:
            raise UserError(f"{name}: it holds the splits {', '.join(splits) or 'of none of its folders'}")
        return {part: splits[part]} if part else splits
    if (folder / "state.json").is_file():
        return {"": [folder]}
    subsets = subsets_of(folder)
    if part in subsets:
        return subsets[part]
    if len(subsets) > 1 and not part and "default" not in subsets:
        examples = " or ".join(f"--dataset {name}:{subset}" for subset in subsets)
        raise UserError(f"{name} has several subsets; choose one: {examples}")
    if subsets and (len(subsets) == 1 or "default" in subsets):
        splits = subsets.get("default") or next(iter(subsets.values()))
        if not part or part in splits:
            return {part: splits[part]} if part else splits
    files = sorted(path for path in folder.rglob("*") if path.is_file() and file_type(path))
    files = [path for path in files if path.name not in NO_DATA and not is_left_behind(path, folder)]
    if part:
        files = of_part(files, folder, part, name)
    if not files:
        raise UserError(f"{name}: the folder holds no file that ends in {', '.join(FILE_TYPES)}")
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(split_of(path, folder), []).append(path)
    return splits


def is_left_behind(path: Path, folder: Path) -> bool:
    """Whether a system or a program left it there: hidden, of macOS's archives, Windows' bins, open in Excel."""
    parts = path.relative_to(folder).parts
    return any(part.startswith((".", "~$", "~")) or part in LEFT_BEHIND for part in parts)


def split_of(path: Path, folder: Path) -> str:
    found = SPLIT.search(str(path.relative_to(folder)).lower())
    return found.group(1) if found else ""


def of_part(files: list[Path], folder: Path, part: str, name: str) -> list[Path]:
    """The files of a split or subset, told by the names of file and folder."""
    names = {path: str(path.relative_to(folder).with_suffix("")).lower() for path in files}
    words = {path: {*re.split(r"[\W_]+", name), *re.split(r"[/\\]", name)} for path, name in names.items()}
    chosen = [path for path in files if part.lower() in words[path] or split_of(path, folder) == part.lower()]
    if not chosen:
        listed = ", ".join(str(path.relative_to(folder)) for path in files[:20])
        raise UserError(f"{name}: no file is named after {part!r}; there are {listed}")
    return chosen


def splits_of_hub(name: str, file: str, part: str) -> dict[str, list[Path]]:
    """Of a set on a hub: one file of it, a subset of its README's list, or all files of one set."""
    patterns = [file] if file else [f"*{suffix}{gz}" for suffix in FILE_TYPES for gz in ("", ".gz")] + ["README.md"]
    folder = download("dataset", name, patterns)
    if file:
        if not (folder / file).is_file():
            raise UserError(f"{name} has no file {file}")
        return {"": [folder / file]}
    splits = splits_of_folder(folder, part, f"{name}:{part}" if part else name)
    for files in splits.values() if not subsets_of(folder) else ():
        if len({NUMBER.sub("", str(path)) for path in files}) > 1:
            examples = "\n  ".join(f"--dataset {name}/{path.relative_to(folder)}" for path in files)
            raise UserError(f"{name} has several data files; choose one, or name several:\n  {examples}")
    return splits


def subsets_of(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Subset -> split -> files, from the head of a hub's README as datasets reads it; empty without one, or if its
    files are not there."""
    readme, subsets = folder / "README.md", {}
    text = readme.read_text(encoding="utf-8-sig", errors="replace") if readme.is_file() else ""
    if "configs:" not in text:
        return subsets
    from datasets.data_files import DataFilesList, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        head = DatasetCard(text, ignore_metadata_errors=True).data
        for name, config in MetadataConfigs.from_dataset_card_data(head).items():
            for split, patterns in sanitize_patterns(config.get("data_files") or {}).items():
                with suppress(FileNotFoundError):
                    found = map(Path, DataFilesList.from_patterns(patterns, base_path=str(folder)))
                    if files := sorted(path for path in found if file_type(path)):
                        subsets.setdefault(name, {})[split] = files
    except Exception:  # a README of another form names no subsets
        return {}
    return subsets
