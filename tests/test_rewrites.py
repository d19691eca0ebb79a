"""Rules for rewritten questions: what changes the meaning is refused, whatever the wording."""

import pytest

from tools.rewrites import denials, names, numbers, overlap, problem

SAME = [
    ("我最近3天发烧38.5度，没有咳嗽，怎么办？", "我这三天发热38.5℃，没咳嗽，该怎么处理？"),
    ("一个多月以来月经一个月来两次，是怎么回事", "一个多月以来，月经每一个月来2次，怎么回事？"),
    ("我爸爸三天左右没吃东西了，是不是要去医院？", "爸爸3天左右没有吃东西，要不要去医院？"),
    ("孩子１２岁，体重45公斤，能吃布洛芬吗？", "12岁的孩子，体重45kg，可以吃布洛芬吗？"),
    ("I have had a fever of 38.5 for 2 days, no cough.", "Fever of 38.5 since 2 days ago, no coughing."),
]
OTHER = {
    "other numbers": [
        ("我最近3天一直发烧", "我最近5天一直发烧"),
        ("我最近3天一直发烧", "我最近3周一直发烧"),
        ("每次吃5毫克的药可以吗", "每次吃5克的药可以吗"),
        ("高压120低压80正常吗", "高压80低压120正常吗"),  # the same digits, in another place
        ("体温三十八度怎么办", "体温三十九度怎么办"),
        ("血糖７.8高不高", "血糖78高不高"),
        ("怀孕二十周可以做检查吗", "怀孕两周可以做检查吗"),
        ("一天吃三次药可以吗", "一天吃药可以吗"),
        ("半年没来月经怎么办", "一年没来月经怎么办"),
    ],
    "other negations": [
        ("我没有发烧但是咳嗽", "我有发烧但是咳嗽"),
        ("我没有发烧但是咳嗽", "我发烧但是没有咳嗽"),  # as many, of something else
        ("孕妇能吃这个药吗", "孕妇不能吃这个药吗"),
        ("检查未见异常还疼", "检查发现异常还疼"),
        ("无过敏史可以打针吗", "过敏史可以打针吗"),
        ("I do not have a fever today", "I do have a fever today"),
    ],
    "other names": [("需要做CT检查吗", "需要做MRI检查吗"), ("HPV16阳性怎么办", "HIV16阳性怎么办")],
    "other side or person": [
        ("左腿一直疼怎么办", "右腿一直疼怎么办"),
        ("我爱人头疼怎么办", "你爱人头疼怎么办"),
        ("男性尿频怎么办", "女性尿频怎么办"),
    ],
    "too near": [("医生，我最近头疼，怎么办？", "医生 我最近头疼 怎么办？")],
    "too far": [("我最近头疼怎么办", "请到神经内科就诊")],
    "too long": [("我头疼怎么办", "头疼的原因有很多，常见的有紧张性头痛和偏头痛，建议先休息再观察")],
    "more lines": [("我头疼怎么办？谢谢", "谢谢医生：\n我头疼怎么办？")],
    "no question": [("库欣综合征有哪些类型？请解释", "好的，库欣综合征有这些类型，我来解释")],
    "empty": [("我头疼怎么办", "……")],
}


@pytest.mark.parametrize(("question", "rewrite"), SAME)
def test_the_same_in_other_words(question, rewrite):
    assert problem(question, rewrite) is None


@pytest.mark.parametrize(
    ("question", "rewrite", "reason"), [(*pair, reason) for reason, pairs in OTHER.items() for pair in pairs]
)
def test_another_meaning_is_refused(question, rewrite, reason):
    assert problem(question, rewrite) == reason


def test_digits_and_chinese_numerals_are_the_same_numbers():
    for words, value in (("三十八天", 38), ("一百二十天", 120), ("两天", 2), ("一二〇天", 120), ("三万五千天", 35000)):
        assert numbers(words) == numbers(f"{value}天") == [(value, "天")]
    assert numbers("一直有一个问题") == [] and numbers("一个月") == [(1, "月")] and numbers("半天") == [(0.5, "天")]


def test_what_denies_nothing_is_no_negation():
    assert denials("是不是非常特别，要不要紧，不过有没有事，无论什么") == []
    assert denials("没有明显发热，不能走路") == ["发热", "走路"]
    assert names("打了5mg的EPO，做了CT") == ["ct", "epo"]
    assert overlap("头 疼！", "头疼") == 1 and overlap("头疼", "脚") == 0
