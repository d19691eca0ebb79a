"""What a person looks at before training: the data report as a table, one example with its targets marked."""

from rich.console import Console
from rich.text import Text

from data.base.language import tr
from data.encode import Example

STYLES = {"prompt": "dim", "think": "yellow", "answer": "green"}
COLUMNS = ("examples", "tokens", "think", "answer", "median", "max", "truncated", "dropped")
KEYS = ("examples", "tokens", "think_tokens", "answer_tokens", "median_length", "max_length", "truncated", "dropped")


def report_table(report: dict, dry_run: bool = False) -> str:
    """The short form of data_report.json: counts, lengths in tokens, the first problems."""
    lines = [cells(tr("data"), map(tr, COLUMNS))]
    lines += [cells(tr(name), (f"{report[name][key]:,}" for key in KEYS)) for name in ("train", "val")]
    lines += [line for about in report["datasets"] for line in set_lines(about)]
    counts = ("unusable", "duplicates", "train_val_overlap", "without_thinking")
    lines.append(
        tr(
            "{:,} rows read from {}: {:,} unusable, {:,} duplicates, {:,} in both train and val, {:,} replies without "
            "thinking",
            report["rows"],
            report["file"],
            *(report[name] for name in counts),
        )
    )
    if report["test_rows"]:
        lines.append(tr("{:,} rows kept for a test, in data/test.jsonl", report["test_rows"]))
    if report["excluded"]:
        lines.append(tr("{:,} rows left out, because --exclude or --exam holds them", report["excluded"]))
    problems = report["problems"]
    lines += [f"  {problem['location']} {problem['problem']}: {problem['action']}" for problem in problems[:5]]
    if len(problems) > 5:
        where = ", which a run lists in data_report.json" if dry_run else " in data_report.json"
        lines.append(tr(f"  ... and {{:,}} more{where}", len(problems) - 5))
    return "\n".join(lines)


def cells(first: str, others) -> str:
    """Padded as wide as a terminal shows it, where a Chinese character takes two columns."""
    texts = [Text(first).cell_len, first], *([Text(text).cell_len, text] for text in others)
    (width, name), *rest = texts
    return name + " " * (8 - width) + "".join(" " * max(1, 11 - width) + text for width, text in rest)


def set_lines(about: dict) -> list[str]:
    """What each column of a set became, and what of it is not used."""
    became = [
        tr("`{}` → {} ({:,} rows)", column, tr("thinking" if role == "think" else role), count)
        for column, roles in about["columns"].items()
        for role, count in roles.items()
    ]
    lines = [tr("{}: {:,} rows; {}", about["label"], about["rows"], ", ".join(became))]
    if about["not_used"]:
        unused = [tr("`{}` ({:,} rows)", column, count) for column, count in about["not_used"].items()]
        lines.append(tr("{}: not used: {}", about["label"], ", ".join(unused)))
    return lines + about["notes"]


def thinking_warning(report: dict) -> str | None:
    """If no reply thinks, or only some do."""
    without, replies = report["without_thinking"], report["replies"]
    if not without:
        return None
    if without == replies:
        return tr("no reply in this data thinks, so the model learns to answer without thinking")
    return tr(
        "{:,} of {:,} replies have no thinking; they train the answer after an empty thinking block, so the model "
        "learns both",
        without,
        replies,
    )


def show_example(example: Example, tokenizer, visible) -> None:
    """Prints the example's text, prompt, think and answer targets apart. visible: writes out control characters."""
    ids = example.input_ids.tolist()
    parts = {
        "prompt": (ids[: example.prompt_length], "not trained"),
        "think": (ids[example.prompt_length : example.answer_start], "target"),
        "answer": (ids[example.answer_start :], "target"),
    }
    console = Console(highlight=False)
    console.print(Text(tr("example {}", visible(example.location))), soft_wrap=True)
    for name, (part, note) in parts.items():
        console.print(Text(tr("--- {}: {} tokens, {}", tr(name), len(part), tr(note))), soft_wrap=True)
        console.print(Text(visible(tokenizer.decode(part)), STYLES[name]), soft_wrap=True)
