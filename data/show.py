"""What a person looks at before training: the data report as a table, one example with its targets marked."""

from data.encode import Example

COLORS = {"prompt": "\033[2m", "think": "\033[33m", "answer": "\033[32m"}


def report_table(report: dict, dry_run: bool = False) -> str:
    """The short form of data_report.json: counts, lengths in tokens, the first problems."""
    lines = [
        f"{'data':<10}{'examples':>9}{'tokens':>10}{'think':>10}{'answer':>10}{'median':>8}{'max':>7}{'truncated':>11}{'dropped':>9}"
    ]
    for name in ("train", "val"):
        side = report[name]
        counts = (side["tokens"], side["think_tokens"], side["answer_tokens"])
        lines.append(
            f"{name:<10}{side['examples']:>9,}{counts[0]:>10,}{counts[1]:>10,}{counts[2]:>10,}"
            f"{side['median_length']:>8,}{side['max_length']:>7,}{side['truncated']:>11,}{side['dropped']:>9,}"
        )
    lines += [line for about in report["datasets"] for line in set_lines(about)]
    lines.append(
        f"{report['rows']:,} rows read from {report['file']}: {report['unusable']:,} unusable, "
        f"{report['duplicates']:,} duplicates, {report['train_val_overlap']:,} in both train and val, "
        f"{report['without_thinking']:,} replies without thinking"
    )
    if report["test_rows"]:
        lines.append(f"{report['test_rows']:,} rows kept for a test, in data/test.jsonl")
    if report["rewrites"]:
        number = f"{report['rewrites']:,} other wordings of {report['rewritten_rows']:,} questions"
        lines.append(f"{number}, one wording in each epoch")
    if report["excluded"]:
        lines.append(f"{report['excluded']:,} rows left out, because --exclude or --exam holds their question")
    lines += [
        f"  {problem['location']} {problem['problem']}: {problem['action']}" for problem in report["problems"][:5]
    ]
    if len(report["problems"]) > 5:
        where = ", which a run lists in data_report.json" if dry_run else " in data_report.json"
        lines.append(f"  ... and {len(report['problems']) - 5:,} more{where}")
    return "\n".join(lines)


ROLES = {"think": "thinking"}


def set_lines(about: dict) -> list[str]:
    """What each column of a set became, and what of it is not used."""
    became = [
        f"`{column}` → {ROLES.get(role, role)} ({count:,} rows)"
        for column, roles in about["columns"].items()
        for role, count in roles.items()
    ]
    unused = [f"`{column}` ({count:,} rows)" for column, count in about["not_used"].items()]
    lines = [f"{about['label']}: {about['rows']:,} rows; {', '.join(became)}"]
    if unused:
        lines.append(f"{about['label']}: not used: {', '.join(unused)}")
    return lines + about["notes"]


def thinking_warning(report: dict) -> str | None:
    """If no reply thinks, or only some do."""
    without, replies = report["without_thinking"], report["replies"]
    if not without:
        return None
    if without == replies:
        return "no reply in this data thinks, so the model learns to answer without thinking"
    return (
        f"{without:,} of {replies:,} replies have no thinking; they train the answer after an empty thinking block, so "
        "the model learns both"
    )


def show_example(example: Example, tokenizer, color: bool) -> str:
    """The example's text, prompt, think and answer targets apart."""
    ids = example.input_ids.tolist()
    parts = {
        "prompt": (ids[: example.prompt_length], "not trained"),
        "think": (ids[example.prompt_length : example.answer_start], "target"),
        "answer": (ids[example.answer_start :], "target"),
    }
    lines = [f"example {example.location}"]
    for name, (part, note) in parts.items():
        text = tokenizer.decode(part)
        lines.append(f"--- {name}: {len(part)} tokens, {note}")
        lines.append(f"{COLORS[name]}{text}\033[0m" if color else text)
    return "\n".join(lines)
