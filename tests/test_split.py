"""Several datasets, a test split, groups and leaks; and a run on all of it."""

import json

import pytest
from conftest import good_row, load
from ranks import run
from runs import assert_same_end, metrics_of, newest, status_of

from data.base.errors import UserError
from data.leaks import question_key


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three sets in three formats, with departments."""
    folder = tmp_path_factory.mktemp("sets")
    rows = [good_row(index) for index in range(90)]
    departments = ["内科", "外科", "儿科"]
    own = [{**row, "department": departments[i % 3]} for i, row in enumerate(rows[:30])]
    o1 = [{"Question": r["question"], "Complex_CoT": r["think"], "Response": r["answer"]} for r in rows[30:60]]
    chats = [
        {"conversations": [{"from": "human", "value": r["question"]}, {"from": "gpt", "value": r["answer"]}],
         "department": departments[i % 2]}
        for i, r in enumerate(rows[60:])
    ]  # fmt: skip
    for name, content in {"own.jsonl": own, "o1.json": o1, "chats.jsonl": chats}.items():
        text = json.dumps(content) if name.endswith(".json") else "\n".join(map(json.dumps, content))
        (folder / name).write_text(text)
    return [folder / name for name in ("own.jsonl", "o1.json", "chats.jsonl")]


def test_each_set_is_split_as_it_would_be_alone(files):
    mix = load(files[0], f"{files[1]}:20", f"{files[2]}:50%", val_fraction=0.2, group_by="department")
    alone = [load(files[0], val_fraction=0.2), load(f"{files[1]}:20", val_fraction=0.2)]
    assert [row.messages for row in mix.train[:24]] == [row.messages for row in alone[0].train]
    assert [row.messages for row in mix.train[24:40]] == [row.messages for row in alone[1].train]
    assert [row.messages for row in mix.val[:10]] == [row.messages for split in alone for row in split.val]
    assert [about["rows"] for about in mix.report["datasets"]] == [30, 20, 15]
    assert [about["label"] for about in mix.report["datasets"]] == ["own", "o1", "chats"]
    assert mix.report["datasets"][1]["columns"]["Complex_CoT"] == {"think": 20}
    assert mix.report["datasets"][2]["columns"]["department"] == {"group": 15}
    assert load(files[2]).report["datasets"][0]["not_used"] == {"department": 30}
    assert mix.report["without_thinking"] == 15 and mix.report["replies"] == 65
    groups = mix.report["groups"]
    assert (groups["own"], groups["o1"], groups["chats"]) == (6, 4, 3)
    assert sum(count for label, count in groups.items() if label.startswith("department/")) == 13
    assert groups["department/-"] == 4  # the rows of o1 have no department
    assert not load(files[0]).labels


def test_a_test_split_leaves_the_validation_rows_as_they_are(files):
    without, split = load(files[0]), load(files[0], test_fraction=0.2)
    assert [row.columns for row in split.val] == [row.columns for row in without.val]
    assert (len(split.train), len(split.test), len(split.val)) == (21, 6, 3)
    assert [row.columns for row in split.train + split.test] == [row.columns for row in without.train]


def test_a_validation_file_of_its_own(files):
    split = load(files[0], val_dataset=(str(files[1]),), test_fraction=0.1)
    assert (len(split.train), len(split.test), len(split.val)) == (27, 3, 30)
    assert split.report["datasets"][1]["label"] == "o1" and not split.labels


SAME = ["头晕怎么办?", "头晕怎么办？", " 头晕 怎么办", "头晕，怎么办！", "头晕\u200b怎么办\ufeff？", "头晕怎么办……"]
OTHER = [
    *("体温38.5怎么办", "体温385怎么办", "血压>140", "血压<140", "剂量5%", "剂量5", "1-2片", "12片", "10²", "102"),
    *("-3+5", "3+5", "3-5", "3*5", "3/5", "35", "3 - 6", "36", "血压120 / 80", "血压12080", "第1、2题", "第12题"),
    *("C#", "C", "की", "का"),
]


def test_questions_are_the_same_whatever_their_punctuation():
    assert len({question_key(text) for text in SAME}) == 1
    assert question_key("ＡＢＣ １２３？") == question_key("abc123")
    assert len({question_key(text) for text in OTHER}) == len(OTHER)


def test_leaks_between_sets_and_from_an_exam_are_removed(jsonl, tmp_path):
    rows = [good_row(index) for index in range(20)]
    clean = load(jsonl(rows))
    held_out = clean.val[0].columns["question"]
    other = [{"query": held_out.replace("？", " ? "), "response": "别的回答。"}, *(good_row(i) for i in range(30, 40))]
    questions = [row.columns["question"] for row in clean.train[:2]]
    exam = tmp_path / "exam.csv"
    long = "下列关于高血压患者用药的说法正确的是哪一项"
    exam.write_text(f",Question,A,B,C,D,Answer\n0,{questions[0]},1,2,3,4,A\n1,{long}？,1,2,3,4,B\n", encoding="utf-8")
    inside = {"question": f"考试题：{long}:\nA. 1\nB. 2", "think": "想。", "answer": "B"}
    split = load(jsonl(rows), jsonl([*other, inside], "other.jsonl"), exclude=(str(exam),))
    removed = {problem["location"]: problem["action"] for problem in split.report["problems"]}
    assert split.report["train_val_overlap"] + split.report["excluded"] == len(removed) == 3
    assert removed["other.jsonl:12"] == "excluded" and split.report["excluded"] == 2
    assert "other.jsonl:1" in removed
    assert questions[0] not in [row.columns.get("question") for row in split.train]
    with pytest.raises(UserError, match=r"--exclude .*: bad.jsonl:1 has no question"):
        load(jsonl(rows), exclude=(str(jsonl([{"text": "x"}], "bad.jsonl")),))


ROLES = ("user", "assistant")


def test_a_dialogue_and_its_beginning_are_one_question(jsonl):
    """As sets have it that hold a dialogue once for each of its turns."""

    def turns(number, index):
        pairs = [(f"问题{index}，第{turn}次？", f"回答{turn}。") for turn in range(number)]
        return [{"role": role, "content": text} for pair in pairs for role, text in zip(ROLES, pair, strict=True)]

    rows = [{"messages": turns(number, index)} for index in range(40) for number in (1, 2)]
    split = load(jsonl(rows), val_fraction=0.2)
    held_out = {row.asked[0] for row in split.val}
    assert split.report["train_val_overlap"] > 0 and not held_out & {row.asked[0] for row in split.train}
    greeting = [{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"},
                              *turns(1, index)]} for index in range(40)]  # fmt: skip
    assert load(jsonl(greeting), val_fraction=0.2).report["train_val_overlap"] == 0  # a common beginning is no leak


EXAMS = {
    "with choices": [{"question": f"抗生素{i}是", "option": {"A": "甲", "B": "乙"}, "answer": "A"} for i in range(40)],
    "as Alpaca": [{"instruction": "请回答下面这道医学考试题", "input": f"题{i}是？", "output": "A"} for i in range(40)],
    "with a context": [{"context": "男，50 岁。", "question": f"诊断{i}？", "answer": "A"} for i in range(40)],
    "as messages": [{"messages": [{"role": "user", "content": f"题{i}？"}, {"role": "assistant", "content": "A"}]}
                    for i in range(40)],
    "with names of its own": [{"题干": f"题{i}？", "答": "A"} for i in range(40)],
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMS)
def test_an_exam_is_excluded_in_whatever_form_it_is(name, jsonl):
    rows, columns = EXAMS[name], ("question=题干", "answer=答") if "own" in name else ()
    exam = jsonl(rows[:20], "exam.jsonl")
    split = load(jsonl(rows), columns=columns, exclude=(str(exam),), val_fraction=0.5)
    asked = {json.dumps(row) for row in rows[:20]}
    assert len(split.val) == 20 and split.report["excluded"] == 20 - len(split.train) > 5  # validation rows stay
    assert not asked & {json.dumps(row.columns) for row in split.train}
    if name in ("with choices", "as Alpaca"):
        bare = [{"question": row.get("input") or row["question"]} for row in rows[:20]]
        split = load(jsonl(rows), exclude=(str(jsonl(bare, "bare.jsonl")),), val_fraction=0.5)
        assert split.report["excluded"] == 20 - len(split.train) > 5


def test_an_exam_that_cannot_be_read_is_told(jsonl):
    rows = jsonl([good_row(index) for index in range(20)])
    for bad, message in (({"question": "x", "query": "y"}, "can both be"), ({"text": "x"}, "has no question")):
        with pytest.raises(UserError, match=rf"--exclude .*bad.jsonl:1 .*{message}"):
            load(rows, exclude=(str(jsonl([bad], "bad.jsonl")),))


@pytest.mark.parametrize("value", [[1, 2], [{"a": 1}], ["内科", None], {"a": 1}, 3, True, "a/b"])
def test_a_group_may_be_any_value(jsonl, value):
    rows = jsonl([{**good_row(index), "dep": value} for index in range(20)])
    assert sum(load(rows, group_by="dep").report["groups"].values()) == 2


def test_files_of_one_name_keep_their_places_apart(jsonl, tmp_path):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(jsonl([{**good_row(i), "question": f"{name}{i}？"} for i in range(10)], f"{name}/rows.jsonl"))
    split = load(*paths)
    places = [row.location for row in split.train + split.val]
    assert len(set(places)) == 20 and "rows-2/rows.jsonl:1" in places
    assert [about["label"] for about in split.report["datasets"]] == ["rows", "rows-2"]


def test_a_group_that_no_row_has(files):
    with pytest.raises(UserError, match="--group-by ward: no validation row has this column; there are `question`"):
        load(files[0], group_by="ward")


def test_rare_groups_are_one(jsonl):
    rows = [{**good_row(i), "icd": f"R{min(i, 39)}"} for i in range(60)]
    groups = load(jsonl(rows), val_fraction=0.9, group_by="icd").report["groups"]
    assert len(groups) == 21 and sum(groups.values()) == 55
    assert groups["icd/R39"] == max(groups.values()) or groups["icd/..."] == max(groups.values())


@pytest.mark.integration
def test_a_mix_trains_evaluates_by_set_and_group_and_resumes(files, tmp_path):
    """Killed and resumed to the same bits; the losses of groups are those of their rows, on two ranks too."""
    args = [
        "tiny",
        "--dataset",
        files[0],
        f"{files[1]}:20",
        files[2],
        "--group-by",
        "department",
        "--test-fraction",
        "0.1",
    ]
    args += [
        "--val-fraction",
        "0.2",
        "--max-steps",
        "8",
        "--eval-steps",
        "4",
        "--save-steps",
        "2",
        "--max-length",
        "192",
    ]
    args += ["--sample-max-new-tokens", "8", "--resume", "--output-dir"]
    for name, fault in (("whole", ""), ("run", "kill_in_step(5)"), ("run", "")):
        outcome = run([*args, tmp_path / name], "one", fault, tmp_path / "log")
        assert outcome.codes == [-9 if fault else 0], outcome.output
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert "o1: 20 rows; `Question` → question (20 rows), `Complex_CoT` → thinking (20 rows)" in outcome.output
    assert "`department` → group (30 rows)" in outcome.output
    assert "of 72 replies have no thinking" in outcome.output
    assert len((tmp_path / "run/data/test.jsonl").read_text().splitlines()) == 8
    assert newest(tmp_path / "run").name == "step-00000008" and status_of(tmp_path / "run")["status"] == "completed"
    rows = [row for row in metrics_of(tmp_path / "run") if "eval/loss" in row]
    names = {"own", "o1", "chats", "department/内科", "department/外科", "department/儿科", "department/-"}
    for row in rows:
        assert {name.removeprefix("eval/loss/") for name in row if name.startswith("eval/loss/")} == names
    two = [*args, tmp_path / "two", "--gradient-accumulation-steps", "2", "--per-device-eval-batch-size", "3"]
    assert run(two, "ddp2", "", tmp_path / "log").codes == [0, 0]
    first = next(row for row in metrics_of(tmp_path / "two") if "eval/loss" in row)
    for name in ("eval/loss", *(f"eval/loss/{name}" for name in names)):
        assert first[name] == pytest.approx(rows[0][name], abs=1e-5)
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "内科" in report and "report/groups.png" in report and "`Complex_CoT`" in report
