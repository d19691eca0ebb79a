"""--dataset NAME -> the files that it means: the embedded sample, a file, a folder, or a set on ModelScope."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from data.errors import UserError
from data.hub import download, is_hub_id
from data.read import FILE_TYPES, file_type

SAMPLE = Path(__file__).with_name("sample.jsonl")
SPLIT = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|dev|eval|test)(?=[^a-z]|$)")
NUMBER = re.compile(r"\d+")


class Source(NamedTuple):
    """One name of --dataset, NAME[:PART][:AMOUNT]."""

    name: str  # as it was given, without the amount
    files: list[Path]
    part: str  # the split to take of a file that holds several; empty if none was named
    amount: str  # rows to take: 500, 10%, or empty for all
    notes: list[str]  # what is not read

    @property
    def label(self) -> str:
        """Short, for a metric's name."""
        name, _, part = Path(self.name).name.partition(":")
        stem = name.split(".")[0] or name
        return f"{stem}-{part}" if part else stem


def find_source(text: str) -> Source:
    """Raises UserError if there is no such file, or if it is not clear which of several is meant."""
    name, part, amount = parse(text)
    plain = name.removesuffix(f":{part}") if part else name
    path = Path(plain).expanduser()
    if amount.endswith("%") and float(amount[:-1]) > 100:
        raise UserError(f"{text}: at most 100 % of its rows can be taken")
    if part and (plain == "sample" or (path.is_file() and file_type(path) not in (".json", ".jsonl"))):
        raise UserError(f"{text}: {plain} holds no {part!r}; an amount of rows is :1000 or :10%")
    if plain == "sample":
        return Source(name, [SAMPLE], part, amount, [])
    if path.is_file():
        if file_type(path) is None:
            raise UserError(f"{plain}: a dataset file ends in {', '.join(FILE_TYPES)} (or these with .gz)")
        return Source(name, [path], part, amount, [])
    if path.is_dir():
        files, notes = files_of_folder(path, part, name)
        return Source(name, files, "", amount, notes)
    owner, name_there, *inside = [*plain.split("/"), ""]
    hub_id, file = f"{owner}/{name_there}", "/".join(inside[:-1])
    is_missing_file = file_type(path) is not None and not file
    if is_missing_file or plain.startswith((".", "/", "~")) or not is_hub_id(hub_id):
        raise UserError(
            f"there is no dataset file {plain!r}; name a file ({', '.join(FILE_TYPES)}), a folder of them, "
            "a ModelScope dataset id (owner/name), or `sample`"
        )
    files, notes = files_of_hub(hub_id, file, part)
    return Source(name, files, "", amount, notes)


def parse(text: str) -> tuple[str, str, str]:
    """(name with its part, part, amount)"""
    if len(text) > 1000:
        raise UserError(f"{text[:60]}... is too long for the name of a dataset")
    if Path(text).expanduser().exists():
        return text, "", ""
    name, amount = text, ""
    if match := re.fullmatch(r"(.+):(\d+|\d+(?:\.\d+)?%)", text):
        name, amount = match.groups()
    if not Path(name).expanduser().exists() and (match := re.fullmatch(r"(.+):([^:/\\]+)", name)):
        return name, match.group(2), amount
    return name, "", amount


def public_name(text: str) -> str:
    """A name of --dataset without the folders above a local file, which are private."""
    name, part, amount = parse(text)
    plain = name.removesuffix(f":{part}") if part else name
    path = Path(plain).expanduser()
    return ":".join(filter(None, (path.name if path.exists() else plain, part, amount)))


def files_of_folder(folder: Path, part: str, name: str) -> tuple[list[Path], list[str]]:
    """(files, notes) of a folder of data files, or of one that datasets' save_to_disk wrote."""
    if (folder / "dataset_dict.json").is_file():  # of several splits
        splits = read_index(folder / "dataset_dict.json", "splits")
        chosen = choose_split(splits, part, name)
        notes = [
            f"split {split} is not read; --val-dataset {folder}:{split} takes it" for split in splits if split != chosen
        ]
        return files_of_folder(folder / chosen, "", name)[0], notes
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [folder / file["filename"] for file in read_index(folder / "state.json", "_data_files")], []
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and file_type(path) and not is_hidden(path, folder)
    )
    files = [path for path in files if path.name not in ("dataset_infos.json", "dataset_info.json", "data_report.json")]
    if part:
        files = of_part(files, folder, part, name)
    if not files:
        raise UserError(f"{name}: the folder holds no file that ends in {', '.join(FILE_TYPES)}")
    return training_files(files, folder, part)


def read_index(path: Path, key: str) -> list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what save_to_disk writes: it has no {key!r}") from error


def is_hidden(path: Path, folder: Path) -> bool:
    return any(name.startswith(".") for name in path.relative_to(folder).parts)


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


def training_files(files: list[Path], folder: Path, part: str) -> tuple[list[Path], list[str]]:
    """The files of the training split, or those that are of none, if the names tell splits apart; else all."""
    splits = {path: split_of(path, folder) for path in files}
    wanted = "train" if "train" in splits.values() else ""
    if SPLIT.search(part.lower()) or wanted not in splits.values():
        return files, []
    notes = [
        f"{path.relative_to(folder)} is not read; --val-dataset {path} takes it"
        for path in files
        if splits[path] != wanted
    ]
    return [path for path in files if splits[path] == wanted], notes


def choose_split(splits: list[str], part: str, name: str) -> str:
    chosen = part or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        examples = " or ".join(f"{name.removesuffix(f':{part}')}:{split}" for split in splits)
        raise UserError(f"{name} holds the splits {', '.join(splits)}; choose one: {examples}")
    return chosen


def files_of_hub(hub_id: str, file: str, part: str) -> tuple[list[Path], list[str]]:
    """(files, notes) of a ModelScope set: one file of it, a subset of its README's list, or all files of one set."""
    patterns = [file] if file else [f"*{suffix}{gz}" for suffix in FILE_TYPES for gz in ("", ".gz")] + ["README.md"]
    folder = download("dataset", hub_id, patterns)
    if file:
        if not (folder / file).is_file():
            raise UserError(f"{hub_id} has no file {file}")
        return [folder / file], []
    configs = subsets(folder / "README.md")
    if part in configs:
        chosen = {path for pattern in configs[part] for path in folder.glob(pattern)}
        return training_files(sorted(chosen), folder, "")
    if not part and len(configs) > 1:
        examples = " or ".join(f"--dataset {hub_id}:{config}" for config in configs)
        raise UserError(f"{hub_id} has several subsets; choose one: {examples}")
    files, notes = files_of_folder(folder, part, f"{hub_id}:{part}" if part else hub_id)
    if len({NUMBER.sub("", str(path)) for path in files}) > 1:
        examples = "\n  ".join(f"--dataset {hub_id}/{path.relative_to(folder)}" for path in files)
        raise UserError(f"{hub_id} has several data files; choose one, or name several:\n  {examples}")
    return files, notes


def subsets(readme: Path) -> dict[str, list[str]]:
    """Name -> patterns of files, from the head of a hub's README; of the split `train` if it names splits."""
    match = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL) if readme.is_file() else None
    try:
        head = yaml.safe_load(match.group(1)) if match else {}
        configs = {}
        for config in head.get("configs", []):
            files = config["data_files"]
            files = [files] if isinstance(files, (str, dict)) else files
            of_split = [file["path"] for file in files if isinstance(file, dict) and file["split"] == "train"]
            paths = of_split or [file if isinstance(file, str) else file["path"] for file in files]
            configs[config["config_name"]] = [p for path in paths for p in ([path] if isinstance(path, str) else path)]
        return configs
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):  # a README of another form names no subsets
        return {}
