"""Fine-tunes Qwen3 on medical questions with reasoning: accelerate launch train.py [PRESET] [--flag value ...]

Parse the command line -> data, model, loop -> fit -> samples. Importing this file does nothing.
"""

import dataclasses
import math
import os
import sys
import uuid
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import yaml

from loop.config import TrainConfig, parse_config, refuse


def main(args: list[str] | None = None) -> None:
    config = parse_config(sys.argv[1:] if args is None else args)
    # Heavy imports wait until the command line is known to be right.
    from data.hub import HubError
    from data.source import DataError
    from loop.checkpoint import RunError
    from model.qwen3 import ModelError

    try:
        run(config)
    except (HubError, DataError, ModelError, RunError) as error:
        refuse(str(error))


def run(config: TrainConfig) -> None:
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, set_seed
    from transformers.utils.logging import disable_progress_bar

    from data.batches import rank_batches, step_batch, steps_per_epoch
    from data.medical import write_split
    from data.show import report_table, show_example
    from loop.checkpoint import RunError, TrainState, check_output_dir, complete_checkpoints, load_checkpoint
    from loop.early_stopping import EarlyStopping
    from loop.fit import fit
    from loop.optimizer import make_optimizer
    from loop.tracking import Tracker, choose_mode
    from model.loss import SFTModel
    from model.qwen3 import export, load_model, restore_export

    disable_progress_bar()  # of loading and saving weights: the only bar is the loop's
    output_dir = Path(config.output_dir)
    if not config.dry_run:
        check_output_dir(output_dir, config.resume)
        swanlab_mode = choose_mode(config)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[
                # Recomputation casts every weight anew, so autocast's cache of bf16 copies would only take memory.
                AutocastKwargs(cache_enabled=not config.gradient_checkpointing),
                # Ranks wait for the main process to download the model, and to write its last samples.
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            ],
        )
    except ValueError as error:  # a device without bf16, say
        raise RunError(f"{error} (--mixed-precision no computes in fp32)") from error

    # --- data: every rank reads the same rows, the main process writes them down ----------------
    with accelerator.local_main_process_first():  # a download happens once
        split, tokenizer, train, val = load_data(config)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    max_steps = config.max_steps
    if max_steps <= 0:
        max_steps = math.ceil(config.num_train_epochs * steps_per_epoch(len(train), rows_per_step))
    facts = {
        "max_steps": max_steps,
        "rows_per_step": rows_per_step,
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device),
        **{f"{name}_version": version(name) for name in ("torch", "transformers", "accelerate", "swanlab")},
    }
    if config.dry_run:
        accelerator.print(yaml.safe_dump(dataclasses.asdict(config), allow_unicode=True, sort_keys=False))
    accelerator.print(report_table(split.report))
    accelerator.print(
        f"{max_steps:,} optimizer steps of {rows_per_step} rows ({config.per_device_train_batch_size} rows x "
        f"{config.gradient_accumulation_steps} micro-batches x {accelerator.num_processes} processes) "
        f"on {accelerator.device}"
    )
    if config.dry_run:
        accelerator.print(show_example(train[0], tokenizer, color=use_color()))
        return
    if accelerator.is_main_process:
        write_split(split, output_dir / "data")

    # --- model, optimizer, state ----------------------------------------------------------------
    set_seed(config.seed)
    with accelerator.local_main_process_first():
        causal_lm = load_model(config.model, tokenizer, config.gradient_checkpointing)
    model = SFTModel(causal_lm)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(config.seed, device_specific=True)  # dropout differs from rank to rank

    state = TrainState(EarlyStopping(config.early_stopping_patience, config.early_stopping_min_delta), new_run_id())
    best = output_dir / "best"
    if config.resume and (found := complete_checkpoints(output_dir / "checkpoints")):
        state = load_checkpoint(found[0], accelerator, model, optimizer)
        state.early_stopping.patience = config.early_stopping_patience
        state.early_stopping.min_delta = config.early_stopping_min_delta
        accelerator.print(f"resumed from {found[0]}")
        if accelerator.is_main_process:
            restore_export(best)
    if state.step >= max_steps or state.early_stopping.should_stop:
        accelerator.print(f"this run is finished: step {state.step}, best step {state.early_stopping.best_step}")
        return

    def export_best() -> None:
        """All ranks."""
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            weights = {name.removeprefix("causal_lm."): weight for name, weight in weights.items()}
            export(causal_lm, weights, tokenizer, best)
        accelerator.wait_for_everyone()

    # --- train ----------------------------------------------------------------------------------
    tracker = Tracker(config, swanlab_mode, state.run_id, state.step, accelerator.is_main_process, facts)
    try:
        fit(
            config,
            accelerator,
            model,
            optimizer,
            state,
            tracker,
            step_batch=lambda step: step_batch(
                step,
                train,
                batch_size=config.per_device_train_batch_size,
                rows_per_step=rows_per_step,
                seed=config.seed,
                **ranks,
            ),
            eval_batches=rank_batches(val, range(len(val)), batch_size=config.per_device_eval_batch_size, **ranks),
            max_steps=max_steps,
            export_best=export_best,
        )
        model, optimizer = accelerator.free_memory(model, optimizer)
        if accelerator.is_main_process and best.exists():  # no best model where every evaluation was NaN
            answer_samples(config, split.val[:3], state, tracker, accelerator.device)
    except BaseException as error:
        tracker.finish(error=f"{type(error).__name__}: {error}")
        raise
    tracker.finish()
    accelerator.end_training()


def load_data(config: TrainConfig):
    """(Split, tokenizer, train Examples, val Examples), the Split's report completed with token counts."""
    from data.encode import encode_rows, token_report
    from data.medical import load_split
    from data.source import DataError
    from model.qwen3 import load_tokenizer

    split = load_split(config.dataset, config.system_prompt, config.val_fraction, config.seed)
    texts = (
        message["content"] + message.get("reasoning_content", "") for row in split.train for message in row.messages
    )
    tokenizer = load_tokenizer(config.model, texts, weights=not config.dry_run)
    sides = {}
    for name, rows in (("train", split.train), ("val", split.val)):
        sides[name], problems = encode_rows(rows, tokenizer, config.max_length, config.overlong)
        split.report[name] = token_report(sides[name], problems)
        split.report["problems"] += problems
        if not sides[name]:
            raise DataError(f"{config.dataset}: no {name} row fits into max_length {config.max_length} tokens")
    return split, tokenizer, sides["train"], sides["val"]


def answer_samples(config: TrainConfig, rows, state, tracker, device) -> None:
    """The best model answers validation questions: to the terminal, samples.jsonl and SwanLab."""
    from data.medical import write_jsonl
    from model.generate import load_for_generation, reply_to

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
    stopping = state.early_stopping
    why = "early stopping" if stopping.should_stop else "all steps done"
    print(
        f"\n{why} at step {state.step}; best eval loss {stopping.best_loss:.4f} at step {stopping.best_step}: "
        f"{output_dir / 'best'}"
    )


def new_run_id() -> str:
    return uuid.uuid4().hex[:12]


def use_color() -> bool:
    return "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)


if __name__ == "__main__":
    main()
