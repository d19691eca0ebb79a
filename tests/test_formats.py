"""What people's data looks like, and the dialogue that a person would read from it."""

import json

import pytest
from conftest import SYSTEM, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.base.errors import UserError
from data.reading.formats import Ambiguous, read_row
from data.reading.rows import read_any
from data.reading.texts import TAG

Q, T, A = (
    "我头晕一天了，要看医生吗？",
    "先想：要排除低血压，再看耳石症。",
    "建议先量血压；头晕超过一天，请到神经内科就诊。",
)
INLINE = f"<think>\n{T}\n</think>\n\n{A}"
USER, THOUGHT, PLAIN = {"role": "user", "content": Q}, {"role": "assistant", "content": A, "reasoning_content": T}, {
    "role": "assistant", "content": A,
}  # fmt: skip
EARLIER = [{"role": "user", "content": "发烧怎么办？"}, {"role": "assistant", "content": "先量体温。"}]

PAIRS = [["发烧怎么办？", "先量体温。"]]

# name -> (columns of a row, the dialogue, columns that are not used)
SETS = {
    "krisfu/delicate_medical_r1_data": (
        {"instruction": "分析头晕。", "question": Q, "think": T, "answer": A, "metrics": {"quality_f1": None}},
        [USER, THOUGHT], ["instruction", "metrics"],
    ),
    "FreedomIntelligence/medical-o1-reasoning-SFT": (
        {"Question": Q, "Complex_CoT": T, "Response": A}, [USER, THOUGHT], [],
    ),
    "FreedomIntelligence/Medical-R1-Distill-Data-Chinese": (
        {"question": Q, "reasoning (reasoning_content)": T, "response (content)": A}, [USER, THOUGHT], [],
    ),
    "Congliu/Chinese-DeepSeek-R1-Distill-data-110k": (
        {"input": Q, "reasoning_content": T, "content": A, "repo_name": "coig/neo", "score": 9},
        [USER, THOUGHT], ["repo_name", "score"],
    ),
    "Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT": (
        {"instruction": Q, "input": None, "output": INLINE, "repo_name": "coig/neo", "score": 9},
        [USER, THOUGHT], ["repo_name", "score"],
    ),
    "swift/Qwen3-SFT-Mixin": (
        {"messages": [USER, {"role": "assistant", "content": INLINE}]}, [USER, THOUGHT], [],
    ),
    "FreedomIntelligence/Huatuo26M-Lite": (
        {"id": 1, "answer": A, "score": 5, "label": "神经科学", "question": Q, "related_diseases": "头晕"},
        [USER, PLAIN], ["id", "score", "label", "related_diseases"],
    ),
    "FreedomIntelligence/HuatuoGPT2-SFT-GPT4-140K": (
        {"id": "x1", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        [USER, PLAIN], ["id"],
    ),
    "Flmc/DISC-Med-SFT": (
        {"_id": 7, "source": "meddialog", "conversation": [*EARLIER, USER, PLAIN]},
        [*EARLIER, USER, PLAIN], ["_id", "source"],
    ),
    "Suprit/CMtMedQA": (
        {"instruction": Q, "output": A, "history": PAIRS, "id": 3, "category": "内科"},
        [*EARLIER, USER, PLAIN], ["id", "category"],
    ),
    "shibing624/medical": (
        {"instruction": Q, "input": "", "output": A}, [USER, PLAIN], [],
    ),
    "Toyhom/Chinese-medical-dialogue": (
        {"department": "神经科", "title": "头晕", "ask": Q, "answer": A}, [USER, PLAIN], ["department", "title"],
    ),
    "michaelwzhu/ChatMed_Consult": (
        {"query": Q, "response": A}, [USER, PLAIN], [],
    ),
    "FreedomIntelligence/CMB, exam": (
        {"exam_type": "医师考试", "exam_class": "执业医师", "exam_subject": "内科", "question": Q, "answer": "B",
         "question_type": "单项选择题", "option": {"A": "不用", "B": "要", "E": ""}},
        [{"role": "user", "content": f"{Q}\nA. 不用\nB. 要"}, {"role": "assistant", "content": "B"}],
        ["exam_type", "exam_class", "exam_subject", "question_type"],
    ),
    "FreedomIntelligence/CMB, cases": (
        {"id": "0", "title": "病例", "description": "男，50 岁。",
         "QA_pairs": [{"question": "诊断？", "solution": "眩晕。"}, {"question": Q, "solution": A}]},
        [{"role": "user", "content": "男，50 岁。\n\n诊断？"}, {"role": "assistant", "content": "眩晕。"}, USER, PLAIN],
        ["id", "title"],
    ),
    "williamliujl/CMExam": (
        {"Question": Q, "Options": "A 不用\nB 要", "Answer": "B", "Explanation": T, "Disease Group": "神经"},
        [{"role": "user", "content": f"{Q}\nA 不用\nB 要"},
         {"role": "assistant", "content": "B", "reasoning_content": T}],
        ["Disease Group"],
    ),
}  # fmt: skip

FORMS = {
    "alpaca with an input": ({"instruction": "回答病人。", "input": Q, "output": A},
                             [{"role": "user", "content": f"回答病人。\n{Q}"}, PLAIN]),
    "the *_format.jsonl of a run": ({"instruction": SYSTEM, "input": Q, "output": INLINE, "history": PAIRS},
                                    [*EARLIER, USER, THOUGHT]),
    "prompt and completion": ({"prompt": Q, "completion": INLINE}, [USER, THOUGHT]),
    "prompt and completion as messages": ({"prompt": [USER], "completion": [{"role": "assistant", "content": INLINE}]},
                                          [USER, THOUGHT]),
    "headers with blanks and another case": ({" Question": Q, "THINK ": T, "Ａｎｓｗｅｒ": A}, [USER, THOUGHT]),
    "Chinese headers": ({"问题": Q, "思考过程": T, "回答": A}, [USER, THOUGHT]),
    "messages as JSON text": ({"messages": json.dumps([USER, THOUGHT])}, [USER, THOUGHT]),
    "messages as Python writes them": ({"messages": str([USER, THOUGHT])}, [USER, THOUGHT]),
    "messages as columns": ({"messages": {"role": ["user", "assistant"], "content": [Q, INLINE]}}, [USER, THOUGHT]),
    "history as messages": ({"question": Q, "answer": A, "history": EARLIER}, [*EARLIER, USER, PLAIN]),
    "thinking in a column beside messages": ({"messages": [USER, PLAIN], "think": T}, [USER, THOUGHT]),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, {
        "role": "assistant", "content": [{"type": "thinking", "thinking": T}, {"type": "text", "text": A}]}]},
        [USER, THOUGHT]),
    "a context": ({"context": "男，50 岁。", "question": "诊断？", "answer": A},
                  [{"role": "user", "content": "男，50 岁。\n\n诊断？"}, PLAIN]),
    "empty cells of a table of several formats": ({"question": "", "instruction": Q, "answer": None, "output": A,
                                                   "think": float("nan")}, [USER, PLAIN]),
    "prompt and completion as the text of messages": (
        {"prompt": str([USER]), "completion": json.dumps([{"content": INLINE, "role": "assistant"}], indent=1)},
        [USER, THOUGHT]),
    "pairs by role": ({"conversation": [{"human": Q, "assistant": INLINE}]}, [USER, THOUGHT]),
    "a system message without text": ({"messages": [{"role": "system", "content": ""}, USER, PLAIN]}, [USER, PLAIN]),
    "keys of two forms in one table": ({"messages": [
        {"role": None, "from": "human", "content": None, "value": Q},
        {"role": "assistant", "from": None, "content": A, "value": None}]}, [USER, PLAIN]),
    "an answer that begins with a bracket": ({"question": Q, "answer": f"[1] {A}"},
                                             [USER, {"role": "assistant", "content": f"[1] {A}"}]),
    "two columns that say the same": ({"question": Q, "reasoning": T, "reasoning_content": T, "answer": A},
                                      [USER, THOUGHT]),
}  # fmt: skip
THINKING = {
    "inline": {"content": INLINE},
    "only closed": {"content": f"{T}\n</think>\n\n{A}"},
    "another case": {"content": f"<Think>{T}</THINK>{A}"},
    "another word": {"content": f"<thinking>{T}</thinking>\n{A}"},
    "full width": {"content": f"＜think＞{T}＜／think＞{A}"},
    "headings": {"content": f"## Thinking\n\n{T}\n\n## Final Response\n\n{A}"},
    "reasoning": {"content": A, "reasoning": T},
    "thinking": {"content": A, "thinking": T},
    "reasoning_details": {"content": A, "reasoning_details": [{"type": "reasoning.text", "text": T}]},
    "both of OpenRouter's": {
        "content": A,
        "reasoning": T,
        "reasoning_details": [{"type": "reasoning.text", "text": T}],
    },
    "an empty key beside a block": {"content": INLINE, "reasoning_content": "", "tool_calls": None},
    "a key beside an empty block": {"content": f"<think>\n\n</think>\n\n{A}", "reasoning_content": T},
    "a key and the same block": {"content": INLINE, "reasoning_content": T},
    "OpenThoughts": {
        "content": f"<|begin_of_thought|>\n\n{T}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n{A}\n\n"
        "<|end_of_solution|>"
    },
    "tags in the key": {"content": A, "reasoning_content": f"<think>\n{T}\n</think>"},
}
REFUSED = {
    "a tool call": ({"messages": [USER, {**PLAIN, "tool_calls": [{"name": "x"}]}]}, "has a tool call"),
    "a tool's answer": ({"messages": [USER, {"role": "tool", "content": "x"}, PLAIN]}, "has a tool call"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, PLAIN]},
                 "'image_url'"),
    "an unknown role": ({"messages": [USER, {"role": "narrator", "content": A}]}, "'narrator'"),
    "thinking twice": ({"messages": [USER, {"role": "assistant", "content": INLINE, "reasoning": "x"}]}, "another one"),
    "thinking twice, by column": ({"messages": [USER, THOUGHT], "cot": "另一个"}, "another one"),
    "a block without its end": ({"question": Q, "answer": f"<think>{T}"}, "without its end"),
    "an empty cell of pandas": ({"question": Q, "answer": "NaN"}, "'NaN'"),
    "a weight between": ({"messages": [USER, {**PLAIN, "weight": 0.5}]}, "0.5"),
    "no turn to train": ({"messages": [USER, {**PLAIN, "loss": False}]}, "no turn to train"),
    "cMedQA2, whose questions and answers are two files": ({"question_id": 1, "content": A}, "has no question"),
    "a key twice": ({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}, "`content` twice"),
    "choices without text": ({"question": Q, "options": [[1], {}], "answer": A}, "no choices that can"),
    "a part of no known type": ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}, PLAIN]}, "part"),
    "a table of other lengths": ({"messages": {"role": ["user", "assistant"], "content": [Q]}}, "not a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_public_sets_are_read_as_they_are(name):
    columns, messages, unused = SETS[name]
    row = read_row(columns)
    assert row.messages == messages and row.unused == unused and not row.notes
    system = {"role": "system", "content": SYSTEM}
    assert read_row(columns, SYSTEM).messages == [system, *messages]
    assert {*row.used, *unused} == {name for name, value in columns.items() if value not in (None, "")}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_people_keep(name):
    columns, messages = FORMS[name]
    row = read_row(columns, SYSTEM)
    assert row.messages == [{"role": "system", "content": SYSTEM}, *messages] and not row.unused


@pytest.mark.parametrize("name", THINKING)
def test_thinking_is_found_wherever_it_stands(name):
    assert read_row({"messages": [USER, {"role": "assistant", **THINKING[name]}]}).messages == [USER, THOUGHT]
    content = THINKING[name]["content"]
    if len(THINKING[name]) == 1:
        assert read_row({"question": Q, "answer": content}).messages == [USER, THOUGHT]
        assert read_row({"instruction": Q, "output": content}).messages == [USER, THOUGHT]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(name):
    columns, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        read_row(columns)


MEDIA = {"images": ["a.png"], "image": "a.png", "Video": "a.mp4", "videos": ["a.mp4"], "audios": ["a.wav"],
         "image_path": "a.png", "图片": "a.png", "image_urls": ["https://a"], "img": {"bytes": "x", "path": None},
         "photo": "a.png", "图片路径": "a.png", "audio_file": "a.wav", "frames": [1]}  # fmt: skip
NO_MEDIA = ("", "无", "None", "N/A", " ", [], "[]", [None], [""], {"bytes": None, "path": None}, float("nan"), None)


@pytest.mark.parametrize("preference", ["", "thumbs"])
def test_rows_with_pictures_videos_or_sound_are_refused_by_the_name_of_the_column(preference):
    row = {"messages": [USER, {**PLAIN, "reasoning_content": T}], "label": True}
    for name, value in MEDIA.items():
        with pytest.raises(ValueError, match=f"sound .`{name}`."):
            read_any(row | {name: value}, preference, "", ())
        for nothing in NO_MEDIA:
            assert read_any(row | {name: nothing}, preference, "", ())
    with pytest.raises(ValueError, match="`images`"):
        read_any(row | {"messages": [{**USER, "images": ["a.png"]}, PLAIN]}, preference, "", ())
    for name in ("image_id", "影像所见", "figure_of_speech", "视频号", "frame_of_mind"):
        assert read_any(row | {name: "a"}, preference, "", ())


def test_a_column_that_the_user_names_is_text():
    row = {"图像": "双肺纹理增多。", "答": A, "想": T}
    given = (("question", "图像"), ("answer", "答"), ("think", "想"))
    dialogue, _ = read_any(row, "", "", given)
    assert dialogue.messages[0]["content"] == "双肺纹理增多。"


@pytest.mark.parametrize(
    "options",
    [{"A": "甲", "B": "乙"}, ["甲", "乙"], ["A. 甲", "B. 乙"],
     [{"key": "A", "value": "甲"}, {"key": "B", "value": "乙"}],
     {"label": ["A", "B"], "text": ["甲", "乙"]}, "{'A': '甲', 'B': '乙'}", "A. 甲\nB. 乙"],
)  # fmt: skip
def test_choices_stand_below_the_question(options):
    messages = read_row({"question": Q, "options": options, "answer": "A"}).messages
    assert messages[0]["content"] == f"{Q}\nA. 甲\nB. 乙"


def test_empty_cells_of_pandas_are_empty():
    row = read_row(
        {"instruction": Q, "input": "None", "system": "nan", "context": "NaN", "history": "null", "output": A}
    )
    assert row.messages == [USER, PLAIN] and len(row.notes) == 4
    assert row.notes[0] == ("`input` is 'None', as pandas writes an empty cell", "taken as empty")
    assert read_row({"question": Q, "answer": "nan", "output": A}).messages == [USER, PLAIN]


def test_a_column_that_is_given_one_meaning_has_no_other():
    row = read_row({"instruction": "诊断？", "input": "男，50 岁。", "output": A}, given=(("context", "input"),))
    assert row.messages[0]["content"] == "男，50 岁。\n\n诊断？"


def test_a_second_system_prompt_is_named():
    own = {"role": "system", "content": "你是医生。"}
    row = read_row({"system": "你是护士。", "messages": [own, USER, PLAIN]}, SYSTEM)
    assert row.messages == [own, USER, PLAIN] and row.unused == ["system"]
    row = read_row({"system": "你是医生。", "messages": [own, USER, PLAIN]}, SYSTEM)
    assert row.messages == [own, USER, PLAIN] and not row.unused


def test_a_system_column_and_a_turn_that_is_not_trained():
    row = read_row({"system": "你是护士。", "question": Q, "answer": A}, SYSTEM)
    assert row.messages[0] == {"role": "system", "content": "你是护士。"}
    for key in ("loss", "weight", "train"):
        row = read_row({"messages": [EARLIER[0], {**EARLIER[1], key: 0}, USER, {**PLAIN, key: 1}]})
        assert row.messages == [EARLIER[0], {**EARLIER[1], "loss": False}, USER, PLAIN] and not row.unused


def test_a_turn_that_is_not_trained_is_history(jsonl, tokenizer):
    from data.encode import encode_rows

    rows = [
        {"messages": [{"role": "user", "content": f"{i}？"}, {**PLAIN, "loss": False}, USER, THOUGHT]}
        for i in range(10)
    ]
    split = load(jsonl(rows))
    examples, _ = encode_rows(split.train, tokenizer, 512, "error")
    assert len(examples) == len(split.train) == 9
    prompt = tokenizer.decode(examples[0].input_ids[: examples[0].prompt_length])
    assert prompt.count(A) == 1 and prompt.count(Q) == 1


def test_what_is_odd_is_noted():
    row = read_row({"messages": [USER, THOUGHT, {"role": "user", "content": "谢谢"}]})
    assert row.messages == [USER, THOUGHT] and row.notes == [("ends with a user turn", "turn cut")]
    for word in ("None", "nan", "null", "NaN", "无", "N/A"):
        row = read_row({"question": Q, "think": word, "answer": A})
        assert row.messages == [USER, PLAIN] and row.notes == [(f"its thinking is {word!r}", "taken as no thinking")]
    row = read_row(
        {"messages": [{**USER, "name": "病人"}, {**PLAIN, "content": [{"type": "text", "text": A, "id": "1"}]}]}
    )
    assert row.unused == ["messages[].content[].id", "messages[].name"]


def test_two_columns_that_could_be_the_thinking_are_decided_by_name(jsonl):
    columns = {"question": Q, "reasoning": T, "cot": "另一个", "answer": A, "note": "x"}
    with pytest.raises(Ambiguous, match=r"`reasoning` and `cot`.*--columns 'think=reasoning'"):
        read_row(columns)
    row = read_row(columns, given=(("think", "reasoning"),))
    assert row.messages == [USER, THOUGHT] and row.unused == ["cot", "note"]
    assert read_row({"a": Q, "b": A}, given=(("question", "a"), ("answer", "b"))).messages == [USER, PLAIN]
    rows = jsonl([{**columns, "question": f"{i}？"} for i in range(20)])
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: `reasoning`"):
        load(rows)
    about = load(rows, columns=("think=cot",)).report["datasets"][0]
    assert about["columns"] == {"question": {"question": 20}, "cot": {"think": 20}, "answer": {"answer": 20}}
    assert about["not_used"] == {"reasoning": 20, "note": 20}
    with pytest.raises(UserError, match=r"--columns think=Cot2: no row has this column; there are `question`"):
        load(rows, columns=("think=Cot2", "think=cot"))


def test_the_message_when_nothing_fits(jsonl):
    rows = jsonl([{"id": i, "title": f"{i}？", "text": A} for i in range(30)])
    with pytest.raises(UserError) as error:
        load(rows)
    message = str(error.value)
    assert message.count("has no") == 1 and "(and 29 more)" in message and len(message) < 1000
    assert "The columns are `id`, `title`, `text`" in message
    command = message.split("--columns ")[1].replace("'", "").split()
    assert command == ["question=title", "answer=text"]
    assert len(load(rows, columns=tuple(command)).train) == 27
    with pytest.raises(UserError, match="--columns 'question=title' 'answer=text'"):
        load(rows, columns=("question=title",))


# --- nothing is dropped without a line ------------------------------------------------------------------

NAMES = ["question", "Question ", "query", "instruction", "input", "prompt", "think", "cot", "reasoning", "answer",
         "output", "response", "content", "completion", "system", "history", "messages", "conversations", "context",
         "options", "x", "备注", ""]  # fmt: skip
WORD = st.text("医生头晕？。 \n<>/think", min_size=1, max_size=12)
LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats() | WORD | st.sampled_from([INLINE, "nan", f"{T}</think>{A}"])
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "reasoning", "reasoning_content", "name", "loss"]),
        LEAF | st.sampled_from(["user", "assistant", "human", "gpt", "system"]) | st.lists(st.fixed_dictionaries(
            {"type": st.just("text"), "text": WORD}, optional={"id": WORD}), max_size=2),
        max_size=4,
    ).map(lambda message: {"role": "user", **message}),
    max_size=4,
)  # fmt: skip
NESTED = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORD, inner, max_size=2))
VALUE = LEAF | NESTED | MESSAGES | MESSAGES.map(lambda messages: [*messages, PLAIN])
ROW = st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=6) | st.dictionaries(
    st.sampled_from(NAMES[:16]), WORD | st.sampled_from([Q, T, A, INLINE]), min_size=2, max_size=7
)


def leaves(value, path: str = "") -> list[tuple[str, str]]:
    """(path, text) of each text in a value."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner, f"{path}[]")]
    return [(path, value)] if isinstance(value, str) and value.strip() else []


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_text_is_dropped_without_a_line(count):
    """Every text of an accepted row is in its dialogue, or its column or key is among what is not used, or noted."""
    accepted = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(ROW)
    def check(columns):
        try:
            row = read_row(columns)
        except ValueError:
            return
        accepted.append(columns)
        said = "".join(message.get("reasoning_content", "") + message["content"] for message in row.messages)
        said = "".join(said.split())
        cut = any(action == "turn cut" for _, action in row.notes)
        for path, text in leaves(columns):
            named = any(path == name or path.startswith((f"{name}.", f"{name}[]")) for name in row.unused)
            noted = any(repr(text.strip()) in what for what, _ in row.notes)
            is_role = path.endswith((".role", ".from", ".type"))
            plain = "".join(TAG.sub("", text).split())
            assert named or noted or is_role or cut or plain in said, (path, text, row)

    check()
    assert len(accepted) > count / 20
