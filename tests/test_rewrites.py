"""Rules for rewritten questions: what changes the meaning is refused, whatever the wording."""

import pytest

from tools.rewrites import denials, names, numbers, overlap, problem

SAME = [
    ("我最近3天发烧38.5度，没有咳嗽，怎么办？", "我这三天发热38.5℃，没咳嗽，该怎么处理？"),
    ("一个多月以来月经一个月来两次，是怎么回事", "一个多月以来，月经每个月来2次，怎么回事？"),
    ("我爸爸三天左右没吃东西了，是不是要去医院？", "爸爸3天左右没有吃东西，要不要去医院？"),
    ("孩子１２岁，体重45公斤，能吃布洛芬吗？", "12岁的孩子，体重45kg，可以吃布洛芬吗？"),
    ("28岁，孕3个月，能吃药吗？", "怀孕3个月，28岁，可以吃药吗？"),  # numbers of other units may change places
    ("发烧三四天了，怎么办？", "已经发热3-4天了，该怎么办？"),
    ("每天吃三次，可以吗？", "一天吃3次行不行？谢谢您！"),
    ("头十分难受，千万不要紧吧，有一点恶心？", "头非常难受，不要紧吧，有点恶心？"),
    ("发作过2h，血小板5万，双侧都疼，怎么办？", "发作过2小时，血小板50000，两侧都疼，该怎么办？"),
    ("如何鉴别流感和感冒？", "怎么区分流感和感冒？"),
    ("高血压应该怎么治疗？", "高血压有哪些治疗方法"),
    ("我一直头疼，走路不稳，要紧吗？", "要紧吗？我一直头疼，走路不稳。"),
    ("I have had a fever of 38.5 for 2 days, no cough.", "Fever has lasted; 38.5, 2 days, no coughing."),
    ("Is it normal to have a rash?", "Is having a rash common?"),
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
        ("我月经推迟一个半月了，怎么回事？", "月经已经推迟了半个月，是怎么回事呢？"),
        ("华法林每天吃一次，出血了怎么办？", "华法林每周吃一次，出血了怎么办？"),
        ("隔天打一针可以吗", "每天打一针可以吗"),
        ("发烧三四天了怎么办", "发烧34天了怎么办"),
        ("每次滴5滴眼药水可以吗？", "眼药水每次用5瓶行吗？"),
        ("我3月份做的手术，要复查吗", "我做手术3个月了，要复查吗"),
        ("下午3点开始腹痛怎么办", "下午腹痛3小时了怎么办"),
        ("一型糖尿病怎么治疗", "糖尿病怎么治疗"),
        ("I took two tablets, is it fine?", "I took five tablets, is it fine?"),
    ],
    "other signs": [
        ("我的肌酐>100，要不要紧？", "肌酐‹100，我这个情况要紧吗？"),
        ("蛋白尿(+)，怎么回事？", "蛋白尿(-)，是怎么回事？"),
        ("剩余碱为-3怎么办", "剩余碱3该怎么办"),
    ],
    "other negations": [
        ("我没有发烧但是咳嗽", "我有发烧但是咳嗽"),
        ("我没有发烧但是咳嗽", "我发烧但是没有咳嗽"),  # as many, of something else
        ("我没有腹痛，腹泻两天了，怎么办？", "我没有腹泻，腹痛两天了，该怎么办？"),
        ("患者无头痛，有头晕，怎么办", "患者无头晕，有头痛，怎么办"),
        ("宝宝不爱吃奶怎么办？", "宝宝不爱喝水怎么办？"),
        ("孕妇能吃这个药吗", "孕妇不能吃这个药吗"),
        ("检查未见异常还疼", "检查发现异常还疼"),
        ("无过敏史可以打针吗", "过敏史可以打针吗"),
        ("我对青霉素不过敏，可以打头孢吗？", "我青霉素过敏，能不能打头孢？"),
        ("三个月不同房，怎么还会阴道出血？", "同房三个月，阴道出血是怎么回事？"),
        ("月经未来10天了，怎么办？", "来月经10天了，该怎么办？"),
        ("意识不清楚，血压120，怎么办？", "意识清楚，血压是120，该如何处理？"),
        ("降压药不管用，血压160怎么办", "降压药管用，血压还是160怎么办"),
        ("孩子不知道疼，怎么办", "孩子知道疼，怎么办"),
        ("I don\u2019t have diabetes. Can I eat sugar?", "I have diabetes. May I eat sugar?"),
        ("Can I take aspirin, not ibuprofen?", "Can I take ibuprofen, not aspirin?"),
        ("I do not have a fever today", "I do have a fever today"),
    ],
    "the contrary": [
        ("乙肝表面抗原阳性怎么办", "乙肝表面抗原阴性怎么办"),
        ("血压不低于140怎么办？", "血压不高于140怎么办？"),
        ("药在饭前吃可以吗", "药在饭后吃可以吗"),
        ("月经推迟了怎么回事", "月经提前了怎么回事"),
        ("上腹一直疼怎么办", "下腹一直疼怎么办"),
        ("停止服用降压药可以吗", "开始服用降压药可以吗"),
    ],
    "other names": [
        ("需要做CT检查吗", "需要做MRI检查吗"),
        ("HPV16阳性怎么办", "HIV16阳性怎么办"),
        ("M蛋白升高怎么办", "G蛋白升高怎么办"),
        ("L5椎间盘突出怎么办", "M5椎间盘突出怎么办"),
    ],
    "other side or person": [
        ("左腿一直疼怎么办", "右腿一直疼怎么办"),
        ("左右手都麻，怎么办？", "手都麻了，该怎么办？"),
        ("我爱人头疼怎么办", "你爱人头疼怎么办"),
        ("医生，我最近被诊断为肺炎，您能推荐药吗？", "医生，你最近被诊断为肺炎，有什么药吗？"),
        ("我妈妈头疼怎么办", "我爸爸头疼怎么办"),
        ("我头疼怎么办呢", "他头疼怎么办呢"),
        ("他不吸烟，但爱人吸烟，要紧吗", "爱人不吸烟，但他吸烟，要紧吗"),
        ("男性尿频怎么办", "女性尿频怎么办"),
        ("My left knee hurts, what can I do?", "My right knee hurts, what can I do?"),
    ],
    "too near": [("医生，我最近头疼，怎么办？", "医生 我最近头疼 怎么办？")],
    "too far": [("我最近头疼怎么办", "请到神经内科就诊")],
    "too long": [("我头疼怎么办", "头疼的原因有很多，常见的有紧张性头痛和偏头痛，建议先休息再观察")],
    "more or fewer lines": [
        ("我头疼怎么办？谢谢", "谢谢医生：\n我头疼怎么办？"),
        ("血压180，头疼\n怎么办？", "血压180，头疼，该怎么处理？"),
    ],
    "no question": [("库欣综合征有哪些类型？请解释", "库欣综合征有这些类型，我来解释")],
    "more than the question": [
        ("我发热了，没咳嗽，怎么办？", "改写后的问题：我发热了，没咳嗽，怎么办？"),
        ("头疼三天了，怎么办？", "头疼三天了，怎么办？建议多休息多喝水"),
    ],
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
        assert numbers(words) == numbers(f"{value}天") == {"天": [value]}
    assert numbers("一直有一个问题") == {} and numbers("一个月") == {"月": [1]} and numbers("半天") == {"天": [0.5]}
    assert numbers("一个半月") == {"月": [1, 0.5]} and numbers("七八个月") == numbers("7到8个月") == {"月": [7, 8]}


def test_what_denies_nothing_is_no_negation():
    assert denials("是不是非常特别，要不要紧，不过有没有事，无论什么") == []
    assert denials("没有明显发热，不能走路") == ["发热", "走路"]
    assert names("打了5mg的EPO，做了CT") == ["ct", "epo"]
    assert overlap("头 疼！", "头疼") == 1 and overlap("头疼", "脚") == 0
