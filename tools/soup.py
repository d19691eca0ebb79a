"""Weights between a model before and after its fine-tuning: python -m tools.soup BASE TUNED --weights 0.3 0.5 0.7

WEIGHT of the tuned model and 1 - WEIGHT of the base, parameter by parameter (WiSE-FT, Wortsman et al. 2022,
arXiv:2109.01903): what fine-tuning changed is kept in part, and so is what the base knew. Each mixture answers for the
validation rows of the run that TUNED comes from, with --exam for an exam, with --forget for replies of BASE; the one
with the lowest loss is written as a folder like best/. No training; both models in memory, and a third.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from data.base.console import tool
from data.base.errors import UserError
from data.base.language import speak, tr
from data.contexts import exam_prompts, exam_rows
from data.encode import Example, encode_rows
from data.reading.exam import read_exam
from data.reading.rows import read_given
from data.replies import read_replies
from loop.evaluate import is_right, losses
from loop.score import loss_of, score
from model.export import export, system_prompt_of
from model.loss import SFTModel
from model.qwen3 import find_model, load_model, load_tokenizer
from model.tiny import TINY
from tools.reports.pages import TEMPLATES
from tools.shared.runs import accelerator_of, load_to_score, name_of, read_rows, run_of


class Mixture(NamedTuple):
    weight: float  # of the tuned model; 0 is the base
    losses: dict[str, float]
    exam: float  # share of right answers; NaN without an exam
    forgotten: float  # nats a token, of the base's own replies; NaN without them


@torch.no_grad()
def mix(model: SFTModel, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], weight: float) -> None:
    """Sets the parameters, rounded to bf16, as they will be exported."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(base[name].float(), tuned[name].float(), weight).bfloat16())


def check_same_kind(base: dict, tuned: dict, vocabularies: list[dict]) -> None:
    """Raises UserError if two models cannot be mixed."""
    for name in sorted(base.keys() | tuned.keys()):
        shapes = [list(model[name].shape) if name in model else "not there" for model in (base, tuned)]
        if shapes[0] != shapes[1]:
            name = name.removeprefix("causal_lm.")
            raise UserError(f"these models have different shapes: {name} is {shapes[0]} in the base and {shapes[1]}")
    if vocabularies[0] != vocabularies[1]:
        pairs = vocabularies[0].items() ^ vocabularies[1].items()
        raise UserError(f"these models have different tokenizers: {len({token for token, _ in pairs}):,} tokens differ")


def read_examples(args: argparse.Namespace, run: dict, system: str, tokenizer) -> list[Example]:
    rows = read_rows(args.dataset, system, read_given(run.get("columns", ())))
    examples, _ = encode_rows(rows, tokenizer, run.get("max_length", 2048), run.get("overlong", "truncate"))
    if not examples:
        raise UserError(f"{args.dataset} has no row that can be evaluated")
    return examples


def study(args: argparse.Namespace) -> list[Mixture]:
    """The base, the mixtures by weight, and the tuned model; writes the best mixture to args.out."""
    run = run_of(args.tuned)
    system, tokenizer = system_prompt_of(find_model(str(args.tuned))), load_tokenizer(str(args.tuned))
    accelerator = accelerator_of(run)
    examples = read_examples(args, run, system, tokenizer)
    questions = read_exam(args.exam).questions if args.exam else []
    asked = exam_rows(exam_prompts(questions, tokenizer, system), tokenizer)
    replies = read_replies(args.forget, tokenizer)
    base_tokenizer = tokenizer if args.base in TINY else load_tokenizer(args.base)
    base = parameters_of(args.base, run, base_tokenizer)
    tuned = parameters_of(str(args.tuned), run, tokenizer)
    check_same_kind(base, tuned, [base_tokenizer.get_vocab(), tokenizer.get_vocab()])
    model, found, before = load_to_score(str(args.tuned), run, tokenizer, accelerator), [], math.nan
    for weight in (0.0, *sorted(set(args.weights)), 1.0):
        mix(model, base, tuned, weight)
        table = score(model, examples, accelerator)
        right = is_right(questions, score(model, asked, accelerator))
        now = loss_of(score(model, replies, accelerator), "reply")
        before = now if weight == 0 else before
        exam = sum(right) / len(right) if right else math.nan
        found.append(Mixture(weight, losses(table), exam, now - before))
        print(tr("weight {:g}: loss {:.4f}", weight, loss_of(table)), flush=True)
    mix(model, base, tuned, best_of(found).weight)
    texts = texts_of(args, run.get("language", "en"), found)
    export(model.causal_lm, model.causal_lm.state_dict(), tokenizer, args.out, texts)
    return found


def parameters_of(name: str, run: dict, tokenizer) -> dict[str, torch.Tensor]:
    """On the host, in the model's own precision; of `tiny` those before the run trained it."""
    set_seed(run.get("seed", 0))
    dtype = torch.float32 if name in TINY else "auto"
    return dict(SFTModel(load_model(name, tokenizer, False, dtype), loss_chunk=1).named_parameters())


def texts_of(args: argparse.Namespace, language: str, found: list[Mixture]) -> dict[str, str]:
    """The tuned model's card, which keeps its system prompt, and its Modelfile; the card says what this folder is."""
    files = {name: find_model(str(args.tuned)) / name for name in ("README.md", "Modelfile")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    about = {"base": name_of(args.base), "tuned": name_of(str(args.tuned)), "best": best_of(found)}
    page = TEMPLATES.get_template(f"soup.{language}.md").render(
        about, found=found, examined=bool(args.exam), gauged=bool(args.forget)
    )
    return texts | {"README.md": texts.get("README.md", "") + page}


def best_of(found: list[Mixture]) -> Mixture:
    """The mixture of the lowest loss; neither model by itself. Raises UserError if no loss is finite."""
    finite = [mixture for mixture in found if 0 < mixture.weight < 1 and math.isfinite(mixture.losses["loss"])]
    if not finite:
        raise UserError("no mixture has a finite loss")
    return min(finite, key=lambda mixture: mixture.losses["loss"])


def show(found: list[Mixture], names: list[str]) -> None:
    best = best_of(found)
    table = Table()
    columns = ["weight of the tuned model", "loss", "thinking", "answer"]
    columns += ["exam"] * (not math.isnan(best.exam)) + ["forgotten"] * (not math.isnan(best.forgotten))
    for title in columns:
        table.add_column(tr(title), justify="right")
    for mixture in found:
        name = {0.0: f"0 ({names[0]})", 1.0: f"1 ({names[1]})"}.get(mixture.weight, f"{mixture.weight:g}")
        parts = (mixture.losses[name] for name in ("loss", "think_loss", "answer_loss"))
        more = {"exam": f"{mixture.exam:.1%}", "forgotten": f"{mixture.forgotten:.4f}"}
        cells = [name, *(f"{loss:.4f}" for loss in parts), *(more[column] for column in columns[4:])]
        table.add_row(*cells, style="bold" if mixture is best else None)
    Console(markup=False, emoji=False, highlight=False).print(table)
    if found[-1].losses["loss"] <= best.losses["loss"]:
        print(tr("the tuned model by itself has a lower loss than each mixture; written is the best of these"))


@tool("soup")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="the model before fine-tuning: a folder or a hub id")
    parser.add_argument("tuned", metavar="TUNED", type=Path, help="RUN_DIR/best")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.3, 0.5, 0.7], help="of the tuned model")
    parser.add_argument("--dataset", help="rows to evaluate on; default: RUN_DIR/data/val.jsonl")
    parser.add_argument("--exam", nargs="+", metavar="FILE", default=[], help="files or folders of questions")
    parser.add_argument("--forget", nargs="+", metavar="FILE", default=[], help="replies of BASE: see tools.replay")
    parser.add_argument("--out", type=Path, help="a new folder for the best mixture; default: RUN_DIR/soup")
    args = parser.parse_args()
    if not all(0 < weight < 1 for weight in args.weights):
        parser.error("--weights lie between 0 (the base) and 1 (the tuned model); both of these are shown anyway")
    run_dir = args.tuned.resolve().parent if run_of(str(args.tuned)) else None
    if not run_dir and not (args.dataset and args.out):
        parser.error(f"{args.tuned} is not the best/ of a run: name its rows with --dataset and a folder with --out")
    args.dataset = args.dataset or str(run_dir / "data" / "val.jsonl")
    args.out = args.out or args.tuned.parent / "soup"
    if args.out.exists():
        parser.error(f"{args.out} exists already; name another folder with --out")
    args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    speak(run_of(str(args.tuned)).get("language", "en"))
    found = study(args)
    show(found, [name_of(args.base), name_of(str(args.tuned))])
    print(tr("the mixture of weight {:g}: {}", best_of(found).weight, args.out))


if __name__ == "__main__":
    main()
