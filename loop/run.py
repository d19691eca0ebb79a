"""Run: the folder of one run, from its first launch to its last answers."""

import dataclasses
import math
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from data.base.console import is_main_process, say, warn
from data.base.errors import UserError
from data.base.files import write_json, write_lines
from data.base.language import tr
from data.dataset import Data
from data.encode import digest
from data.split import split_files
from data.template import generation_prompt
from loop.config import Resolved
from loop.distributed import gather, on_main_process
from loop.evaluate import WEIGHTED, Evaluation
from loop.record.checkpoint_writer import SaveError, together
from loop.record.interrupt import Interrupt, Stopped
from loop.record.ledger import add_run
from loop.record.progress import Progress
from loop.record.run_folder import (
    FINISHED,
    check_same_run,
    check_shared,
    find_start,
    has_output,
    is_over,
    launches_of,
    newer_best,
    read_run,
    read_status,
    utc,
    write_status,
)
from loop.record.tracking import Tracker, peak_memory_gib
from loop.samples import Samples
from loop.score import Scored
from loop.start.environment import return_freed_memory
from loop.start.launcher import launch_command, resume_command
from loop.start.memory import GIB, Plan
from loop.start.step_file import record
from loop.state import StepMetrics, TrainState, learning_rates
from model.export import card, export
from model.qwen3 import load_model


class Run:
    """State, status, metrics, best model and samples. Every rank calls it; the main process writes.

    As a context it records how the run ended, if an error ends it.
    """

    def __init__(
        self, config: Resolved, data: Data, plan: Plan, evaluation: Evaluation, about: dict, accelerator: Accelerator
    ):
        """about: num_parameters, and the class names of the optimizers. Raises UserError if the folder holds another
        run, or is not the same for all processes."""
        self.config, self.data, self.plan, self.accelerator = config, data, plan, accelerator
        self.step_file, self.evaluation = evaluation.method, evaluation
        self.folder, self.best = Path(config.output_dir), Path(config.output_dir) / "best"
        self.info = dataclasses.asdict(config) | {
            "rows_per_step": data.rows_per_step(config),
            "train_rows": f"{len(data.train):,} with sha256 {digest(data.train)}",
            "val_rows": f"{len(data.val):,} with sha256 {digest(data.val)}",
            "weights": f"torch.{config.weights}",
            "metric_for_best_model": getattr(self.step_file, "METRIC_FOR_BEST_MODEL", WEIGHTED),
            "measures": {one.name: [one.title, one.higher_is_better] for one in evaluation.own},
            **{f"{name}_version": version(name) for name in ("torch", "transformers", "accelerate", "swanlab")},
        }
        if data.replies:
            self.info["forget_rows"] = f"{len(data.replies):,} with sha256 {digest(data.replies)}"
        device = accelerator.device
        self.launch = about | {
            "world_size": accelerator.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }
        self.logged: list[tuple[str, torch.Tensor, int]] = []  # on this rank, not yet in the state
        self.checkpoint, self.state, self.newer, more = on_main_process(self.open)
        check_shared(self.folder)
        self.info |= more
        evaluation.first = {name: [Scored(*line) for line in lines] for name, lines in self.state.first.items()}

    def open(self) -> tuple[Path | None, TrainState, tuple[int, float] | None, dict]:
        """The checkpoint to go on from, its state, a best/ that is newer, and the step files and launches so far. Main
        process alone."""
        check_same_run(self.folder, self.info)
        before = read_run(self.folder) if has_output(self.folder) else {}
        checkpoint, state = find_start(self.config)
        files = record(self.folder, self.step_file, self.launch["optimizers"], before.get("step_files", []), state.step)
        launches = launches_of(self.folder, before.get("launches", []), launch_command(), state.step)
        launches[-1] |= {name: self.launch[name] for name in ("num_parameters", "num_trainable_parameters")}
        return checkpoint, state, newer_best(self.best, state), {"step_files": files, "launches": launches}

    @property
    def has_same_optimizers(self) -> bool:
        """Whether the checkpoint's optimizer state is that of the optimizers of now."""
        *_, before, now = [self.info["step_files"][0], *self.info["step_files"]]
        return now["from_step"] < self.state.step or before["optimizers"] == now["optimizers"]

    @property
    def is_over(self) -> bool:
        return is_over(self.state, self.config)

    @property
    def is_finished(self) -> bool:
        lost_checkpoints = self.checkpoint is None and self.state.step > 0
        return (self.is_over or lost_checkpoints) and read_status(self.folder).get("status") in FINISHED

    def due(self, interval: int) -> bool:
        return self.state.step % interval == 0 or self.state.step == self.config.max_steps

    def __enter__(self) -> "Run":
        if is_main_process():
            # As the run began; what a later launch may change stays out of it.
            begun = read_run(self.folder) if has_output(self.folder) else self.info
            self.begun = begun | {name: self.info[name] for name in ("step_files", "launches", "measures")}
            write_json(self.folder / "run.json", self.begun)
            (self.folder / "data").mkdir(exist_ok=True)
            for name, lines in split_files(self.data.split).items():
                write_lines(self.folder / "data" / name, lines)
        more = self.info | self.launch | {"step_file_sha256": self.info["step_files"][-1]["sha256"]}
        self.tracker = Tracker(self.config, self.state, more)
        self.samples = Samples(self.config, self.data, self.tracker, self.state)
        self.report("running")
        self.progress = Progress(self.config.max_steps, self.state.step)
        return self

    def __exit__(self, kind, error, _) -> None:
        self.progress.bar.close()
        if is_main_process():
            self.begun["launches"][-1]["ended"] = utc(time.time())
            with suppress(OSError):  # a full disk must not hide how the run ended
                write_json(self.folder / "run.json", self.begun)
        if error is not None:
            self.report(getattr(error, "status", "failed"), error=f"{kind.__name__}: {error}")
            self.tracker.finish("crashed", f"{kind.__name__}: {error}")

    def report(self, status: str, **more) -> None:
        if is_main_process():
            write_status(
                self.folder, status, step=self.state.step, max_steps=self.config.max_steps, **self.launch, **more
            )
            if status in (*FINISHED, "diverged"):
                best = {"best_step": self.state.best_step, "best_loss": self.state.best_loss}
                ended = {"status": status, "step": self.state.step, **best, **more}
                add_run(self.folder, self.config, self.info, ended)

    def evaluated(self, row: dict[str, float], table: list[Scored], model, interrupt: Interrupt) -> None:
        """Has the model answer, exports it if its loss is the lowest so far, and records the evaluation. row: its
        figures; table: the losses of the validation rows.

        Raises Stopped if the run is asked to stop while the model answers: everything is then as it was. Raises
        UserError if no export can be made.
        """
        if self.info["metric_for_best_model"] not in row:
            raise UserError(
                f"METRIC_FOR_BEST_MODEL of {self.config.step_file} is {self.info['metric_for_best_model']!r}, which no "
                f"evaluation gives; there are {', '.join(row)}"
            )
        loss = row[self.info["metric_for_best_model"]]
        self.state.first = {name: [list(line) for line in lines] for name, lines in self.evaluation.first.items()}
        state, is_best = self.state, self.state.is_better(loss)
        seconds = self.progress.take_trained() * self.config.sample_budget or math.inf
        rates = self.samples.answer(model, self.accelerator, state.step, interrupt, seconds)
        try:
            if is_best and self.newer and self.newer[1] < loss:
                step, kept = self.newer
                say(f"best/ stays that of step {step} of the launch before: its {kept:.4f} is lower than {loss:.4f}")
            elif is_best:
                self.export(row, loss, model)
                self.newer = None
            state.evaluated(loss, self.config.early_stopping_min_delta, is_best)
        except SaveError as error:  # best_loss is always that of the model in best/
            if not error.is_io:
                raise UserError(f"the model cannot be exported, so nothing is trained: {error}") from error
            state.last_eval, is_best = state.step, False
            warn(f"the best model of step {state.step} could not be written: {error}")
        best_loss = math.nan if state.best_loss is None else state.best_loss
        verdict = tr("best") if is_best else tr("best was {:.4f} at step {}", best_loss, state.best_step)
        losses = (row[f"eval/{name}"] for name in ("loss", "think_loss", "answer_loss"))
        place = state.step, self.config.max_steps
        say(tr("step {}/{}  eval loss {:.4f} (think {:.4f}, answer {:.4f})  {}", *place, *losses, verdict))
        self.tracker.log(row | {"eval/best_loss": best_loss} | rates, state.step)
        self.tracker.log_rows(table, self.evaluation.right, state.step)
        self.progress.resume()

    def export(self, row: dict[str, float], loss: float, model) -> None:
        """All ranks; raises SaveError, with the older export intact."""
        causal_lm, tokenizer = self.accelerator.unwrap_model(model).causal_lm, self.data.tokenizer
        weights = self.accelerator.get_state_dict(model)
        weights = {name.removeprefix("causal_lm."): weight for name, weight in weights.items()}
        figures = {"num_train": self.data.train.num_units, "num_val": len(self.data.val), "step": self.state.step}
        figures = {name.removeprefix("eval/"): value for name, value in row.items()} | figures | {"deciding_loss": loss}
        settings = figures | self.info, self.config.language, causal_lm.generation_config
        texts = card(*settings, generation_prompt([{"role": "user", "content": ""}], tokenizer))

        def write() -> None:
            base = None
            if self.config.frozen == "nf4":
                set_seed(self.config.seed)  # of which the weights of a tiny model are made
                place = causal_lm.config.name_or_path or self.config.model  # where it was loaded from
                base = load_model(place, tokenizer, False, getattr(torch, self.config.weights))
            export(causal_lm, weights, tokenizer, self.best, texts, base)

        together(write, on_main=True)

    def stepped(self, metrics: StepMetrics, batch, optimizers: list) -> None:
        """Records one step. Raises Diverged if gradients stay non-finite."""
        state, max_steps = self.state, self.config.max_steps
        state.stepped(metrics)
        self.logged += batch.logged if metrics.finite else []
        rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        if not all(map(math.isfinite, rates)):  # of a step that sets its own
            raise UserError(
                f"{self.config.step_file} set a learning rate that is not finite in step {state.step}: {rates}"
            )
        if self.progress.stepped(batch.num_tokens) > 1 and self.accelerator.device.type == "cpu":
            return_freed_memory()
        if not metrics.finite:
            rows = ", ".join(batch.rows)
            norm = f"gradient norm {metrics.grad_norm}"
            say(f"step {state.step} skipped, nothing updated: {norm}; its rows: {rows}", file=sys.stderr)
            state.check_divergence(max_steps)
        if self.due(self.config.logging_steps):
            self.collect_logged()
            row = {
                **state.take_losses(),
                **state.take_logged(),
                **learning_rates(optimizers),
                "train/grad_norm": metrics.grad_norm,
                "train/epoch": batch.epoch,
                "train/tokens_seen": state.tokens_seen,
                "train/nonfinite_steps": state.nonfinite_steps,
                **self.progress.take_speed(),
                "memory/peak_gib": peak_memory_gib(self.accelerator.device),
            }
            self.tracker.log(row, state.step)
            self.progress.show(state.step, row)
        self.progress.resume()

    def collect_logged(self) -> None:
        """Moves what the steps logged on all ranks to the state. All ranks."""
        for part in gather([(name, float(value), number) for name, value, number in self.logged]):
            for name, value, number in part:
                self.state.logged.setdefault(name, []).append([value, number])
        self.logged.clear()

    def summary(self, best_step: int, best_loss: float | None) -> str:
        if best_loss is None:
            return tr("step {}, no evaluation with a finite loss", self.state.step)
        step = self.state.step
        return tr("step {}; best eval loss {:.4f} at step {}: {}", step, best_loss, best_step, self.best)

    def finish(self, interrupt: Interrupt) -> bool:
        """The best model answers, the record is closed. Returns whether the training is over. All ranks."""
        self.progress.bar.close()
        state, best, is_done = self.state, self.best, self.is_over
        best_step, best_loss = self.newer or (state.best_step, state.best_loss)
        device = self.accelerator.device
        # PyTorch counts its tensors; of a process on a CPU the system counts everything.
        of, predicted = ("", self.plan.total) if device.type == "cpu" else (tr(" of tensors"), self.plan.tensors)
        say(tr("peak memory{} {:.1f} GiB; predicted {:.1f}", of, peak_memory_gib(device), predicted / GIB))
        if is_done and is_main_process() and best.exists():  # there is none if every evaluation was NaN
            try:
                self.samples.answer_with_best(best, device, best_step, state.step, interrupt)
            except Stopped:
                is_done = False
        status = "completed" if is_done else "interrupted"
        if is_done and state.is_out_of_patience(self.config.early_stopping_patience):
            status = "early_stopped"
        if is_done:
            say(tr("{}: {}", tr(status).replace("_", " "), self.summary(best_step, best_loss)))
        else:
            interrupt.done()
            how = tr("interrupted, with a checkpoint" if state.step else "interrupted, before the first step")
            say(tr("{}: {}. Go on: {}", how, self.summary(best_step, best_loss), resume_command()))
        self.report(status, best_step=best_step, best_loss=best_loss)
        self.tracker.finish("success" if is_done else "aborted")
        return is_done
