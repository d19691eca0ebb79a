"""Metrics: metrics.jsonl is the record, swanlab.log the view.

SwanLab never stops a run: if it cannot start, fails, or cannot finish, the reason is said once
and every point is still in metrics.jsonl.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from data.base.console import is_main_process, say, warn
from data.base.errors import UserError
from data.base.files import write_text
from loop.config import TrainConfig
from loop.score import Scored, total
from loop.state import TrainState

FINISH_SECONDS = 60  # an online finish waits for the network without end
FAILURES_IN_A_ROW = 20


def choose_mode(config: TrainConfig) -> str:
    """The SwanLab mode to start in. Raises UserError if what was asked for is not possible."""
    if config.swanlab_mode == "disabled":
        return "disabled"
    if not re.fullmatch(r"[0-9a-zA-Z_\-+.]{1,100}", config.swanlab_project):  # SwanLab's own rule
        raise UserError(
            f"--swanlab-project {config.swanlab_project!r}: SwanLab takes up to 100 letters (a-z), digits and _ - + ."
        )
    if config.swanlab_mode == "offline":
        return "offline"
    if config.swanlab_mode == "local":
        from importlib.util import find_spec

        if find_spec("swanboard") is None:
            raise UserError("--swanlab-mode local needs the dashboard: pip install 'swanlab[dashboard]'")
        return "local"
    try:
        drop_project_variable()
        import swanlab

        settings = swanlab.Settings()
        has_key = bool(settings.api_key)
        chosen = settings.mode if "mode" in settings.model_fields_set else None
    except Exception as error:
        warn(f"SwanLab is unusable ({error}); metrics go to metrics.jsonl only")
        return "disabled"
    if config.swanlab_mode == "online" and not has_key:
        raise UserError("--swanlab-mode online needs an account: run `swanlab login`, or choose --swanlab-mode offline")
    if config.swanlab_mode == "auto":
        mode = chosen or ("online" if has_key else "offline")
        return mode if has_key or mode not in ("online", "cloud") else "offline"
    return "online"


def drop_project_variable() -> None:
    """SWANLAB_PROJECT=name, which transformers documents, makes every swanlab.init of 0.10 raise."""
    if not os.environ.get("SWANLAB_PROJECT", "{").lstrip().startswith("{"):
        warn(f"SWANLAB_PROJECT={os.environ.pop('SWANLAB_PROJECT')} is not used; the project is --swanlab-project")


class Tracker:
    """Writes metrics on the main process; on every other one each call does nothing."""

    def __init__(self, config: TrainConfig, state: TrainState, more: dict):
        """Opens metrics.jsonl, keeping the rows up to the state, and starts SwanLab.

        config: with the mode that `choose_mode` chose. more: versions, device, counts and the like.
        """
        self.run, self.file, self.failures, self.mode = None, None, 0, "disabled"
        if not is_main_process():
            return
        self.directory = Path(config.output_dir) / "swanlog"
        self.run_id = state.run_id
        path = Path(config.output_dir) / "metrics.jsonl"
        keep_rows(path, state.step, lambda row: "eval/loss" not in row or row["step"] <= state.last_eval)
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.rows = path.with_name("eval_rows.jsonl")
        keep_rows(self.rows, state.step, lambda row: row["step"] <= state.last_eval)
        if config.swanlab_mode != "disabled":
            self.start_swanlab(config, more)

    def start_swanlab(self, config: TrainConfig, more: dict) -> None:
        interrupt = signal.getsignal(signal.SIGINT)
        for attempt in dict.fromkeys([config.swanlab_mode, "offline"]):
            try:
                drop_project_variable()
                import swanlab

                self.run = swanlab.init(
                    mode=attempt,
                    project=config.swanlab_project,
                    name=config.run_name,
                    id=self.run_id,
                    resume="allow",
                    config={**dataclasses.asdict(config), **more},
                    log_dir=str(self.directory),
                    # Never ask a question, and leave git alone: a remote's URL may hold a token.
                    settings=swanlab.Settings(
                        interactive=False, probe=swanlab.Settings().probe.model_copy(update={"git": False})
                    ),
                )
                self.mode = attempt
                break
            except Exception as error:
                warn(f"SwanLab cannot start in mode {attempt} ({type(error).__name__}: {error})")
        # SwanLab's own handler would end its run before the loop has logged what it still holds.
        signal.signal(signal.SIGINT, interrupt)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One line of metrics.jsonl, then SwanLab. Values that are not finite are written as strings."""
        if self.file is None:
            return
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        try:
            line = {"step": step} | {name: as_json(value) for name, value in values.items()}
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            warn(f"metrics.jsonl: {error}")
        # One NaN breaks a chart in the local dashboard for good.
        self.view({name: value for name, value in values.items() if math.isfinite(value) or self.mode != "local"}, step)

    def log_rows(self, table: list[Scored], right: list[bool], step: int) -> None:
        """Adds to eval_rows.jsonl, for each row of the table, the sum of its loss and its number of targets, think and
        answer; and a 1 for each question of an exam that was answered right."""
        if self.file is None:
            return
        rows: dict[str, dict[str, list[Scored]]] = {}
        for line in table:
            if line.part in ("think", "answer"):
                rows.setdefault(line.row, {}).setdefault(line.part, []).append(line)
        try:
            with self.rows.open("a", encoding="utf-8", errors="backslashreplace") as file:
                for row, parts in rows.items():
                    sums = {part: [as_json(total([line.loss_sum for line in lines])), sum(line.count for line in lines)]
                            for part, lines in parts.items()}  # fmt: skip
                    file.write(json.dumps({"step": step, "row": row, **sums}, ensure_ascii=False) + "\n")
                if right:
                    file.write(json.dumps({"step": step, "exam": "".join(str(int(one)) for one in right)}) + "\n")
        except OSError as error:
            warn(f"{self.rows.name}: {error}")

    def log_text(self, name: str, texts: list[tuple[str, str]], step: int) -> None:
        """texts: (caption, text)"""
        if self.run is not None:
            import swanlab

            self.view({name: [swanlab.Text(text, caption=caption) for caption, text in texts]}, step)

    def view(self, metrics: dict, step: int) -> None:
        if self.run is None:
            return
        try:
            import swanlab

            swanlab.log(metrics, step=step)
            self.failures = 0
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                warn(f"swanlab.log failed ({type(error).__name__}: {error}); metrics.jsonl goes on")
            if self.failures == FAILURES_IN_A_ROW:
                warn("SwanLab is left out from here on")
                self.run = None

    def finish(self, state: str = "success", error: str | None = None) -> None:
        """Closes the record and ends the SwanLab run (success, aborted, crashed) in a bounded time."""
        if self.file is None:
            return
        try:
            self.file.close()
        except OSError as failure:
            warn(f"metrics.jsonl: {failure}")
        self.file = None
        if self.run is None:
            return
        run, self.run = self.run, None
        outcome = {"state": state, "error": error} if error else {"state": state}

        def end():
            try:
                run.finish(**outcome)
            except ValueError:
                pass  # off the main thread SwanLab cannot put its signal handler back, after all is written
            except Exception as failure:
                warn(f"SwanLab did not end cleanly ({failure})")

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(FINISH_SECONDS)
        if ending.is_alive():
            warn("SwanLab could not upload everything in time")
        folders = sorted(self.directory.glob("run-*"))  # one for each launch
        if ending.is_alive() or (self.mode == "offline" and len(folders) > 1):
            commands = [f"swanlab sync --id {self.run_id} {shlex.quote(str(folder))}" for folder in folders]
            say(f"SwanLab: upload all of this run with  {' && '.join(commands)}")


def as_json(value: float) -> float | str:
    """JSON has no number that is not finite."""
    return value if math.isfinite(value) else str(value)


def keep_rows(path: Path, step: int, keep: Callable[[dict], bool] = lambda row: True) -> None:
    """Leaves in a file of JSON lines what the run up to `step` wrote: later rows are about to be made again.

    A run that begins (step 0) makes all of them.
    """
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")  # text of a model may hold other ends of lines
        rows = [line for line in lines if step > 0 and is_kept(line, step, keep)]
        write_text(path, "".join(row + "\n" for row in rows))


def is_kept(line: str, step: int, keep: Callable[[dict], bool]) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # a line that a kill cut off
        return False
    return row["step"] <= step and keep(row)


def peak_memory_gib(device) -> float:
    """Most memory held at one time: by PyTorch on an accelerator, by the process on a CPU."""
    if device.type == "mps":  # which counts no peak
        return torch.mps.driver_allocated_memory() / 2**30
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device.index) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
