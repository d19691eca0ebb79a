"""Files as they lie about: what they hold, how they are encoded, and which of them a name means."""

import csv
import gzip
import io
import json
import shutil

import pytest
from conftest import good_row, load
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.base.errors import UserError
from data.reading.read import read_file
from data.reading.source import find_source, public_name

ROWS = [good_row(index) for index in range(20)]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def as_csv(rows, path, encoding="utf-8", delimiter=","):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def table(rows):
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def write_parquet(path):
    import pyarrow.parquet

    map_type = pyarrow.map_(pyarrow.string(), pyarrow.string())
    meta = pyarrow.array([[("icd", "R42")]] * len(ROWS), map_type)
    pyarrow.parquet.write_table(table(ROWS).append_column("meta", meta), path)


def write_excel(path):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.title = "问答"
    for row in ([*ROWS[0]], *([*row.values()] for row in ROWS)):
        book.active.append(row)
    book.create_sheet("备注").append(["a"])
    book.save(path)


# name of the file -> (how to write it, what is said)
FILES = {
    "lines.jsonl": (lambda path: path.write_text(TEXT), []),
    "lines.json": (lambda path: path.write_text(TEXT), []),
    "mac.jsonl": (lambda path: path.write_text(TEXT.replace("\n", "\r"), newline=""), []),
    "list.json": (lambda path: path.write_text(json.dumps(ROWS)), []),
    "list.jsonl": (lambda path: path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False)), []),
    "pretty.jsonl": (lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)), []),
    "data.json": (lambda path: path.write_text(json.dumps({"version": "1", "data": ROWS})), ["`version` is not read"]),
    "splits.json": (
        lambda path: path.write_text(json.dumps({"train": ROWS, "test": ROWS[:3]})), ["`test` is not read"],
    ),
    "bom.jsonl": (lambda path: path.write_text(TEXT, encoding="utf-8-sig"), []),
    "gbk.jsonl": (lambda path: path.write_text(TEXT, encoding="gbk"), ["read as GB18030"]),
    "utf16.json": (lambda path: path.write_text(TEXT, encoding="utf-16"), ["read as UTF-16"]),
    "utf16le.json": (lambda path: path.write_text(TEXT, encoding="utf-16-le"), ["read as UTF-16-LE"]),
    "lines.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(TEXT.encode())), []),
    "a.csv": (lambda path: as_csv(ROWS, path), []),
    "gb.csv": (lambda path: as_csv(ROWS, path, "gb18030"), ["read as GB18030"]),
    "tab.csv": (lambda path: as_csv(ROWS, path, delimiter="\t"), []),
    "excel.csv": (lambda path: [as_csv(ROWS, path, delimiter=";"), path.write_text("sep=;\n" + path.read_text())], []),
    "lists.jsonl": (
        lambda path: path.write_text("\n".join(json.dumps(
            [{"role": "user", "content": row["question"]},
             {"role": "assistant", "content": row["answer"], "reasoning_content": row["think"]}]) for row in ROWS)), [],
    ),
    "described.json": (
        lambda path: path.write_text(json.dumps({"description": "x", "data": ROWS})), ["`description` is not read"],
    ),
    "semicolon.csv": (lambda path: as_csv(ROWS, path, delimiter=";"), []),
    "a.tsv": (lambda path: as_csv(ROWS, path, delimiter="\t"), []),
    "utf16.csv": (lambda path: as_csv(ROWS, path, "utf-16"), ["read as UTF-16"]),
    "a.csv.gz": (lambda path: [as_csv(ROWS, path), path.write_bytes(gzip.compress(path.read_bytes()))], []),
    "map.parquet": (write_parquet, []),
    "book.xlsx": (write_excel, ["sheet 备注 is not read"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(TEXT, encoding="utf-8")
    return [row.messages for row in load(path).train]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_what_it_holds(name, expected, tmp_path):
    write, said = FILES[name]
    write(tmp_path / name)
    split = load(tmp_path / name)
    assert [row.messages for row in split.train] == expected
    notes = split.report["datasets"][0]["notes"]
    assert len(notes) == len(said) and all(words in note for words, note in zip(said, notes, strict=True)), notes
    assert split.report["unusable"] == 0


FOLDERS = {
    "one file": {"a.jsonl": ROWS},
    "shards": {"train-00000-of-00002.jsonl": ROWS[:9], "train-00001-of-00002.jsonl": ROWS[9:]},
    "files of any name": {"a.jsonl": ROWS[:9], "b/b.json": ROWS[9:], "README.md": [], ".cache/c.jsonl": ROWS},
    "a test file beside others": {"medical.jsonl": ROWS, "medical_val.jsonl": ROWS[:2], "test.jsonl": ROWS[:1]},
    "files of one name": {"a/zh/rows.jsonl": ROWS[:9], "b/zh/rows.jsonl": ROWS[9:]},
    "splits by name": {"train.jsonl": ROWS, "test.jsonl": ROWS[:2], "validation.jsonl": ROWS[:2]},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_its_files(name, expected, tmp_path):
    for file, rows in FOLDERS[name].items():
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_text("\n".join(json.dumps(row) for row in rows))
    split = load(tmp_path)
    assert [row.messages for row in split.train] == expected
    assert len({row.location for row in split.train + split.val}) == 20
    notes = split.report["datasets"][0]["notes"]
    assert len(notes) == (2 if name in ("splits by name", "a test file beside others") else 0)
    if name == "splits by name":
        assert f"--val-dataset {tmp_path}/test.jsonl" in notes[0]
        held_out = load(tmp_path, val_dataset=(f"{tmp_path}:test",))
        assert (len(held_out.train), len(held_out.val)) == (18, 2)  # the two are in train.jsonl too


def test_what_save_to_disk_wrote(expected, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert [row.messages for row in load(tmp_path / "one").train] == expected
    both = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:4])}
    DatasetDict(both).save_to_disk(tmp_path / "dict")
    split = load(tmp_path / "dict")
    assert [row.messages for row in split.train] == expected
    assert split.report["datasets"][0]["notes"] == [
        f"split test is not read; --val-dataset {tmp_path / 'dict'}:test takes it"
    ]
    assert len(load(f"{tmp_path / 'dict'}:test", val_fraction=0.5).train) == 2
    with pytest.raises(UserError, match="holds the splits train, test"):
        load(f"{tmp_path / 'dict'}:dev")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "dict" / split)
    with pytest.raises(UserError, match="of none of its folders"):
        load(tmp_path / "dict")


def test_a_subset_of_a_folder_is_without_its_test_file(expected, tmp_path):
    for file, rows in {"zh-CN/train.jsonl": ROWS, "zh-CN/test.jsonl": ROWS[:3], "en/train.jsonl": ROWS[:3]}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("\n".join(json.dumps(row) for row in rows))
    split = load(f"{tmp_path}:zh-CN")
    assert [row.messages for row in split.train] == expected
    assert "zh-CN/test.jsonl is not read" in split.report["datasets"][0]["notes"][0]


BAD = {
    "comma.csv": ("question,think,answer\n问,想,先喝水,再休息\n", ["comma.csv:2 has 4 fields, but the header has 3"]),
    "open.csv": ('question,think,answer\n问,想,答\n问,想,"答\n问,想,答\n', ["open.csv:3: a quote opens here"]),
    "short.csv": ("question,answer\n问,答\n问,答一\n答二\n", ["short.csv:4 has 1 fields", "line break"]),
    "mixed.csv": (("question,answer\n" + "头痛怎么办,多喝水\n" * 9).encode("gbk") + "头痛怎么办,多喝水\n".encode(),
                  ["mixed.csv:11 is UTF-8 in a file of GB18030"]),
    "bytes.csv": ("question,answer\n头痛怎么办,多喝水\n".encode() * 3 + b"\xce,\xce\n",
                  ["bytes.csv:7 is not valid UTF-8"]),
    "bytes.json": ('[{"question": "头痛怎么办",\n"answer": "多喝水'.encode() + b'\xce"}]',
                   ["bytes.json:2 is not valid UTF-8"]),
    "closed.csv": ('question,think,answer\n问,想,"答"案\n', ["closed.csv:2"]),
    "twice.csv": ("question,answer,answer\n问,答,答二\n", ["two columns are named answer"]),
    "half.json": ('[{"question": "问"},\n{"question": ', ["half.json:2: is not valid JSON"]),
    "keys.json": ('[{"question": "问",\n "question": "问二"}]', ["the key `question` twice"]),
    "lists.json": (json.dumps({"a": ROWS, "b": ROWS}), ["the lists a, b", "lists.json:a or lists.json:b"]),
    "object.json": ('{"a": {"b": 1}}', ["object.json:1 has no question", "The columns are `a`"]),
    "empty.jsonl": ("", ["nothing left to train on: 0 rows read"]),
    "half.parquet": ("PAR1", ["cannot read", "half.parquet"]),
    "half.jsonl.gz": ("no gzip", ["cannot read", "half.jsonl.gz"]),
    "half.arrow": ("no arrow", ["cannot read", "half.arrow"]),
    "half.xlsx": ("no excel", ["half.xlsx"]),
    "notes.docx": ("x", ["a dataset file ends in .jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_told_with_its_place(name, tmp_path):
    text, wanted = BAD[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load(tmp_path / name)
    assert all(words in str(error.value) for words in wanted), error.value


def test_lines_of_another_encoding_are_named(tmp_path):
    """A few of them among many: each is left out with its line, none is read as what it is not."""
    for most, other, reason in (("utf-8", "gbk", "is not valid UTF-8"), ("gbk", "utf-8", "is UTF-8 in a file of GB")):
        lines = [json.dumps(row, ensure_ascii=False).encode(most) for row in ROWS]
        lines[6] = json.dumps(ROWS[6], ensure_ascii=False).encode(other)
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        (problem,) = load(tmp_path / "rows.jsonl").report["problems"]
        assert problem["location"] == "rows.jsonl:7" and reason in problem["problem"]


def test_an_excel_file_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"\.\[excel\]"):
        list(read_file(tmp_path / "a.xlsx", "a.xlsx", "", []))


def test_names_have_a_part_and_an_amount(tmp_path):
    (tmp_path / "a:b.jsonl").write_text(TEXT)
    (tmp_path / "c.json").write_text(json.dumps({"x": ROWS, "y": ROWS[:5]}))
    assert len(load(tmp_path / "a:b.jsonl").train) == 18
    assert len(load(f"{tmp_path}/a:b.jsonl:10").train) == 9
    assert len(load(f"{tmp_path}/a:b.jsonl:50%").train) == 9
    assert len(load(f"{tmp_path}/c.json:x:10").train) == 9
    for wrong in (f"{tmp_path}/a:b.jsonl:1k", f"{tmp_path}/c.json:z", "sample:foo", "sample:150%"):
        with pytest.raises(UserError, match=r"1k|c\.json:x or c\.json:y|foo|at most 100 %"):
            load(wrong)
    few = load(f"{tmp_path}/c.json:y:500")
    assert len(few.train) == 4 and "has 5 rows, fewer than the 500 asked for" in few.report["datasets"][0]["notes"][-1]
    assert find_source(f"{tmp_path}/c.json:y").label == "c-y"
    assert public_name(f"{tmp_path}/c.json:y:500") == "c.json:y:500" and public_name("a/b:zh:5%") == "a/b:zh:5%"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A ModelScope where each set is a folder."""

    def download(kind, name, patterns):
        if not (tmp_path / "hub" / name).is_dir():
            raise UserError(f"no {name}")
        return tmp_path / "hub" / name

    def add(name, files):
        for file, content in files.items():
            path = tmp_path / "hub" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))

    monkeypatch.setattr("data.reading.source.download", download)
    return add


def test_sets_of_several_files_on_modelscope(hub, expected, tmp_path):
    hub("a/one", {"README.md": "数据集", "data.jsonl": ROWS})
    hub("a/shards", {"data-0.jsonl": ROWS[:9], "data-1.jsonl": ROWS[9:]})
    hub("a/files", {"sft.json": ROWS, "sft_Chinese.json": ROWS[:9]})
    head = "configs:\n- config_name: zh\n  data_files: sft_Chinese.json\n- config_name: en\n  data_files:\n"
    head += "  - split: train\n    path: sft.json\n  - split: test\n    path: t.json\n"
    hub("a/subsets", {"README.md": f"---\n{head}---\n", "sft.json": ROWS, "sft_Chinese.json": ROWS[:9], "t.json": []})
    for name in ("a/one", "a/shards", "a/files/sft.json", "a/subsets:en"):
        assert [row.messages for row in load(name).train] == expected, name
    for name in ("a/files:chinese", "a/files/sft_Chinese.json", "a/subsets:zh"):
        assert len(load(name).train) == 8, name
    for name, wanted in {
        "a/files": r"--dataset a/files/sft.json\n  --dataset a/files/sft_Chinese.json",
        "a/subsets": "--dataset a/subsets:zh or --dataset a/subsets:en",
        "a/one:zh": "no file is named after 'zh'; there are data.jsonl",
        "a/one/other.json": "has no file other.json",
        "nowhere.jsonl": "there is no dataset file",
        "./nowhere": "there is no dataset file",
    }.items():
        with pytest.raises(UserError, match=wanted):
            load(name)
    shutil.rmtree(tmp_path / "hub")


# --- any file: its rows are all there, or one message says why not ----------------------------------------

NAME = st.sampled_from(["question", "think", "answer", "Response", "history", "x", "备注", "", " "]) | st.text(
    max_size=3
)
CELL = st.text("医 a,\"'\n\r{}[]\\<think>", max_size=8)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
ANY_JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3))
COLUMN = st.lists(st.text(max_size=5), min_size=4, max_size=4) | st.lists(st.integers(0, 9), min_size=4, max_size=4)


def csv_of(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def parquet_of(columns: dict) -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


BINARY = st.binary(max_size=60)
ANY_FILE = st.one_of(
    st.tuples(st.just("a.csv"), st.lists(st.lists(CELL, max_size=4), max_size=5).map(csv_of)),
    st.tuples(st.just("b.csv"), st.text('医,;\t"\n\ra', max_size=40).map(str.encode)),
    st.tuples(st.just("c.json"), ANY_JSON.map(lambda value: json.dumps(value).encode())),
    st.tuples(st.just("d.jsonl"), st.lists(ANY_JSON, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode())),
    st.tuples(st.just("e.parquet"), st.dictionaries(NAME, COLUMN, min_size=1, max_size=4).map(parquet_of)),
    st.tuples(st.sampled_from(["f.jsonl", "f.csv", "f.json.gz", "f.parquet", "f.arrow", "f.xlsx"]), BINARY),
)  # fmt: skip


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_file_is_read_or_refused(count, tmp_path):
    """Of a CSV each cell, of a parquet file each value; what is refused names the file."""
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(ANY_FILE)
    def check(case):
        name, content = case
        path = tmp_path / name
        path.write_bytes(content)
        try:
            rows = list(read_file(path, name, "", []))
        except UserError as error:
            assert name in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert all(name in location for location, _ in rows)
            if name == "a.csv":
                header, *lines = [*csv.reader(io.StringIO(content.decode(), newline="")), []]
                written = {field for line in lines for field in line if field.strip()}
                read = {value for _, row in rows for value in (row.values() if isinstance(row, dict) else header)}
                assert written <= read
        try:
            load(path)
        except UserError as error:
            assert str(error)

    check()
    assert min(outcomes.values()) > count / 20, outcomes


# --- encodings, sheets and folders that are not what they seem ------------------------------------------------

JAPANESE = (
    "最近、頭痛が続いています。どの診療科に行けばよいですか？\n内科を受診してください。水分をよくとって休みましょう。\n"
)
FOREIGN = {
    "big5": "請問最近咳嗽三天，伴有發熱，應該怎麼辦？\n我媽媽頭暈，血壓高，吃什麼藥比較好？\n"
    "建議儘快到呼吸科就診，多喝水，注意休息。\n",
    "shift_jis": JAPANESE,
    "euc_kr": "최근 기침이 삼일 동안 계속됩니다. 어떻게 해야 하나요?\n호흡기내과를 방문하시고 물을 많이 드세요.\n",
    "euc_jp": JAPANESE,
}


@pytest.mark.parametrize("encoding", FOREIGN)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_what_gb18030_would_decode_to_other_characters_is_refused(encoding, form, tmp_path):
    first, second, *_ = FOREIGN[encoding].splitlines()
    rows = [(f"{first}{n}", f"{second}{n}") for n in range(12)]
    path = tmp_path / f"rows.{form}"
    lines = [
        f"{q},{a}" if form == "csv" else json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in rows
    ]
    path.write_text("\n".join([*(["question,answer"] if form == "csv" else []), *lines]) + "\n", encoding=encoding)
    with pytest.raises(UserError, match=r"is no UTF-8 and (looks like|is not)"):
        load(path)


def test_blank_rows_are_skipped_and_unreadable_columns_left_out(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [good_row(n) for n in range(10)]
    blank = dict.fromkeys(rows[0])
    table = pyarrow.Table.from_pylist([*rows[:5], blank, *rows[5:], blank])
    ages = pyarrow.array([2**42] * len(table), pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(table.append_column("taken", ages), tmp_path / "rows.parquet")
    split = load(tmp_path / "rows.parquet")
    assert split.report["rows"] == 10 and split.report["unusable"] == 0
    assert "column `taken` cannot be read" in split.report["datasets"][0]["notes"][0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{}, *rows, {"question": "\u200b"}]))
    assert load(tmp_path / "rows.jsonl").report["rows"] == 10


def test_merged_cells_and_blank_rows_of_a_sheet(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    sheet.append(["question", "answer", "科室"])
    for n in range(12):
        sheet.append([f"第{n}题？", f"答{n}。", "内科" if n == 0 else None])
        if n % 4 == 3:
            sheet.append([None, None, None])
    sheet.merge_cells("C2:C5")
    book.save(tmp_path / "rows.xlsx")
    split = load(tmp_path / "rows.xlsx")
    assert split.report["rows"] == 12 and split.report["unusable"] == 0
    assert any("merged cells" in note and "C2:C5" in note for note in split.report["datasets"][0]["notes"])
    (tmp_path / "page.xlsx").write_text("<html><table>")
    (tmp_path / "old.xlsx").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600)
    (tmp_path / "none.xlsx").write_bytes(b"PK\x03\x04")
    for name, message in (("page", "is a web page"), ("old", "old Excel"), ("none", "cannot be read as .xlsx")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / f"{name}.xlsx")


def test_a_copy_of_a_hubs_set_follows_its_readme(tmp_path):
    def write(name, rows):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("one/data/a.jsonl", [good_row(n) for n in range(20)])
    write("one/data/b.jsonl", [good_row(n) for n in range(20, 25)])
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/a.jsonl\n"
    (tmp_path / "one/README.md").write_text(f"{head}  - split: test\n    path: data/b.jsonl\n---\n# Card\n")
    assert load(tmp_path / "one").report["rows"] == 20
    assert load(f"{tmp_path / 'one'}:test").report["rows"] == 5
    assert "b.jsonl is not read" in load(tmp_path / "one").report["datasets"][0]["notes"][0]
    for language in ("zh", "en"):
        write(f"two/{language}/rows.jsonl", [good_row(n) for n in range(20)])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("zh", "en"))
    (tmp_path / "two/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=r"has several subsets; choose one: .*two:zh or .*two:en"):
        load(tmp_path / "two")
    assert load(f"{tmp_path / 'two'}:en").report["rows"] == 20


def test_what_systems_leave_behind_is_no_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(good_row(n)) + "\n" for n in range(20)))
    for name in ("~$rows.xlsx", "__MACOSX/rows.jsonl", "__MACOSX/._rows.jsonl", "._rows.jsonl", ".~lock.rows.csv#",
                 "$RECYCLE.BIN/a.csv", "Thumbs.db", "desktop.ini", "~WRL1.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x05\x00junk")
    assert find_source(str(tmp_path)).files == [tmp_path / "rows.jsonl"]


def test_a_row_of_several_lines_is_named_by_its_row_too(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer\n"甲\n乙",丙\n丁,\n', encoding="utf-8")
    places = [place for place, _ in read_file(tmp_path / "rows.csv", "rows.csv", "", [])]
    assert places == ["rows.csv:2", "rows.csv:4 (row 3)"]


def test_columns_that_contain_known_words_are_proposed(jsonl):
    names = ("编号", "患者问题", "医生思路", "医生回答")
    texts = ((f"P{n:05}", f"头疼第{n}天怎么办？", f"先想{n}。", f"休息{n}天。") for n in range(20))
    rows = [dict(zip(names, row, strict=True)) for row in texts]
    with pytest.raises(UserError, match="--columns 'question=患者问题' 'think=医生思路' 'answer=医生回答'"):
        load(jsonl(rows))
    other = [
        {"病历号": n, "科室": "内科", "描述": f"头疼第{n}天怎么办？", "建议内容": f"休息{n}天。"} for n in range(20)
    ]
    with pytest.raises(UserError, match="--columns 'question=描述' 'answer=建议内容'"):
        load(jsonl(other))
