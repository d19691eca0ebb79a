"""The outer loop."""

import math
import random
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from loop.config import TrainConfig
from loop.evaluate import EvalMetrics, evaluate
from loop.interrupt import Interrupt
from loop.optimizer import lr_at
from loop.processes import to_device
from loop.saving import CheckpointWriter, SaveError
from loop.state import TrainState
from loop.step import train_step
from loop.tracking import Tracker, peak_memory_gib


def fit(
    config: TrainConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    tracker: Tracker,
    step_batch: Callable,  # step -> data.batches.StepBatch
    eval_batches: list[dict],
    max_steps: int,
    checkpoints: CheckpointWriter,
    export_best: Callable[[EvalMetrics], None],  # all ranks; raises SaveError
    answer_samples: Callable[[], dict[str, float]],  # all ranks; returns format rates
    interrupt: Interrupt,
) -> str:
    """Trains from state.step on, updating state in place, and returns how that ended. All ranks.

    completed, early_stopped, or interrupted with a checkpoint of the last step. Raises Diverged where
    gradients stay non-finite and RunError where checkpoints cannot be written; older ones are then intact.
    """
    bar = tqdm(
        total=max_steps,
        initial=state.step,
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    seconds, num_tokens, num_steps = 0.0, 0, 0  # of the training since the last row of train metrics
    stop = False
    evaluation = accelerator, model, state, tracker, eval_batches, export_best, answer_samples, bar, max_steps
    if state.step == 0:
        keep_best(*evaluation)

    while state.step < max_steps and not state.early_stopping.should_stop and not stop:
        started = time.perf_counter()
        # Dropout is a function of (seed, step, rank), so there is no state of generators to save.
        set_seed(random.Random(f"{config.seed}/{state.step}/{accelerator.process_index}").getrandbits(32))
        batch = step_batch(state.step)
        micro_batches = to_device(batch.micro_batches, accelerator.device)
        lr = lr_at(
            state.step,
            max_steps=max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_ratio=config.warmup_ratio,
        )
        metrics = train_step(model, optimizer, micro_batches, accelerator, lr, config.max_grad_norm or math.inf)
        state.record(metrics)
        seconds += time.perf_counter() - started
        num_tokens += batch.num_tokens
        num_steps += 1
        if not metrics.finite:
            rows = ", ".join(batch.rows)
            say(
                accelerator,
                f"step {state.step} skipped, nothing updated: gradient norm {metrics.grad_norm}; its rows: {rows}",
            )
            state.check_divergence(max_steps)

        def due(interval: int) -> bool:
            return state.step % interval == 0 or state.step == max_steps

        if due(config.logging_steps):
            row = {
                **state.take_losses(),
                "train/learning_rate": lr,
                "train/grad_norm": metrics.grad_norm,
                "train/epoch": batch.epoch,
                "train/tokens_seen": state.tokens_seen,
                "train/nonfinite_steps": state.nonfinite_steps,
                "perf/tokens_per_s": num_tokens / seconds,
                "perf/step_time_s": seconds / num_steps,
                "memory/peak_gib": peak_memory_gib(accelerator.device),
            }
            tracker.log(row, state.step)
            bar.set_postfix(loss=f"{row['train/loss']:.4f}", lr=lr, tokens_per_s=row["perf/tokens_per_s"])
            if accelerator.is_main_process and bar.disable:  # no terminal: a log file reads lines, not a bar
                print(f"step {state.step}/{max_steps}  {bar.postfix}", flush=True)
            seconds, num_tokens, num_steps = 0.0, 0, 0
        bar.update()
        if due(config.eval_steps):
            keep_best(*evaluation)
        stop = interrupt.requested(accelerator)
        is_last = state.step == max_steps or state.early_stopping.should_stop or stop
        if due(config.save_steps) or is_last:
            checkpoints.save(model, optimizer, state)
    checkpoints.wait(is_last=True)
    bar.close()
    if state.early_stopping.should_stop:
        return "early_stopped"
    return "completed" if state.step >= max_steps else "interrupted"


def keep_best(accelerator, model, state, tracker, eval_batches, export_best, answer_samples, bar, max_steps) -> None:
    """Evaluates, exports the model where its loss is the lowest so far, and has it answer. All ranks."""
    metrics = evaluate(model, eval_batches, accelerator)
    try:
        if state.early_stopping.is_better(metrics.loss):
            export_best(metrics)
        is_best = state.early_stopping.update(metrics.loss, state.step)
    except SaveError as error:  # best_loss always is that of the model in best/
        is_best = False
        say(accelerator, f"warning: the best model of step {state.step} could not be written: {error}")
    row = {f"eval/{name}": value for name, value in metrics._asdict().items()}
    best_loss = math.nan if state.early_stopping.best_loss is None else state.early_stopping.best_loss
    row |= {"eval/perplexity": metrics.perplexity, "eval/best_loss": best_loss}
    if accelerator.is_main_process:  # before the answers, which may take a while
        verdict = "best" if is_best else f"best was {best_loss:.4f} at step {state.early_stopping.best_step}"
        bar.write(
            f"step {state.step}/{max_steps}  eval loss {metrics.loss:.4f} "
            f"(think {metrics.think_loss:.4f}, answer {metrics.answer_loss:.4f})  {verdict}"
        )
    tracker.log(row | answer_samples(), state.step)


def say(accelerator: Accelerator, message: str) -> None:
    if accelerator.is_main_process:
        tqdm.write(message, file=sys.stderr)
