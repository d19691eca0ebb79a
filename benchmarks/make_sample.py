"""Composes data/sample.jsonl and data/sample_feedback.jsonl, the embedded rows: python benchmarks/make_sample.py

Each complaint of complaints.yaml has its department, what it may be, what to examine, what to do and what is an
emergency; wording, person and time are drawn at random. A small model can learn the first and answer new questions; the
second it can only memorise, so its evaluation loss falls, turns and rises, as with real data.

The feedback is on replies to other questions. The bad ones name no department.
"""

import json
import random
import re
from pathlib import Path

import yaml

ROWS_OF_EACH = 40
PERSONS = {
    "adults": ("我", "我妈妈", "我爸爸", "我爱人", "我同事", "我舅舅", "我邻居"),
    "women": ("我", "我姐姐", "我妹妹", "我爱人", "我同事"),
    "children": ("我家孩子", "我女儿", "我儿子", "我侄子", "我外甥女"),
}
TIMES = {
    "sudden": ("今天", "从昨天起", "这两天", "三天前开始", "今早起"),
    "slow": ("最近两周", "近一个月", "半个多月来", "这三周", "近两个月", "一个多月以来"),
}
ENDINGS = ("该怎么办？", "要去医院吗？", "应该看哪个科？", "要紧吗？", "需要做什么检查？", "是什么问题？")
TALK = ("医生，", "您好，", "请问，", "", "")
THINK = (
    ("先看主诉：{symptom}。", "用户说的是{symptom}。", "嗯，{symptom}，", "抓住重点，{symptom}。"),
    ("首先考虑{cause}，", "最像的是{cause}，", "这种情况常见于{cause}，"),
    ("还要和{other}区分。", "不过{other}也可能这样。", "同时不能漏掉{other}。"),
    ("需要查{test}来明确。", "下一步应该做{test}。", "要靠{test}确诊。"),
    ("如果有{alarm}，就是急症。", "要提醒他，{alarm}是危险信号。", "必须问清有没有{alarm}。"),
)
ANSWER = (
    ("这种情况可能是{cause}，", "从描述看，比较像{cause}，", "您说的情况要考虑{cause}，"),
    ("建议到{department}就诊，", "请挂{department}的号，", "可以先去{department}，"),
    ("做{test}检查。", "查一下{test}。", "请医生安排{test}。"),
    ("平时{advice}。", "在此之前，{advice}。", "同时{advice}。"),
    ("如果出现{alarm}，请立即去急诊。", "一旦{alarm}，马上拨打120。", "若有{alarm}，不要等，直接去急诊。"),
)
NOW = ("请马上拨打120或去{department}，", "不要等，立即去{department}，", "现在就去{department}，")


def compose(complaint: dict, chance: random.Random) -> dict:
    words = {name: value if isinstance(value, str) else chance.choice(value) for name, value in complaint.items()}
    words["symptom"] = words.pop("symptoms")
    person = chance.choice(PERSONS[words.get("persons", "adults")])
    time = chance.choice(TIMES[words.get("times", "slow")])
    answer = [ANSWER[0], NOW if words["department"] == "急诊科" else ANSWER[1], *ANSWER[2:]]
    return {
        "instruction": f"根据症状判断可能的疾病，说明应到哪个科室就诊：{words['cause']}。",
        "question": f"{chance.choice(TALK)}{person}{time}{words['symptom']}，{chance.choice(ENDINGS)}",
        "think": "".join(chance.choice(part) for part in THINK).format(**words),
        "answer": "".join(chance.choice(part) for part in answer).format(**words).replace("检查检查", "检查"),
        "department": words["department"],
    }


def make_rows(seed: int = 0) -> list[dict]:
    """The rows in random order; no question stands twice."""
    chance, rows = random.Random(seed), {}
    for complaint in yaml.safe_load(Path(__file__).with_name("complaints.yaml").read_text(encoding="utf-8")):
        wanted = len(rows) + ROWS_OF_EACH
        while len(rows) < wanted:
            row = compose(complaint, chance)
            rows.setdefault(row["question"], row)
    rows = list(rows.values())
    chance.shuffle(rows)
    return rows


def without_department(row: dict) -> dict:
    """The row with a fault: its answer sends the patient nowhere, and its thinking is the same."""
    rest = re.sub(f"[^，。]*{row['department']}[^，。]*[，。]", "", row["answer"])
    return {**row, "answer": rest}


def make_feedback(seed: int = 1) -> list[dict]:
    """Likes, dislikes, corrections and votes, a line each."""
    known = {row["question"] for row in make_rows()}
    rows = [row for row in make_rows(seed) if row["question"] not in known]
    kinds = ["like"] * 40 + ["dislike"] * 40 + ["edit"] * 30 + ["a"] * 25 + ["b"] * 25
    lines = []
    for number, (kind, row) in enumerate(zip(kinds, rows, strict=False)):
        good, bad = reply_of(row), reply_of(without_department(row))
        line = {"id": f"sample-{number}", "model": "sample", "messages": [{"role": "user", "content": row["question"]}]}
        if kind in ("a", "b"):
            line |= {"replies": [good, bad] if kind == "a" else [bad, good], "verdict": kind}
        else:
            line["messages"].append(good if kind == "like" else bad)
            line |= {"verdict": kind, "correction": {k: v for k, v in good.items() if k != "role"}}
            if kind != "edit":
                del line["correction"]
        lines.append(line)
    random.Random(seed).shuffle(lines)
    return lines


def reply_of(row: dict) -> dict:
    return {"role": "assistant", "content": row["answer"], "reasoning_content": row["think"]}


if __name__ == "__main__":
    for name, rows in (("sample", make_rows()), ("sample_feedback", make_feedback())):
        path = Path(__file__).parent.parent / "data" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")
