"""What the model writes: some validation questions, answered at each evaluation and by the best model at the end."""

import functools
import json
import time
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator

from data.base.console import is_main_process, say, warn
from data.base.language import tr
from data.dataset import Data
from data.encode import render_prompt
from data.reading.rows import Row
from loop.config import TrainConfig
from loop.record.interrupt import Interrupt
from loop.record.tracking import Tracker, keep_rows
from loop.state import TrainState
from model.generate import Reply, format_rates, load_for_generation, ready_to_generate, reply_to

NUM_OF_BEST = 32  # questions that the best model answers


class Samples:
    """samples.jsonl: a line for each question and evaluation. The main process writes."""

    def __init__(self, config: TrainConfig, data: Data, tracker: Tracker, state: TrainState):
        """Validation rows that were left out as too long are not asked. Keeps the lines up to the state."""
        fitting = {example.location for example in data.val}
        self.rows = [row for row in data.split.val if row.location in fitting]
        self.num_samples = config.num_samples
        self.max_new_tokens = config.sample_max_new_tokens
        self.tokenizer, self.tracker = data.tokenizer, tracker
        self.path = Path(config.output_dir) / "samples.jsonl"
        if is_main_process():
            keep_rows(self.path, state.step, lambda row: row["model"] == "training" and row["step"] <= state.last_eval)

    def answer(
        self, model: torch.nn.Module, accelerator: Accelerator, step: int, interrupt: Interrupt, seconds: float
    ) -> dict:
        """The model in training answers the first questions; returns its format rates, on the main process. All ranks.

        After so many seconds all answers end where they are, and have no rates. Raises Stopped, with nothing written,
        if the run is asked to stop meanwhile.

        Under FSDP2 each rank computes the same answers, because every forward needs all of them; under DDP the main
        process alone does, because ranks that end a token apart would wait for each other.
        """
        if not self.num_samples:
            return {}
        rows, sft_model = self.rows[: self.num_samples], accelerator.unwrap_model(model)
        generate = functools.partial(sft_model.generate, synced_gpus=accelerator.is_fsdp2)
        # FSDP2 gathers its shards in bf16 by itself.
        in_bf16 = accelerator.mixed_precision == "bf16" and not accelerator.is_fsdp2
        end, is_cut = time.monotonic() + seconds, []

        def should_stop() -> bool:
            is_late = time.monotonic() > end
            asked = interrupt.requested(is_late) if accelerator.is_fsdp2 else interrupt.requested_here() or is_late
            is_cut.append(asked)
            return asked

        replies = []
        if is_main_process() or accelerator.is_fsdp2:
            with ready_to_generate(sft_model.causal_lm, in_bf16), accelerator.autocast():
                asked = prompts(rows, self.tokenizer), self.max_new_tokens
                replies = reply_to(sft_model.causal_lm, self.tokenizer, *asked, generate, should_stop)
        interrupt.check()
        cut = {"cut_at": len(is_cut)} if any(is_cut) else {}  # tokens
        if is_main_process():
            self.write([line(step, "training", row, reply) | cut for row, reply in zip(rows, replies, strict=True)])
        return {} if cut or not replies else {f"format/{name}": rate for name, rate in format_rates(replies).items()}

    def answer_with_best(
        self, best: Path, device: torch.device, best_step: int, step: int, interrupt: Interrupt
    ) -> None:
        """The best model answers up to 32 questions; the first few are printed. One rank alone.

        Raises Stopped, with nothing written, if this rank is asked to stop meanwhile.
        """
        if not self.num_samples:
            return
        causal_lm, tokenizer = load_for_generation(best, device)
        rows = self.rows[:NUM_OF_BEST]
        more = {"max_new_tokens": self.max_new_tokens, "should_stop": interrupt.requested_here}
        replies = reply_to(causal_lm, tokenizer, prompts(rows, tokenizer), **more)
        interrupt.check_here()
        lines = [line(best_step, "best", row, reply) for row, reply in zip(rows, replies, strict=True)]
        self.write(lines)
        rates = format_rates(replies)
        self.tracker.log({f"best_format/{name}": rate for name, rate in rates.items()}, step)
        for sample in lines[: self.num_samples]:
            thinking = sample["think"] if len(sample["think"]) <= 200 else sample["think"][:200] + " ..."
            names = (tr(name) for name in ("question", "think", "answer"))
            texts = (sample["question"], thinking, sample["answer"])
            say("\n[{}] {}\n[{}] {}\n[{}] {}".format(*chain(*zip(names, texts, strict=True))))
        listed = ", ".join(f"{tr(name)} {rate:.0%}" for name, rate in rates.items())
        say("\n" + tr("{} answers of the best model: {}", len(replies), listed))

    def write(self, lines: list[dict]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in lines)
        except OSError as error:
            warn(f"{self.path}: {error}")
        texts = [(s["question"], f"Q: {s['question']}\n\nThink: {s['think']}\n\nA: {s['answer']}") for s in lines]
        of_best = lines[0]["model"] == "best"
        self.tracker.log_text("samples/best" if of_best else "samples/training", texts, lines[0]["step"])


def prompts(rows: list[Row], tokenizer) -> list[str]:
    """As each row was trained: if its reply does not think, asking for an answer alone."""
    return [render_prompt(row.messages, tokenizer) for row in rows]


def line(step: int, model: str, row: Row, reply: Reply) -> dict:
    question, reference = row.messages[-2]["content"], row.messages[-1]["content"]
    return {"step": step, "model": model, "question": question, **reply._asdict(), "reference": reference}
