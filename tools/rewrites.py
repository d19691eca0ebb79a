"""Does a rewritten question still ask the same? Rules that only ever say no: a rewrite that is lost costs little, one
that asks for something else teaches a wrong answer.

They compare what both texts say in numbers with their units, signs, negations, opposites, persons and sides, and in
Latin letters (drugs, genes, CT), and how many characters they share. They do not understand: the loss of the row's own
answer, in tools/augment.py, is the other half of the check.
"""

import difflib
import re
import unicodedata

# Share of characters in common, in order: above, a rewrite teaches nothing; below, it asks for something else.
NEAREST, FARTHEST = 0.92, 0.3
LONGEST = 1.5  # times the question

# What means the same after a number; other units below stand for themselves.
UNITS = {
    "周": ("周", "个星期", "星期", "个礼拜", "礼拜"),
    "月": ("个月",),
    "月份": ("月份", "月"),  # 3月 is March, 3个月 is how long
    "岁": ("周岁", "岁"),
    "时": ("个小时", "小时", "个钟头", "钟头", "h"),
    "点": ("点钟", "点"),
    "分": ("分钟", "分"),
    "秒": ("秒钟", "秒"),
    "号": ("号", "日"),
    "次": ("次", "回", "遍"),
    "克": ("克", "g"),
    "毫克": ("毫克", "mg"),
    "微克": ("微克", "μg", "ug"),
    "千克": ("千克", "公斤", "kg"),
    "升": ("升", "l"),
    "毫升": ("毫升", "ml"),
    "米": ("米", "m"),
    "厘米": ("厘米", "公分", "cm"),
    "毫米": ("毫米", "mm"),
    "度": ("摄氏度", "度", "℃", "°c"),
    "片": ("片", "粒", "颗"),
    "疗程": ("个疗程", "疗程"),
    "侧": ("侧",),
}
UNITS |= {unit: (unit,) for unit in "天年斤支瓶袋包盒滴针倍%型级期胎代顿餐晚"}
UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names}
UNIT = "|".join(re.escape(name) for name in sorted(UNIT_OF, key=len, reverse=True))
NUMBER = re.compile(
    rf"(?P<digits>\d+(?:\.\d+)?)(?P<scale>[百千万])?(?P<unit>{UNIT})?"
    rf"|(?P<words>[零〇一二三四五六七八九十百千万两半]+)(?P<word_unit>{UNIT})?"
    rf"|(?P<every>[每隔])(?P<every_unit>{UNIT})"
)
SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10000}
# Numerals that count nothing.
NO_NUMBER = re.compile(r"十分(?!钟|之)|千万(?=不|别|要)|一点(?!钟|半|\d)|半夜|万一")
A_HALF = re.compile(r"([一二两三四五六七八九十\d]+)个半(月|小时|星期|钟头)")  # 一个半月

# Words that hold 不, 没, 无, 未, 非 or 别 and deny nothing, and questions such as 是不是.
NO_DENIAL = re.compile(
    r"(.{1,2})[不没]\1|不好意思|不过(?!敏|量|度)|不仅|不但|不管(?!用)|不久|不同(?!房|意)|差不多|无论|非常|除非"
    r"|(?<!月经)(?<!例假)(?<!大姨妈)未来|特别|别人|级别|性别|类别|区别|鉴别|辨别|识别|个别|分别"
)
DENIAL = re.compile("没有|没|未|无法|无|不是|不|并非|非|否认|别|勿|缺乏")
FILLER = re.compile("^(?:明显|任何|出现|什么|再|太|怎么|过|有|能|会|是|见|发现|感到|觉得|爱|想|肯|愿意)+")
# Each means the contrary of the other; a rewrite must not have one in the place of the other.
OPPOSITES = [
    tuple(map(re.compile, pair))
    for pair in (
        ("阳性|[(]\\+[)]", "阴性|[(]-[)]"),
        ("高", "低"),
        ("[饭餐术产睡孕病]前", "[饭餐术产睡孕病]后"),
        ("上(?=腹|肢|颌|臂|眼)", "下(?=腹|肢|颌|臂|眼)"),
        ("推迟|延迟|延后|推后|晚了", "提前|早了"),
        ("停止|停药|停用|停服|停掉", "开始|服用|继续"),
        ("增加|增多|增大|变大|变多|加重|升高|变高|上升", "减少|减小|缩小|变小|变少|减轻|缓解|降低|变低|下降"),
        ("大于|超过|多于", "小于|不到|少于"),
        ("良性", "恶性"),
        ("急性", "慢性"),
        ("内侧", "外侧"),
        ("便秘", "腹泻|拉肚子"),
    )
]
SIDES = re.compile("左|右|单侧|男|女")
ABOUT = re.compile(r"(?<=[\d天日号周月年岁次度点个分秒斤克升米时])左右")  # 三天左右
# Who is meant. 我 may be left out; 你 in its place asks about another person.
PERSONS = {
    "妈": "妈妈|母亲|妈",
    "爸": "爸爸|父亲|爸",
    "孩": "孩子|小孩|宝宝|宝贝|娃",
    "儿子": "儿子",
    "女儿": "女儿",
    "伴": "爱人|老公|丈夫|老婆|妻子|媳妇",
    "他": "他|她",
    "你": "你|您",
    "奶奶": "奶奶|外婆|姥姥",
    "爷爷": "爷爷|外公|姥爷",
}
PERSON = re.compile("|".join(f"(?P<{name}>{words})" for name, words in PERSONS.items()))
POLITE = re.compile("[你您]好|(?:谢谢|感谢)(?:[你您]|医生|大夫)*了?|请问|麻烦[你您]|[你您]帮")
SIGNS = re.compile(r"[<>≤≥±+]|(?<!\d)-(?=\d)|(?<=[(])-(?=[)])")
ASKS = re.compile("[?]|[吗呢么][。!]*$|怎么|怎样|如何|哪|什么|多少|几|是否|能否|可否|为何|请")
CHATTER = re.compile("改写|重写|重新表述|改述|^(?:好的|当然|以下|问题:)|rewritten", re.IGNORECASE)

ADVICE = re.compile("建议|应该|应当|可以|需要|注意|避免|多休息|就诊|就医|去医院")

ENGLISH_NUMBERS = re.findall("[a-z]+", "zero one two three four five six seven eight nine ten eleven twelve")
ENGLISH_DENIAL = re.compile(r"^(?:no|not|never|without|none|nor|cannot)$|n't$")
ENGLISH_FILLER = ("a", "an", "any", "the", "have", "had", "has", "been", "feel", "be")


def plain(text: str) -> str:
    """Without whitespace, case, width and the marks of politeness."""
    text = unicodedata.normalize("NFKC", text).casefold().translate({0x2039: "<", 0x203A: ">", 0x2212: "-"})
    return POLITE.sub("", "".join(text.split())).replace("双侧", "两侧")


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+|\d+(?:\.\d+)?", text.casefold().replace("\u2019", "'"))


def numbers(text: str) -> dict[str, list[float]]:
    """unit -> the numbers that have it, in order, from digits, from Chinese or English words, from 每 (1) and 隔 (2);
    the unit is empty if none is known."""
    if not is_chinese(text):
        known = {word: str(value) for value, word in enumerate(ENGLISH_NUMBERS)}
        found = (known.get(word, word) for word in words_of(text))
        return {"": [float(word) for word in found if word[0].isdigit()]}
    text = A_HALF.sub(r"\1个\2半个\2", NO_NUMBER.sub("", plain(text)))
    found, end = [], 0
    for match in NUMBER.finditer(text):
        unit = UNIT_OF.get(match["unit"] or match["word_unit"] or match["every_unit"] or "", "")
        if found and not found[-1][1] and text[end : match.start()] in ("到", "至", "-", "~"):
            found[-1] = (found[-1][0], unit)  # 三到四天
        end = match.end()
        if match["digits"]:
            found.append((float(match["digits"]) * SCALES.get(match["scale"], 1), unit))
        elif match["every"]:
            found.append((1.0 if match["every"] == "每" else 2.0, "天" if unit == "号" else unit))
        elif match["words"] != "一" or unit:  # 一 alone also begins 一直, 一样, 一个问题
            found += [(value, unit) for value in values(match["words"])]
    units: dict[str, list[float]] = {}
    for value, unit in found:
        units.setdefault(unit, []).append(value)
    return units


def values(words: str) -> list[float]:
    """Of Chinese numerals: 三十八 is 38, 一二〇 is 120, 两 is 2, 三四 is 3 or 4, and 半 is a half of its own."""
    half = [0.5] * words.count("半")
    words = words.replace("半", "").replace("两", "二")
    if not words:
        return half
    if not any(word in SCALES for word in words):
        digits = [int(unicodedata.numeric(word)) for word in words]
        if len(digits) == 2 and digits[0] and digits[1] == digits[0] + 1:
            return [*map(float, digits), *half]
        return [float("".join(map(str, digits))), *half]
    total, section, digit = 0, 0, 0
    for word in words:
        if word == "万":
            total, section, digit = total + (section + digit or 1) * 10000, 0, 0
        elif word in SCALES:
            section, digit = section + (digit or 1) * SCALES[word], 0
        else:
            digit = int(unicodedata.numeric(word))
    return [float(total + section + digit), *half]


def denials(text: str) -> list[str]:
    """What each negation denies: the two characters after it, or the word."""
    if not is_chinese(text):
        words = words_of(text)
        after = [words[n + 1 :] for n, word in enumerate(words) if ENGLISH_DENIAL.search(word)]
        return [next((word[:5] for word in rest if word not in ENGLISH_FILLER), "") for rest in after]
    text = NO_DENIAL.sub("", plain(text))
    return [FILLER.sub("", text[match.end() : match.end() + 8])[:2] for match in DENIAL.finditer(text)]


def same_denials(question: str, rewrite: str) -> bool:
    """As many, and each of the same; another word for it must not stand, not denied, in the other text."""
    first, second = denials(question), denials(rewrite)
    return len(first) == len(second) and all(
        a == b or (bool(set(a) & set(b)) and a not in plain(rewrite) and b not in plain(question))
        for a, b in zip(first, second, strict=True)
    )


def names(text: str) -> list[str]:
    """Words of Latin letters in a Chinese text, without units."""
    return sorted(re.findall(r"[a-zα-ω]+", NUMBER.sub(" ", plain(text)))) if is_chinese(text) else []


def sides(text: str) -> list[str]:
    if not is_chinese(text):
        return [word for word in words_of(text) if word in ("left", "right")]
    return SIDES.findall(ABOUT.sub("", plain(text)))


def same_persons(question: str, rewrite: str) -> bool:
    first, second = plain(question), plain(rewrite)
    meant = [[match.lastgroup for match in PERSON.finditer(text)] for text in (first, second)]
    asks_of_another = "我" in first and "我" not in second and "你" in second.replace("您", "你")
    return meant[0] == meant[1] and not asks_of_another


def turned(question: str, rewrite: str) -> bool:
    """Whether an opposite took the place of a word."""
    first, second = plain(question), plain(rewrite)
    for pair in OPPOSITES:
        change = [len(word.findall(second)) - len(word.findall(first)) for word in pair]
        if min(change) < 0 < max(change):
            return True
    return False


def overlap(first: str, second: str) -> float:
    """Share of characters that two texts have in common, in order; punctuation does not count."""
    first, second = (re.sub(r"[\W_]", "", plain(text)) for text in (first, second))
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def is_more(question: str, rewrite: str) -> bool:
    """Whether a rewrite talks about itself, or goes on after its question, as if it answered."""
    first, second = plain(question), plain(rewrite)
    if CHATTER.search(second) and not CHATTER.search(first):
        return True
    tails = [text.rpartition("?")[2] if "?" in text else "" for text in (first, second)]
    return len(tails[1]) > len(tails[0]) + 4 and bool(ADVICE.search(tails[1])) and not ADVICE.search(first)


def problem(question: str, rewrite: str) -> str | None:
    """Why a rewrite is dropped; None if no rule speaks against it."""
    if not re.search(r"\w", rewrite):
        return "empty"
    if len(rewrite) > LONGEST * len(question) + 10:
        return "too long"
    if len(rewrite.splitlines()) != len(question.splitlines()):
        return "more or fewer lines"
    rules = {
        "no question": ASKS.search(plain(question)) and not ASKS.search(plain(rewrite)),
        "more than the question": is_more(question, rewrite),
        "other numbers": numbers(question) != numbers(rewrite),
        "other signs": SIGNS.findall(plain(question)) != SIGNS.findall(plain(rewrite)),
        "other negations": not same_denials(question, rewrite),
        "the contrary": turned(question, rewrite),
        "other names": names(question) != names(rewrite),
        "other side or person": sides(question) != sides(rewrite) or not same_persons(question, rewrite),
    }
    if found := next((reason for reason, broken in rules.items() if broken), None):
        return found
    share = overlap(question, rewrite)
    return "too near" if share > NEAREST else "too far" if share < FARTHEST else None
