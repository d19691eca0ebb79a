"""Talk to an exported model: python -m tools.chat RUN_DIR/best [--web | --question "..." [--json]]"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from data.base.console import prepare_terminal, visible
from data.base.errors import UserError
from data.reading.feedback import generated_by
from model.export import system_prompt_of
from model.generate import ReplyError, ReplyStream, load_for_generation, sampling_keywords
from model.qwen3 import find_model
from tools.shared.runs import name_of, run_of

FORM = Path(__file__).with_name("page") / "form.yaml"
TEXTS = yaml.safe_load((Path(__file__).with_name("page") / "texts.yaml").read_text(encoding="utf-8"))


def main() -> None:
    prepare_terminal()
    args = parse(sys.argv[1:])
    try:
        run(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        raise SystemExit(f"tools.chat: {error}") from None
    except BrokenPipeError:  # the reader of the answer has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def run(args: argparse.Namespace) -> None:
    disable_progress_bar()
    try:
        causal_lm, tokenizer = load_for_generation(args.model, device())
        system = system_prompt_of(find_model(args.model)) if args.system is None else args.system
    except UserError as error:
        inner = Path(args.model) / "best"
        raise UserError(f"{error}" + (f"; did you mean {inner}?" if inner.is_dir() else "")) from None
    settings = {"max_new_tokens": args.max_new_tokens, **sampling(args)}
    language = args.language or run_of(args.model).get("language", "zh")
    if args.web:
        from tools.page.start import open_page

        open_page(args, causal_lm, tokenizer, system, settings, TEXTS[language], language)
    elif args.question is not None:
        answer_one(causal_lm, tokenizer, system, not args.nothink, settings, args, TEXTS[language])
    else:
        chat(causal_lm, tokenizer, system, not args.nothink, settings, TEXTS[language])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.chat", description="Talk to an exported model.",
                                     epilog=TEXTS["en"]["commands"],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "model",
        help="RUN_DIR/best, any Hugging Face folder of a chat model, or a hub id",
    )
    parser.add_argument("--question", help="answer this and exit; on a pipe the answer alone")
    parser.add_argument("--json", action="store_true", help="with --question: one JSON object")
    parser.add_argument(
        "--language", choices=("zh", "en"), help="of the page and the terminal; default: that of the run"
    )
    parser.add_argument("--system", help="system prompt; default: the one that the model was trained with")
    parser.add_argument("--nothink", action="store_true", help="answer without thinking")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="longest reply, thinking included")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: generation_config.json")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    add_page_options(parser.add_argument_group("the page"))
    args = parser.parse_args(arguments)
    check_page(args, parser)
    if args.json and args.question is None:
        parser.error("--json needs --question")
    if args.question is not None and not args.question.strip():
        parser.error("--question is empty")
    if (
        args.max_new_tokens < 1
        or (args.temperature or 0) < 0
        or not 0 < (args.top_p or 1) <= 1
        or (args.top_k or 0) < 0
    ):
        parser.error("--max-new-tokens is at least 1, --temperature and --top-k at least 0, --top-p in (0, 1]")
    return args


def add_page_options(parser) -> None:
    parser.add_argument("--web", action="store_true", help='a page on 127.0.0.1; needs pip install -e ".[web]"')
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--feedback",
        type=Path,
        metavar="FILE",
        help="with --web: keep what is said of the replies in this file, to train on it",
    )
    parser.add_argument("--keep-all", action="store_true", help="with --feedback: keep replies without a verdict, too")
    parser.add_argument("--rater", default="", metavar="NAME", help="who gives feedback; can be changed on the page")
    parser.add_argument("--form", nargs="?", const=FORM, type=Path, metavar="FILE.yaml",
                        help="with --feedback: a form beside the thumbs; default: " + FORM.name)  # fmt: skip
    parser.add_argument("--versus", metavar="MODEL", help="with --feedback: vote on the replies of two models, blind")
    parser.add_argument("--blind", action="store_true", help="with --versus: no names after a vote, either")
    parser.add_argument("--questions", metavar="FILE", help="with --versus: a list to work through; .txt or a dataset")
    parser.add_argument("--group-by", default="", metavar="COLUMN", help="of --questions: count votes by it, too")
    parser.add_argument("--host", default="127.0.0.1", help="with --web: 0.0.0.0 lets other machines in")
    parser.add_argument("--password-file", type=Path, metavar="FILE", help="lines NAME:PASSWORD, asked for by the page")


def check_page(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.feedback and not args.web:
        parser.error("--feedback needs --web")
    if args.feedback and (args.feedback.suffix != ".jsonl" or not args.feedback.absolute().parent.is_dir()):
        parser.error(f"--feedback {args.feedback} must name a .jsonl file in a folder that exists")
    for name, needed in (("form", "feedback"), ("keep_all", "feedback"), ("versus", "feedback"), ("blind", "versus"),
                         ("questions", "versus"), ("group_by", "questions"), ("password_file", "web")):  # fmt: skip
        if getattr(args, name) and not getattr(args, needed):
            parser.error(f"--{name.replace('_', '-')} needs --{needed}")
    if args.versus and (args.form or args.keep_all):
        parser.error("--versus has votes; --form and --keep-all are for the page of one model")
    if args.host not in ("127.0.0.1", "localhost") and not (args.web and args.password_file):
        parser.error(f"--host {args.host} lets other machines in, so it needs --web and --password-file")
    if not 0 < args.port < 65536:
        parser.error("--port is a number from 1 to 65535")


def sampling(args: argparse.Namespace) -> dict:
    return sampling_keywords(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)


def device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def answer_one(causal_lm, tokenizer, system: str, thinking: bool, settings: dict, args, text: dict) -> None:
    """Exit status 1 where the reply has no answer."""
    try:
        stream = ReplyStream(causal_lm, tokenizer, [*opening(system), user(args.question)], thinking, **settings)
        if args.json or not sys.stdout.isatty():
            for _ in stream:
                pass
        else:
            show(Console(), stream, text)
    except ReplyError as error:
        raise SystemExit(f"tools.chat: {error}") from None
    reply = stream.reply
    if args.json:
        line = {
            "question": args.question,
            **reply._asdict(),
            "tokens": len(stream.ids),
            "seconds": round(stream.seconds, 3),
            "AIGC": generated_by(name_of(args.model)),
        }
        print(json.dumps(line, ensure_ascii=False))
    elif not sys.stdout.isatty():
        print(reply.answer)
    if not reply.answer:
        raise SystemExit(f"tools.chat: {shortcoming(stream, text) or text['no_reply']}")


def chat(causal_lm, tokenizer, system: str, thinking: bool, settings: dict, text: dict) -> None:
    """Reads questions until /exit or the end of the input. A reply without an answer is forgotten, as its question."""
    console = Console(highlight=False)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401  (line editing and history in input)

        console.print(f"{text['no_advice']}{text['help']}", style="dim")
    messages = opening(system)
    while True:
        try:
            line = (input("\n> ") if sys.stdin.isatty() else next(sys.stdin)).strip()
        except (EOFError, StopIteration, KeyboardInterrupt):
            console.print()
            return
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command == "/clear":
            messages = opening(system)
        elif command == "/system":
            system = rest.strip()
            messages = opening(system)
        elif command == "/nothink":
            thinking = not thinking
            console.print(text["thinking_on"] if thinking else text["thinking_off"], style="dim")
        elif line.startswith("/"):
            console.print(text["commands"], style="dim", markup=False)
        elif line:
            try:
                stream = ReplyStream(causal_lm, tokenizer, [*messages, user(line)], thinking, **settings)
                show(console, stream, text)
            except ReplyError as error:
                message = f"{text[error.kind]} ({error}); {text['new_dialogue']}"
                console.print(message, style="red", markup=False)
                continue
            except KeyboardInterrupt:
                console.print(f"\n{text['ended']}", style="dim")
                continue
            if answer := stream.reply.answer:
                # The template leaves earlier thinking out, so the answer is all that is kept.
                messages += [user(line), {"role": "assistant", "content": answer}]


def show(console: Console, stream: ReplyStream, text: dict) -> None:
    """Thinking dim, a rule, the answer, and a line of figures; as it comes."""
    part = None
    for now, piece in stream:
        if now != part and part is not None:
            console.print()
            console.rule(style="dim")
        part = now
        style = "dim" if part == "think" else None
        console.print(visible(piece), end="", style=style, markup=False, emoji=False, soft_wrap=True)
    tokens = len(stream.ids)
    figures = text["figures"].format(tokens, stream.seconds, tokens / max(stream.seconds, 1e-9))
    console.print(f"\n\n{figures}", style="dim")
    if problem := shortcoming(stream, text):
        console.print(problem, style="yellow")


def shortcoming(stream: ReplyStream, text: dict) -> str | None:
    reply = stream.reply
    if not reply.stopped:
        return text["cut_answer"] if reply.answer else text["cut_thinking"]
    return None if reply.answer else text["no_answer"] if reply.think else text["no_reply"]


def opening(system: str) -> list[dict]:
    return [{"role": "system", "content": system}] if system else []


def user(text: str) -> dict:
    return {"role": "user", "content": text}


if __name__ == "__main__":
    main()
