"""What python -m tools.chat --web opens: the page of one model, or the comparison of two; and the files it is given."""

import argparse
import hashlib
import os
from pathlib import Path

import yaml

from data.base.errors import UserError, one_line
from loop.record.checkpoint import fingerprints
from model.export import system_prompt_of
from model.generate import load_for_generation
from model.qwen3 import find_model
from tools.page import versus, web
from tools.page.replies import Page
from tools.shared.runs import name_of, read_rows


def open_page(
    args: argparse.Namespace, causal_lm, tokenizer, system: str, settings: dict, text: dict, language: str
) -> None:
    """text: of texts.yaml, in this language."""
    gradio, names = web.import_gradio(), [name_of(args.model)]
    page = Page(
        model=names[0],
        text=text,
        system=system,
        thinking=not args.nothink,
        settings=settings,
        port=args.port,
        feedback=args.feedback,
        sha256=sha256_of(find_model(args.model)) if args.feedback else "",
        form=read_form(args.form, language) if args.form else {},
        rater=args.rater,
        keep_all=args.keep_all,
        host=args.host,
        passwords=read_passwords(args.password_file) if args.password_file else (),
        names_hidden=args.blind,
    )
    if args.versus is None:
        web.serve(gradio, web.build(gradio, causal_lm, tokenizer, page), page)
        return
    other, other_tokenizer = load_for_generation(args.versus, causal_lm.device)
    folder = find_model(args.versus)
    names.append(name_of(args.versus))
    names = names if names[0] != names[1] else [args.model, args.versus]
    models = [
        versus.Model(names[0], page.sha256, causal_lm, tokenizer, system),
        versus.Model(names[1], sha256_of(folder), other, other_tokenizer,
                     system_prompt_of(folder) if args.system is None else args.system),
    ]  # fmt: skip
    questions = read_questions(args.questions, args.group_by) if args.questions else []
    web.serve(gradio, versus.build(gradio, versus.Versus(page, models, questions)), page)


def read_form(path: Path, language: str) -> dict[str, str]:
    """Item -> what is asked. Raises UserError if the file has no such lines."""
    try:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --form {path}: {one_line(error)}") from None
    form = form.get(language, form) if isinstance(form, dict) else form
    if not isinstance(form, dict) or not form or not all(isinstance(text, str) and text for text in form.values()):
        raise UserError(
            f"--form {path} has lines of the form `item: what is asked of a reply`; see tools/page/form.yaml"
        )
    return {str(item): text for item, text in form.items()}


def read_passwords(path: Path) -> tuple[tuple[str, str], ...]:
    """Lines NAME:PASSWORD, of a file that nobody else can read. Raises UserError."""
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise UserError(f"--password-file {path} can be read by others: chmod 600 {path}")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --password-file {path}: {one_line(error)}") from None
    pairs = tuple(tuple(part.strip() for part in line.split(":", 1)) for line in lines)
    if not pairs or not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise UserError(f"--password-file {path} has lines of the form NAME:PASSWORD")
    return pairs


def read_questions(path: str, group_by: str) -> list[versus.Question]:
    """Of a dataset of any form, or a text with a question a line. Raises UserError."""
    if path.endswith(".txt"):
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --questions {path}: {one_line(error)}") from None
        rows = [({}, line.strip()) for line in lines if line.strip()]
    else:
        rows = [(row.columns, row.asked[-1]) for row in read_rows(path, "", questions=True)]
    if group_by and not any(group_by in columns for columns, _ in rows):
        raise UserError(f"--group-by {group_by}: --questions {path} has no such column")
    questions = [versus.Question(text, str(columns.get(group_by) or "")) for columns, text in rows]
    if not questions:
        raise UserError(f"--questions {path} has no question")
    return list({question.text: question for question in questions}.values())


def sha256_of(folder: Path) -> str:
    """Of a model's weights, as sha256sum prints it; of several files that of the lines which it prints."""
    files = sorted(folder.glob("*.safetensors"))
    sums = {name: sha256 for name, (_, sha256) in fingerprints(folder, files).items()}
    if len(sums) == 1:
        return next(iter(sums.values()))
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()).encode()).hexdigest()
