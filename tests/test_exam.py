"""The exam: files are read, likelihoods are transformers' own, figures are those of their formulas."""

import json
import random

import pytest
import torch
from conftest import REAL
from transformers import AutoModelForCausalLM

from data.contexts import exam_prompts, exam_rows
from data.reading.choices import LETTERS, LeftOut, read_question
from data.reading.exam import read_exam
from loop.evaluate import is_right
from loop.score import score
from model.export import system_prompt_of
from model.loss import SFTModel
from model.qwen3 import load_model, load_tokenizer
from tools import exam
from tools.exam import Score, mcnemar, scores_of, take_exam
from tools.shared.answers import changes, changes_by_subject

ROWS = ("0,女性生殖腺是,卵巢,前庭大腺,前庭球,乳腺,A", "1,心脏有几个腔,1,2,3,4,D", "2,多选题,甲,乙,丙,丁,AB")
CMMLU = "\n".join([",Question,A,B,C,D,Answer", *ROWS]) + "\n"
CEVAL = "id,question,A,B,C,D,answer,explanation\n" + f"{ROWS[0]},\n{ROWS[1]},四腔\n"
FIRST = {"A": "卵巢", "B": "前庭大腺", "C": "前庭球", "D": "乳腺"}
SECOND = {"A": "1", "B": "2", "C": "3", "D": "4"}
CMB = [
    {"exam_subject": "解剖", "question": "女性生殖腺是", "answer": "A", "option": {**FIRST, "E": ""}},
    {"exam_subject": "解剖", "question": "心脏有几个腔", "answer": "D", "option": SECOND},
]
CMEXAM = [
    {"Question": "女性生殖腺是", "Options": "\n".join(map(" ".join, FIRST.items())), "Answer": "A"},
    {
        "Question": "心脏有几个腔",
        "Options": [{"key": letter, "value": text} for letter, text in SECOND.items()],
        "Answer": "D",
    },
]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", CMMLU), ("a.csv", CEVAL), ("a.json", json.dumps(CMB)), ("a.json", json.dumps(CMEXAM))],
    ids=["CMMLU", "C-Eval", "CMB", "CMExam"],
)
def test_exams_in_their_own_columns(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    questions, left_out, *_ = read_exam([str(tmp_path / name)])
    assert [question.text for question in questions] == ["女性生殖腺是", "心脏有几个腔"]
    assert [question.choices[question.correct] for question in questions] == ["卵巢", "4"]
    assert {len(question.choices) for question in questions} == {4} and left_out.total() == ("多选题" in content)
    assert (
        read_exam([str(tmp_path / name)]).questions == questions
    )  # the order of the choices is drawn for each question, and stays


def test_choices_that_name_others_stay_where_they_are():
    """And a letter that stands in the text of its own choice is asked once."""
    for last in ("以上都是", "A和B", "均正确"):
        question = read_question({"question": "选", "options": ["甲", "乙", "丙", last], "answer": "D"}, "a")
        assert question.choices == ("甲", "乙", "丙", last) and question.correct == 3
    question = read_question({"question": "选", "options": ["A. 甲", "B. 乙", "C. 丙"], "answer": "B"}, "a")
    assert sorted(question.choices) == ["丙", "乙", "甲"] and question.choices[question.correct] == "乙"


def test_a_preference_for_a_letter_is_worth_a_guess(tmp_path):
    lines = "".join(f"{i},第{i}题,对{i},错{i},误{i},非{i},A\n" for i in range(2000))
    (tmp_path / "a.csv").write_text(",Question,A,B,C,D,Answer\n" + lines, encoding="utf-8")
    questions = read_exam([str(tmp_path / "a.csv")]).questions
    for letter in range(4):
        assert sum(question.correct == letter for question in questions) / 2000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("content", ["question,answer\n头痛？,休息\n", ",Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,\n"])
def test_a_file_without_choices_or_answers_is_refused(content, tmp_path, tool):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    code, _ = tool(exam, "none", "--exam", tmp_path / "a.csv")
    assert code.startswith("tools.exam: ") and "no question with choices and one right answer" in code
    choices = {"options": {"A": "骨折", "B": "脱位"}, "answer": "A"}
    assert read_question({"question": "诊断是什么？", **choices}, "a")
    for row in ({"question": "看图诊断", "image": "a.png"}, {"question": "诊断？<img src='a.png'>"}):
        with pytest.raises(LeftOut, match="a picture"):
            read_question({**row, **choices}, "a")
    nine = {letter: letter for letter in "ABCDEFGHI"}
    with pytest.raises(LeftOut, match="more than 8"):
        read_question({"question": "选", "option": nine, "answer": "A"}, "a")
    objects = [{"key": ["A"], "value": "甲"}, {"key": "B", "value": "乙"}]
    for options in (3, None, "no letters", [], {}, objects[:1]):
        with pytest.raises(LeftOut, match="no choices"):
            read_question({"question": "?", "options": options, "answer": "A"}, "a")


def test_likelihoods_are_those_of_transformers(small_folder, accelerator, tmp_path):
    """Packed, against one prompt at a time; and the answers that follow from them."""
    (tmp_path / "a.csv").write_text(CMMLU, encoding="utf-8")
    questions = read_exam([str(tmp_path / "a.csv")]).questions
    own = load_tokenizer(str(small_folder))
    model = SFTModel(load_model(str(small_folder), own, gradient_checkpointing=False), 1024).eval()
    plain = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    prompts = exam_prompts(questions, own, "")
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts)
    rows = exam_rows(prompts, own)
    found = torch.tensor([-line.loss_sum for line in score(model, rows, accelerator)]).view(-1, len(LETTERS))
    ids = own.convert_tokens_to_ids(list(LETTERS))
    expected = []
    for prompt in prompts:
        logits = plain(torch.tensor([own(prompt, add_special_tokens=False)["input_ids"]])).logits[0, -1]
        expected.append(logits.log_softmax(-1)[ids].tolist())
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    right = take_exam(str(small_folder), questions, "", {})
    best = [max(range(4), key=values.__getitem__) for values in expected]
    assert right == [guess == question.correct for guess, question in zip(best, questions, strict=True)]
    assert len(take_exam(str(small_folder), questions, "", {}, max_new_tokens=4)) == 2


@pytest.mark.slow
def test_lm_eval_finds_the_same_likelihoods_and_answers(small_folder, accelerator, tmp_path):
    instance = pytest.importorskip("lm_eval.api.instance")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    rows = "".join(
        f"{i},第{i}题：{'头痛' * (i % 5)}宜用何药,药{i},酒{i},茶{i * i},水,{'ABCD'[i % 4]}\n" for i in range(24)
    )
    (tmp_path / "a.csv").write_text(",Question,A,B,C,D,Answer\n" + rows, encoding="utf-8")
    questions = read_exam([str(tmp_path / "a.csv")]).questions

    tokenizer = load_tokenizer(str(small_folder))
    prompts = exam_prompts(questions, tokenizer, "你是一个医学专家。")
    model = SFTModel(load_model(str(small_folder), tokenizer, gradient_checkpointing=False), 1024)
    table = score(model, exam_rows(prompts, tokenizer), accelerator)
    ours = torch.tensor([-line.loss_sum for line in table], dtype=torch.float64).view(-1, len(LETTERS))[:, :4]

    harness = huggingface.HFLM(pretrained=str(small_folder), dtype="float32", device="cpu", batch_size=4)

    def theirs(pairs: list[tuple[str, str]]) -> torch.Tensor:
        requests = [instance.Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        found = harness.loglikelihood(requests, disable_tqdm=True)
        return torch.tensor([likelihood for likelihood, _ in found], dtype=torch.float64)

    # It moves a prompt's trailing blank line to the continuation, whose own likelihood is taken out again.
    stems = [prompt.rstrip() for prompt in prompts]
    letters = theirs([(prompt, letter) for prompt in prompts for letter in LETTERS[:4]]).view(-1, 4)
    blanks = theirs([(stem, prompt.removeprefix(stem)) for stem, prompt in zip(stems, prompts, strict=True)])
    assert ours.std(0).min() > 1e-3  # questions differ by far more than the tolerance
    torch.testing.assert_close(ours, letters - blanks[:, None], rtol=0, atol=2e-5)
    best = letters.argmax(-1).tolist()
    right = [guess == question.correct for guess, question in zip(best, questions, strict=True)]
    assert is_right(questions, table) == right


def test_figures_are_those_of_their_formulas(tmp_path):
    low, high = Score(8, 10).interval
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    ours, theirs = [True] * 10 + [False] * 2 + [True] * 5, [False] * 10 + [True] * 2 + [True] * 5
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(ours, ours) == 1.0
    (tmp_path / "a.csv").write_text(CMMLU, encoding="utf-8")
    questions = read_exam([str(tmp_path / "a.csv")]).questions
    assert scores_of(questions, [True, False]) == {"a": Score(1, 2), "all": Score(1, 2)}


@pytest.mark.skipif(not REAL.exists(), reason="the real exam lies beside the checkout")
def test_a_real_exam():
    questions, left_out, *_ = read_exam([str(REAL / "exam/test")])
    assert len(questions) > 1900 and left_out.total() < 20
    assert len({question.subject for question in questions}) == 10


def test_guessing_alone_loses_and_wins_as_much_as_is_said():
    """A model that knows three of ten questions and guesses the others, asked twice; then one that forgot 1,000."""
    draw, number = random.Random(0), 20_000
    choices = [draw.choice((2, 4, 5)) for _ in range(number)]
    knows = [draw.random() < 0.3 for _ in range(number)]

    def answers(known) -> list[bool]:
        return [one or draw.random() < 1 / k for one, k in zip(known, choices, strict=True)]

    before = answers(knows)
    same = changes(before, answers(knows), choices)
    assert same.by_guessing > 1000 and same.number == number and same.before == sum(before)
    for moved in (same.lost, same.won):
        assert abs(moved - same.by_guessing) < 5 * same.by_guessing**0.5
    forgotten = [n for n in range(number) if knows[n]][:1000]
    gone = set(forgotten)
    now = changes(before, answers([one and n not in gone for n, one in enumerate(knows)]), choices)
    wrong = sum(1 - 1 / choices[n] for n in forgotten)
    assert abs(now.lost - now.by_guessing - wrong) < 5 * now.lost**0.5 and abs(now.won - now.by_guessing) < 200
    one = changes_by_subject([True, True, False, False], [False, True, True, False], [("甲", 4), ("乙", 2)] * 2)
    assert {name: (c.lost, c.won, c.by_guessing) for name, c in one.items()} == {
        "甲": (1, 1, 0.0), "乙": (0, 0, 1.0), "all": (1, 1, 1.0),
    }  # fmt: skip


def test_two_models_get_one_system_prompt_or_each_its_own(best, small_folder, tmp_path, tool, monkeypatch):
    """By default that of the tuned one: a difference is then of the models alone."""
    (tmp_path / "a.csv").write_text(CMMLU, encoding="utf-8")
    seen, own = [], system_prompt_of(best)
    take = exam.take_exam
    monkeypatch.setattr(exam, "take_exam", lambda *args: seen.append(args[2]) or take(*args))
    args = [exam, small_folder, best, "--exam", tmp_path / "a.csv"]
    code, said = tool(*args, "--out", tmp_path / "a.json")
    assert code == 0 and seen == [own, own] and f"system prompt of all models: {own}" in said
    told = json.loads((tmp_path / "a.json").read_text())["changes"]["all"]
    lost = max(0, told["lost"] - told["by_guessing"])
    assert told["number"] == 2 and f"beyond guessing: {lost:.1f} lost" in said
    code, said = tool(*args, "--own-prompt")
    assert code == 0 and seen[2:] == ["", own] and "system prompt of small: -" in said
    assert "name one of them" in tool(*args, "--own-prompt", "--system", "x")[1]
