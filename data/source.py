"""Where rows come from: the embedded sample, a file, or ModelScope."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError, one_line
from data.hub import download, is_hub_id

SAMPLE = Path(__file__).with_name("sample.jsonl")
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


def find_source(dataset: str) -> Path:
    """The local file of a dataset: the embedded sample, a path, or a ModelScope download."""
    if dataset == "sample":
        return SAMPLE
    path = Path(dataset).expanduser()
    if path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise UserError(f"{dataset}: a dataset file ends in {', '.join(FILE_TYPES)}")
        return path
    if path.suffix.lower() in FILE_TYPES or path.exists() or not is_hub_id(dataset):
        raise UserError(
            f"there is no dataset file {dataset!r}; name a {', '.join(FILE_TYPES)} file, "
            "a ModelScope dataset id (owner/name), or `sample`"
        )
    folder = download("dataset", dataset, [f"*{suffix}" for suffix in FILE_TYPES])
    files = [p for p in folder.rglob("*") if p.suffix.lower() in FILE_TYPES and "dataset_infos" not in p.name]
    files = sorted(files)
    if len(files) > 1:
        files = [path for path in files if "train" in path.name] or files
    if len(files) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files) or "none"
        raise UserError(
            f"{dataset}: one data file expected, found {names}; pass the one to use with --dataset {folder}/FILE"
        )
    return files[0]


def read_source(path: Path) -> Iterator[tuple[str, dict | str]]:
    """(location, columns) of every row of a file, or (location, reason) if the row cannot be read."""
    try:
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path.name}:{number}", parse_json_line(line)
        elif path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise UserError(f"{path}: a .json dataset is a list of rows")
            for number, row in enumerate(rows, start=1):
                yield f"{path.name} row {number}", row
        elif path.suffix.lower() == ".csv":
            csv.field_size_limit(2**31 - 1)
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield f"{path.name}:{reader.line_num}", {key: row[key] for key in row if key is not None}
        else:
            import pyarrow.parquet

            for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1):
                yield f"{path.name} row {number}", row
    except UserError:
        raise
    except Exception as error:  # each format's reader raises its own kinds
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def parse_json_line(line: bytes) -> dict | str:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "is not valid UTF-8"
    except (ValueError, RecursionError):
        return "is not valid JSON"
