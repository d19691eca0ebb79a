"""Files -> rows: JSON and JSON lines told apart by what they hold, CSV, parquet, Arrow, Excel; encodings recognised."""

import codecs
import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from data.base.errors import UserError, cannot_import, one_line
from data.reading.formats import COLUMNS
from data.reading.texts import Repeated, is_blank, normal, without_repeats

FILE_TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
TEXT_TYPES = (".jsonl", ".json", ".csv", ".tsv")
NUM_SNIFFED = 1000  # lines by which an encoding is told
UTF8_IN_GB18030 = 16  # bytes: so many are no chance
OTHERS = {"big5": "Big5", "shift_jis": "Shift-JIS", "euc_jp": "EUC-JP", "cp949": "EUC-KR"}  # what GB18030 decodes too
# How a file begins that is not what its name says, and what it is.
SIGNS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file: `git lfs pull` gets it",
    b"<!doctype html": "is a web page, perhaps of a login, and no data",
    b"<html": "is a web page, perhaps of a login, and no data",
    b"\xd0\xcf\x11\xe0": "is an old Excel or Word file: save it as .xlsx or .csv",
    b"pk\x03\x04": "is a zip archive: unpack it",
    b"\x1f\x8b": "is packed by gzip: its name ends in .gz then",
}


def file_type(path: Path) -> str | None:
    """The suffix that says how a file is read; None if it cannot be."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] and suffixes[-2] in TEXT_TYPES:
        return suffixes[-2]
    return suffixes[-1] if suffixes[-1:] and suffixes[-1] in FILE_TYPES else None


def read_file(path: Path, name: str, part: str, notes: list[str]) -> Iterator[tuple[str, dict | str]]:
    """(location, columns) of every row that is not blank, or (location, reason) of one that cannot be read.

    name: of the file, in locations. part: the split to take of a file that holds several. notes: gets what a person
    should know.

    Raises UserError if the file cannot be read.
    """
    try:
        for location, row in read_rows(path, name, part, notes):
            if not isinstance(row, dict) or not all(map(is_blank, row.values())):
                yield location, row
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each format's reader raises its own kinds
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def read_rows(path: Path, name: str, part: str, notes: list[str]) -> Iterator[tuple[str, dict | str]]:
    kind, is_packed = file_type(path), path.suffix.lower() == ".gz"
    if path.is_dir():
        kind, head = ".arrow", b""
    else:
        with path.open("rb") as file:
            head = file.read(64).lower()
    for sign, what in SIGNS.items():
        if head.startswith(sign) and not (sign.startswith(b"pk") and kind == ".xlsx") and not is_packed:
            raise UserError(f"{path} {what}")
    if kind in (".parquet", ".arrow", ".xlsx"):
        read = {".parquet": read_parquet, ".arrow": read_saved, ".xlsx": read_excel}[kind]
        # A sheet's first row is its header.
        for number, row in enumerate(read(path, notes), start=2 if kind == ".xlsx" else 1):
            yield f"{name} row {number}", row
        return
    with (gzip.open if is_packed else open)(path, "rb") as file:
        encoding = find_encoding(file, name)
        if encoding != "utf-8-sig":
            notes.append(f"{name} is read as {encoding.upper()}")
        file.seek(0)
        if kind in (".csv", ".tsv"):
            check_lines(file, encoding, name)
            yield from read_csv(io.TextIOWrapper(file, encoding=encoding, newline=""), name)
        elif not part and is_json_lines(file, encoding):
            yield from read_json_lines(file, name, encoding)
        else:
            text = decode(file.read(), encoding, name)
            for number, row in enumerate(json_rows(text, name, part, notes), start=1):
                yield f"{name} row {number}", "is not an object but text" if isinstance(row, str) else row


def find_encoding(file, name: str) -> str:
    """utf-8-sig, gb18030 or utf-16, by the byte order mark or by what most of the first lines are. Raises UserError if
    they are more like another encoding, whose bytes GB18030 would take for other characters."""
    head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head[:2]:
        return "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
    file.seek(0)
    sniffed = list(itertools.islice((line for line in file if not line.isascii()), NUM_SNIFFED))
    votes = [decodes(line, "utf-8") or not decodes(line, "gb18030") for line in sniffed]
    if sum(votes) * 2 >= len(votes):
        return "utf-8-sig"
    from charset_normalizer import from_bytes

    lines = b"".join(line for line in sniffed if not decodes(line, "utf-8") and decodes(line, "gb18030"))
    found = from_bytes(lines, cp_isolation=["gb18030", *OTHERS]).best()
    enough = sum(byte > 127 for byte in lines) >= UTF8_IN_GB18030
    if enough and (found is None or found.encoding != "gb18030"):
        like = f"looks like {OTHERS[found.encoding]}" if found else "is not GB18030"
        raise UserError(f"{name} is no UTF-8 and {like}; save it as UTF-8")
    return "gb18030"


def check_lines(file, encoding: str, name: str) -> None:
    """Raises UserError at a line of another encoding: in a CSV its text would be taken for what it is not."""
    if not encoding.startswith("utf-16"):
        for number, line in enumerate(file, start=1):
            if problem := other_encoding(line, encoding):
                raise UserError(f"{name}:{number} {problem}; save the whole file as UTF-8")
    file.seek(0)


def other_encoding(line: bytes, encoding: str) -> str | None:
    if encoding == "gb18030" and sum(byte > 127 for byte in line) >= UTF8_IN_GB18030 and decodes(line, "utf-8"):
        return "is UTF-8 in a file of GB18030"
    return None if decodes(line, encoding) else f"is not valid {encoding.removesuffix('-sig').upper()}"


def decode(content: bytes, encoding: str, name: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = encoding.removesuffix("-sig").upper()
        raise UserError(f"{name}:{line} is not valid {kind}; save the whole file as UTF-8") from None


def decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def is_json_lines(file, encoding: str) -> bool:
    """Whether each line holds an object of its own, by the first lines."""
    if encoding.startswith("utf-16"):
        return False
    lines = list(itertools.islice((line for line in file if line.strip()), 20))
    file.seek(0)
    rows = [row for row in (parse_line(line, encoding) for line in lines) if isinstance(row, dict)]
    if len(lines) == 1:
        return len(rows) == 1 and not lists_of(rows[0])
    return bool(lines) and 2 * len(rows) >= len(lines)


def read_json_lines(file, name: str, encoding: str) -> Iterator[tuple[str, dict | str]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{name}:{number}", parse_line(line, encoding)


def parse_line(line: bytes, encoding: str) -> dict | str:
    if problem := other_encoding(line, encoding):
        return problem
    try:
        row = json.loads(line.decode(encoding), object_pairs_hook=without_repeats)
    except Repeated as error:
        return str(error)
    except (ValueError, RecursionError):
        return "is not valid JSON"
    return "is not an object but text" if isinstance(row, str) else row


def json_rows(text: str, name: str, part: str, notes: list[str]) -> list:
    """The rows of a JSON file: a list of them, an object that holds one, or objects one after another."""
    values, decoder, position = [], json.JSONDecoder(object_pairs_hook=without_repeats), 0
    text = text.removeprefix("\ufeff")
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", position)
            raise UserError(f"{name}:{text.count(chr(10), 0, at) + 1}: is not valid JSON ({one_line(error)})") from None
        values.append(value)
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    lists = lists_of(values[0]) if len(values) == 1 and isinstance(values[0], dict) else {}
    if part and not lists:
        raise UserError(f"{name} holds no {part!r}: a part is a split of the file, an amount is :1000 or :10%")
    if not lists:
        return values
    chosen = part or ("train" if "train" in lists else next(iter(lists)) if len(lists) == 1 else "")
    if chosen not in lists:
        choices = " or ".join(f"{name}:{key}" for key in lists)
        raise UserError(f"{name} is one object with the lists {', '.join(lists)}; choose one: {choices}")
    notes += [f"{name}: `{key}` is not read" for key in values[0] if key != chosen]
    return lists[chosen]


def lists_of(content: dict) -> dict[str, list]:
    """The lists of rows in {"data": [...]} or in a dictionary of splits; none in a row."""
    of_rows = set().union(*(rank for role in ("dialogue", "question", "answer") for rank in COLUMNS[role]))
    if any(normal(key) in of_rows for key in content):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, list) and value}


def read_csv(file: io.TextIOWrapper, name: str) -> Iterator[tuple[str, dict]]:
    """Strict: a row with more or fewer fields than the header, or a quote that is not closed, is an error with its
    line; it might have cut a text, or swallowed the rows behind it."""
    csv.field_size_limit(2**31 - 1)
    first = file.readline()
    if first.strip().startswith("sep="):  # Excel's own line
        delimiter = first.strip().removeprefix("sep=")
    else:
        delimiter = max(",\t;", key=first.count)
        file.seek(0)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    begin = 1
    try:
        header = [field.strip() for field in next(reader, [])]
        repeated = {field for field in header if field and header.count(field) > 1}
        if repeated:
            raise UserError(f"{name}: two columns are named {', '.join(sorted(repeated))}; rename one")
        header = [field or f"column {number}" for number, field in enumerate(header, start=1)]
        for number in itertools.count(2):  # as a spreadsheet counts rows, which may have several lines
            begin = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                return
            if not any(fields):
                continue
            where = f"{name}:{begin}" if begin == number else f"{name}:{begin} (row {number})"
            if any(fields[len(header) :]) or len(fields) < len(header):
                raise UserError(
                    f"{where} has {len(fields)} fields, but the header has {len(header)}; a field that holds "
                    f"{delimiter!r} or a line break stands in double quotes"
                )
            row = dict(zip(header, fields, strict=False))
            yield where, "repeats the header" if all(key == row[key] for key in row) else row
    except csv.Error as error:
        reason = "a quote opens here and is never closed" if "unexpected end" in str(error) else str(error)
        raise UserError(
            f"{name}:{begin}: {reason}; a quote inside a quoted field is written twice, and one in a field without "
            "quotes does not stand at its beginning"
        ) from None


def read_parquet(path: Path, notes: list[str]) -> Iterator[dict]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
        raise UserError(f"{path.name} has two columns of one name; rename one")
    yield from rows_of(file.iter_batches(), path.name, notes)


def read_saved(path: Path, notes: list[str]) -> Iterator[dict]:
    """What datasets wrote: an Arrow file, or a folder of save_to_disk."""
    from datasets import Dataset, load_from_disk

    dataset = load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path))
    yield from rows_of(dataset.data.to_batches(), path.name, notes)


def rows_of(batches, name: str, notes: list[str]) -> Iterator[dict]:
    """A column that Python cannot hold, such as a date of another age, is left out."""
    for batch in batches:
        columns = {}
        for column, values in zip(batch.schema.names, batch.columns, strict=True):
            try:
                columns[column] = values.to_pylist()
            except (ValueError, OverflowError, NotImplementedError, ImportError) as error:
                note = f"{name}: column `{column}` cannot be read ({one_line(error)[:80]})"
                if note not in notes:
                    notes.append(note)
        for cells in zip(*columns.values(), strict=True):
            yield dict(zip(columns, cells, strict=True))


def read_excel(path: Path, notes: list[str]) -> Iterator[dict]:
    """The first sheet, all cells as text."""
    try:
        import openpyxl
    except ImportError as error:
        raise cannot_import(error, "openpyxl", "excel") from error
    try:
        book = openpyxl.load_workbook(path, data_only=True)
    except Exception as error:  # of many kinds
        raise UserError(f"{path} cannot be read as .xlsx: save it again ({one_line(error)})") from None
    sheet, *others = book.worksheets
    notes += [f"{path.name}: sheet {other.title} is not read" for other in others]
    if merged := sorted(map(str, sheet.merged_cells.ranges)):
        listed = ", ".join(merged[:5]) + (", ..." if len(merged) > 5 else "")
        notes.append(f"{path.name}: of merged cells the first alone holds the text ({listed})")
    rows = sheet.iter_rows(values_only=True)
    header = ["" if cell is None else str(cell).strip() for cell in next(rows, ())]
    if repeated := {name for name in header if name and header.count(name) > 1}:
        raise UserError(f"{path.name}: two columns are named {', '.join(sorted(repeated))}; rename one")
    header = [name or f"column {number}" for number, name in enumerate(header, start=1)]
    for row in rows:
        yield dict(zip(header, ("" if cell is None else str(cell) for cell in row), strict=False))
