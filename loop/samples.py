"""What the best model answers."""

from pathlib import Path

import torch

from data.medical import Row, write_jsonl
from loop.config import TrainConfig
from loop.state import TrainState
from loop.tracking import Tracker
from model.generate import load_for_generation, reply_to


def answer_samples(
    config: TrainConfig, rows: list[Row], state: TrainState, tracker: Tracker, device: torch.device
) -> None:
    """The best model answers validation questions: to the terminal, samples.jsonl and SwanLab."""
    output_dir = Path(config.output_dir)
    model, tokenizer = load_for_generation(output_dir / "best", device)
    replies = reply_to(model, tokenizer, [row.messages[:-1] for row in rows], max_new_tokens=config.max_length)
    samples = []
    for row, reply in zip(rows, replies, strict=True):
        question = row.messages[-2]["content"]
        samples.append({"step": state.early_stopping.best_step, "question": question, **reply._asdict()})
        thinking = reply.think if len(reply.think) <= 200 else reply.think[:200] + " ..."  # whole in samples.jsonl
        print(f"\n[question] {question}\n[think] {thinking}\n[answer] {reply.answer}")
    write_jsonl(output_dir / "samples.jsonl", samples)
    texts = [(s["question"], f"Q: {s['question']}\n\nThink: {s['think']}\n\nA: {s['answer']}") for s in samples]
    tracker.log_text("samples/replies", texts, state.step)
