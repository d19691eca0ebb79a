"""The outer loop."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from tqdm import tqdm

from loop.checkpoint import SaveError, TrainState, save_checkpoint
from loop.config import TrainConfig
from loop.evaluate import evaluate, mean
from loop.interrupt import Interrupt
from loop.optimizer import lr_at
from loop.run_folder import Diverged, RunError
from loop.step import train_step
from loop.tracking import Tracker

MAX_NONFINITE_IN_A_ROW = 3


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
    export_best: Callable[[], None],  # all ranks
) -> None:
    """Trains from state.step until max_steps or early stopping; state is updated in place. All ranks.

    Raises RunError where the gradient norm stays non-finite; the last checkpoint is then intact.
    """
    bar = tqdm(
        total=max_steps,
        initial=state.step,
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    seconds, num_tokens, num_steps = 0.0, 0, 0  # of the training since the last row of train metrics
    if state.step == 0:
        keep_best(accelerator, model, state, tracker, eval_batches, export_best, bar, max_steps)

    while state.step < max_steps and not state.early_stopping.should_stop:
        started = time.perf_counter()
        batch = step_batch(state.step)
        micro_batches = send_to_device(batch.micro_batches, accelerator.device)
        lr = lr_at(
            state.step,
            max_steps=max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_ratio=config.warmup_ratio,
        )
        metrics = train_step(model, optimizer, micro_batches, accelerator, lr, config.max_grad_norm or math.inf)
        state.step += 1
        seconds += time.perf_counter() - started
        num_tokens += batch.num_tokens
        num_steps += 1
        if metrics.finite:
            state.nonfinite_in_a_row = 0
            state.record(metrics)
        else:
            skip_nonfinite(accelerator, state, batch.rows, metrics.grad_norm)

        def due(interval: int) -> bool:
            return state.step % interval == 0 or state.step == max_steps

        if due(config.logging_steps):
            think, answer = state.loss_sums
            num_think, num_answer = state.num_targets
            row = {
                "train/loss": mean(think + answer, num_think + num_answer),
                "train/think_loss": mean(think, num_think),
                "train/answer_loss": mean(answer, num_answer),
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
            state.loss_sums, state.num_targets = [0.0, 0.0], [0, 0]
            seconds, num_tokens, num_steps = 0.0, 0, 0
        bar.update()
        if due(config.eval_steps):
            keep_best(accelerator, model, state, tracker, eval_batches, export_best, bar, max_steps)
        if due(config.save_steps) or state.early_stopping.should_stop:
            root = Path(config.output_dir) / "checkpoints"
            save_checkpoint(root, accelerator, model, optimizer, state, config.save_total_limit)
    bar.close()


def keep_best(accelerator, model, state, tracker, eval_batches, export_best, bar, max_steps) -> None:
    """Evaluates, and exports the model where the loss is the lowest so far. All ranks."""
    metrics = evaluate(model, eval_batches, accelerator)
    is_best = state.early_stopping.update(metrics.loss, state.step)
    if is_best:
        export_best()
    row = {f"eval/{name}": value for name, value in metrics._asdict().items()}
    best_loss = math.nan if state.early_stopping.best_loss is None else state.early_stopping.best_loss
    tracker.log({**row, "eval/perplexity": metrics.perplexity, "eval/best_loss": best_loss}, state.step)
    if accelerator.is_main_process:
        verdict = "best" if is_best else f"best was {best_loss:.4f} at step {state.early_stopping.best_step}"
        bar.write(
            f"step {state.step}/{max_steps}  eval loss {metrics.loss:.4f} "
            f"(think {metrics.think_loss:.4f}, answer {metrics.answer_loss:.4f})  {verdict}"
        )


def skip_nonfinite(accelerator: Accelerator, state: TrainState, rows: list[str], grad_norm: float) -> None:
    """Counts a step that updated nothing, names its rows, and gives up after too many in a row."""
    state.nonfinite_steps += 1
    state.nonfinite_in_a_row += 1
    if accelerator.is_main_process:
        message = f"step {state.step} skipped, nothing updated: gradient norm {grad_norm}; its rows: {', '.join(rows)}"
        tqdm.write(message, file=sys.stderr)
    if state.nonfinite_in_a_row > MAX_NONFINITE_IN_A_ROW:
        raise RunError(
            f"diverged: the gradient norm was not finite in {state.nonfinite_in_a_row} steps in a row, up to step "
            f"{state.step}. Weights and checkpoints are intact. Try a lower --learning-rate, or look at the rows "
            "named above"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held at one time: by PyTorch on an accelerator, by the process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device.index) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
