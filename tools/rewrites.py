"""Does a rewritten question still ask the same? Rules that only ever say no: a rewrite that is lost costs little, one
that asks for something else teaches a wrong answer.

They compare what both texts say in numbers with their units, in negations, in Latin letters (drugs, genes, CT) and of
left and right, and how many characters they share. They do not understand: the loss of the row's own answer, in
tools/augment.py, is the other half of the check.
"""

import difflib
import re
import unicodedata

# Share of characters in common, in order: above, a rewrite teaches nothing; below, it asks for something else.
NEAREST, FARTHEST = 0.92, 0.3
LONGEST = 1.5  # times the question

UNITS = {
    "天": ("天", "日"),
    "周": ("周", "个星期", "星期", "个礼拜", "礼拜"),
    "月": ("个月", "月份", "月"),
    "年": ("年",),
    "岁": ("周岁", "岁"),
    "时": ("个小时", "小时", "个钟头", "钟头", "点钟", "点"),
    "分": ("分钟", "分"),
    "秒": ("秒钟", "秒"),
    "次": ("次", "回", "遍"),
    "克": ("克", "g"),
    "毫克": ("毫克", "mg"),
    "微克": ("微克", "μg", "ug"),
    "千克": ("千克", "公斤", "kg"),
    "斤": ("斤",),
    "升": ("升", "l"),
    "毫升": ("毫升", "ml"),
    "米": ("米", "m"),
    "厘米": ("厘米", "公分", "cm"),
    "毫米": ("毫米", "mm"),
    "度": ("摄氏度", "度", "℃", "°c"),
    "片": ("片", "粒", "颗"),
    "支": ("支", "瓶", "袋", "包", "盒", "滴"),
    "倍": ("倍",),
    "%": ("%",),
}
UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names}
UNIT = "|".join(re.escape(name) for name in sorted(UNIT_OF, key=len, reverse=True))
# 一 counts only before a unit: it also begins 一直, 一样, 一个问题.
NUMBER = re.compile(
    rf"(?P<digits>\d+(?:\.\d+)?)\s*(?P<unit>{UNIT})?"
    rf"|(?P<words>[零〇一二三四五六七八九十百千万两半]+)(?P<word_unit>{UNIT})?",
    re.IGNORECASE,
)
SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10000}

# Words that hold 不, 没, 无, 未, 非 or 别 and deny nothing, and questions such as 是不是.
NO_DENIAL = re.compile(
    r"(.{1,2})[不没]\1|不知道?|不清楚|不确定|不明白|不好意思|不过|不仅|不但|不管|不久|不同|差不多|无论|未来|非常|除非"
    r"|特别|别人|级别|性别|区别|个别|分别"
)
DENIAL = re.compile("没有|没|未|无法|无|不是|不|并非|非|否认|别|勿|缺乏|no|not|never|without|n't", re.IGNORECASE)
FILLER = re.compile("^(?:明显|任何|出现|什么|再|太|怎么|过|有|能|会|是|见|发现|感到|觉得)+")
ASKS = re.compile(r"[？?]|[吗呢么][。！]*$")
SIDES = re.compile("左|右|双侧|单侧|两侧|男|女|[你您](?!好)")  # 你 in the place of 我 asks about another person


def plain(text: str) -> str:
    """Without whitespace, case and width."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def numbers(text: str) -> list[tuple[float, str]]:
    """(value, unit) of each number in order, in digits or in Chinese; the unit is empty if none is known."""
    found = []
    for match in NUMBER.finditer(plain(text)):
        unit = UNIT_OF.get(match["unit"] or match["word_unit"] or "", "")
        if match["digits"]:
            found.append((float(match["digits"]), unit))
        elif match["words"] != "一" or unit:
            found += [(value, unit) for value in values(match["words"])]
    return found


def values(words: str) -> list[float]:
    """Of Chinese numerals: 三十八 is 38, 一二〇 is 120, 两 is 2, and 半 is a half of its own."""
    half = [0.5] * words.count("半")
    words = words.replace("半", "").replace("两", "二")
    if not words:
        return half
    if not any(word in SCALES for word in words):
        return [float("".join(str(int(unicodedata.numeric(word))) for word in words)), *half]
    total, section, digit = 0, 0, 0
    for word in words:
        if word == "万":
            total, section, digit = total + (section + digit) * 10000, 0, 0
        elif word in SCALES:
            section, digit = section + (digit or 1) * SCALES[word], 0
        else:
            digit = int(unicodedata.numeric(word))
    return [float(total + section + digit), *half]


def denials(text: str) -> list[str]:
    """What each negation denies: the two characters after it."""
    text = NO_DENIAL.sub("", plain(text))
    return [FILLER.sub("", text[match.end() : match.end() + 8])[:2] for match in DENIAL.finditer(text)]


def names(text: str) -> list[str]:
    """Words of Latin letters in a Chinese text, without units."""
    if not is_chinese(text):
        return []
    return sorted(word for word in re.findall(r"[a-zα-ω]+", plain(NUMBER.sub(" ", text))) if word not in UNIT_OF)


def sides(text: str) -> list[str]:
    return ["你" if side == "您" else side for side in SIDES.findall(plain(text).replace("左右", ""))]


def overlap(first: str, second: str) -> float:
    """Share of characters that two texts have in common, in order; punctuation does not count."""
    first, second = (re.sub(r"[\W_]", "", plain(text)) for text in (first, second))
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def problem(question: str, rewrite: str) -> str | None:
    """Why a rewrite is dropped; None if no rule speaks against it."""
    if not re.search(r"\w", rewrite):
        return "empty"
    if len(rewrite) > LONGEST * len(question) + 10:
        return "too long"
    if len(rewrite.splitlines()) > len(question.splitlines()):
        return "more lines"
    if ASKS.search(question) and not ASKS.search(rewrite):
        return "no question"
    if numbers(question) != numbers(rewrite):
        return "other numbers"
    denied = list(zip(denials(question), denials(rewrite), strict=False))
    if len(denials(question)) != len(denials(rewrite)) or not all(same_words(*pair) for pair in denied):
        return "other negations"
    if names(question) != names(rewrite):
        return "other names"
    if sides(question) != sides(rewrite):
        return "other side or person"
    share = overlap(question, rewrite)
    return "too near" if share > NEAREST else "too far" if share < FARTHEST else None


def same_words(first: str, second: str) -> bool:
    return first == second or bool(set(first) & set(second))
