"""Multiple choice, in forms that were written down before the parser: tests/choices.json."""

import json
import time
import unicodedata
from pathlib import Path

import pytest
from conftest import good_row, load

from data.base.errors import UserError
from data.batches import pack
from data.reading.choices import REFERS, LeftOut, base_of, read_question
from data.reading.exam import read_exam

FORMS = [json.loads(line) for line in Path(__file__).with_name("choices.json").open(encoding="utf-8")]


@pytest.mark.parametrize("form", FORMS, ids=[form["name"] for form in FORMS])
def test_every_form_is_read_or_left_out(form):
    base = base_of([form["row"]])
    if form["right"] is None:
        with pytest.raises(LeftOut):
            read_question(form["row"], "s", base=0 if base is None else base)
        return
    question = read_question(form["row"], "s", base=0 if base is None else base)
    choices = [choice.strip() for choice in form["choices"]]
    assert question.text == form["question"] and sorted(question.choices) == sorted(choices)
    assert question.choices[question.correct] == choices[form["right"]]
    refers = any(REFERS.search(unicodedata.normalize("NFKC", choice)) for choice in choices)
    assert refers == bool(form.get("keeps_order"))
    if refers:
        assert list(question.choices) == choices


def ceval(*numbers) -> str:
    rows = (f"{n},第{n}题是什么,甲{n},乙{n},丙{n},丁{n},{'ABCD'[n % 4]}\n" for n in numbers)
    return "id,question,A,B,C,D,answer\n" + "".join(rows)


def test_a_folder_asks_its_test_split_and_excludes_all(tmp_path, jsonl):
    """If the test split has no answers, as C-Eval's, the next one is asked; a question counts once over files."""
    folder = tmp_path / "exam"
    folder.mkdir()
    for split, numbers in (("train", (1, 2)), ("val", (3, 4)), ("test", (5, 6, 7))):
        (folder / f"{split}.csv").write_text(ceval(*numbers), encoding="utf-8")
    exam = read_exam([str(folder)])
    assert [question.text for question in exam.questions] == [f"第{n}题是什么" for n in (5, 6, 7)]
    assert len(set(exam.texts)) == 7 and "test is asked" in str(exam)
    twice = read_exam([str(folder), str(folder / "test.csv")])
    assert len(twice.questions) == 3 and twice.left_out == {"asked already": 3}
    assert len(read_exam([f"{folder / 'test.csv'}:2"]).questions) == 2
    assert len(read_exam([f"{folder / 'test.csv'}:67%"]).questions) == 2
    rows = [{**good_row(n), "question": f"第{n}题是什么"} for n in range(20)]
    split = load(jsonl(rows), exam=(str(folder),), val_dataset=(str(jsonl([rows[5]], "val.jsonl")),))
    asked = {row.asked[0] for row in split.train}
    assert len(split.val) == 1 and asked == {f"第{n}题是什么" for n in range(20) if n == 0 or n > 7}
    (folder / "test.csv").write_text(ceval(5).replace(",B\n", ",\n"), encoding="utf-8")
    assert [question.text for question in read_exam([str(folder)]).questions] == ["第3题是什么", "第4题是什么"]


def test_numbers_count_from_0_or_from_1_as_the_file_says(jsonl):
    def rows(answers):
        return [{"question": f"第{n}题", "opa": "甲", "opb": "乙", "opc": "丙", "opd": "丁", "cop": cop}
                for n, cop in enumerate(answers)]  # fmt: skip

    for answers, base, right in (([0, 1, 3], 0, "甲乙丁"), ([1, 2, 4], 1, "甲乙丁")):
        exam = read_exam([str(jsonl(rows(answers)))])
        assert "".join(question.choices[question.correct] for question in exam.questions) == right
        assert f"numbers that count from {base}" in str(exam)
    with pytest.raises(UserError, match="may count from 0 or from 1"):
        read_exam([str(jsonl(rows([1, 2, 3])))])


def test_an_unknown_form_names_its_columns(jsonl):
    with pytest.raises(UserError, match="Its columns are `甲`, `乙`"):
        read_exam([str(jsonl([{"甲": 1, "乙": 2}]))])


def test_packing_is_first_fit_and_linear():
    """The same groups as the plain rule makes; 80,000 rows in the time of a few thousand by it."""

    def plain(rows, limit):
        groups = []
        for row in sorted(rows, key=len, reverse=True):
            fitting = (group for group in groups if sum(map(len, group)) + len(row) <= limit)
            group = next(fitting, None)
            groups.append([row]) if group is None else group.append(row)
        return groups

    for n in range(60):
        rows = [bytes(1 + (n * k * 7919) % 31) for k in range(n)]
        assert pack(rows, 1, 1 + n) == plain(rows, 1 + n)
    rows = [bytes(200 + k * 7919 % 700) for k in range(80_000)]
    started = time.process_time()
    assert sum(map(len, pack(rows, 1, 16_384))) == 80_000 and time.process_time() - started < 20  # hours by the rule
