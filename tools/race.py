"""Is B better than A? Each candidate is trained with each seed, and the pairs are compared:

    python -m tools.race tiny --seeds 42 43 44 --against recipes/ema.py \\
        --against "recipes/sam.py --step-set RHO=0.02" --out races/sam

What is no option below goes to train.py, for all of them; the first candidate is that alone. --against adds one: a step
file, flags of train.py, or both, with a name in front if it needs one ("low=--learning-rate 1e-5"). The same command
goes on with a race that was cut off: finished runs are kept, others resumed. Written to --out: the runs, runs.md with
what may be concluded, runs.png, runs.json, and a line for each candidate in runs.tsv.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import psutil

from data.base.console import say, tool, warn
from data.base.errors import UserError
from data.base.language import speak, tr
from loop.config import TrainConfig
from loop.record.ledger import add_lines, settings_of, step_file_of
from loop.record.run_folder import FINISHED, is_held, read_run, read_status
from loop.start.command_line import parse_config
from loop.start.step_file import sha256_of, step_path
from tools.reports.candidates import NAMES, ROWS, Candidate, method_of
from tools.reports.final_test import measure_test
from tools.reports.record import read_record
from tools.reports.side_by_side import write_candidates

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
MAY_CHANGE = NAMES | {"step_file", "max_time", "swanlab_mode", "swanlab_project"}  # between launches of a race
OWN = ("--seed", "--output-dir", "--run-name", "--resume", "--dry-run")  # flags that a race sets itself


class Job(NamedTuple):
    """One run of train.py."""

    folder: Path
    start: list[str]  # the command before the flags
    flags: list[str]

    @property
    def config(self) -> TrainConfig:
        return parse_config(self.flags)

    @property
    def is_over(self) -> bool:
        return read_status(self.folder).get("status") in (*FINISHED, "diverged")


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The race's own options, and the flags of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.usage = "python -m tools.race [PRESET] [--flag of train.py ...] --out DIR [options]"
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="default: 42 43 44")
    parser.add_argument("--against", action="append", default=[], metavar="'FILE.py --flag ...'", help="a candidate")
    parser.add_argument("--out", type=Path, required=True, help="folder of the race")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on a CPU")
    parser.add_argument("--launch", default="", metavar="'accelerate launch ...'", help="what starts each run")
    parser.add_argument("--split-by-seed", action="store_true", help="each seed draws its own held-out rows, too")
    words = iter(sys.argv[1:])  # a candidate may be a single flag, which argparse would take for its own
    joined = [f"{word}={next(words, '')}" if word == "--against" else word for word in words]
    args, flags = parser.parse_known_args(joined)
    if args.jobs < 1 or args.out.is_file() or len(set(args.seeds)) < len(args.seeds) or "" in args.against:
        parser.error("--jobs is at least 1, --out is a folder, each seed is named once, and no --against is empty")
    return args, flags


def read_candidate(text: str, seeds: list[int]) -> tuple[str, list[str], list[int]]:
    """(name, flags, seeds) of a candidate of --against; seeds: the race's, or as many of its own. Raises UserError."""
    named = re.match(r"(\w[\w.-]*)=(?=\S)", text)
    words = split(text[named.end() :] if named else text)
    flags = ["--step-file", *words] if words[0].endswith(".py") else words
    if "--seeds" in flags:  # its own, to see what seeds alone do
        start = flags.index("--seeds")
        end = next((n for n in range(start + 1, len(flags)) if flags[n].startswith("--")), len(flags))
        own = [int(word) for word in flags[start + 1 : end] if word.isdecimal()]
        if len(set(own)) != len(seeds) or len(own) != end - start - 1:
            raise UserError(
                f"--against {text!r}: as many seeds as the race has are needed, {len(seeds)} different ones"
            )
        flags, seeds = flags[:start] + flags[end:], own
    short = "-".join(Path(word).stem if word.endswith(".py") else word.lstrip("-") for word in words)
    return named[1] if named else re.sub(r"[^\w.=+-]+", "-", short).strip("-")[:60], flags, seeds


def split(text: str) -> list[str]:
    try:
        return shlex.split(text) or [text]
    except ValueError as error:
        raise UserError(f"{text!r} is no command line: {error}") from None


def plan(args: argparse.Namespace, flags: list[str]) -> dict[str, dict[int, Job]]:
    """candidate -> seed of the race -> its run. Raises UserError, or exits as train.py does if a flag is wrong."""
    preset = flags[0] if flags and not flags[0].startswith("-") else "medical"
    candidates = [(preset, [], args.seeds), *(read_candidate(text, args.seeds) for text in args.against)]
    start, runs = [*(split(args.launch) if args.launch else [sys.executable]), str(TRAIN)], {}
    for name, more, seeds in candidates:
        if name.casefold() in map(str.casefold, runs):  # one folder on some systems
            raise UserError(f"two candidates have the name {name}; put another in front: NAME=...")
        if taken := [flag for flag in (*flags, *more) if flag.split("=")[0].replace("_", "-") in OWN]:
            raise UserError(f"{taken[0]} is what the race sets itself")
        runs[name] = {}
        for pair, seed in zip(args.seeds, seeds, strict=True):
            folder = args.out / f"{name}-{seed}"
            own = [*flags, *more, "--seed", str(seed), "--output-dir", str(folder), "--run-name", folder.name]
            run = Job(folder, start, own + (["--split-seed", str(seed)] if args.split_by_seed else []))
            if run.config.dry_run:
                raise UserError("dry_run trains nothing, so there is nothing to compare")
            runs[name][pair] = run
    return runs


class Runner:
    """Starts runs, and ends those that are under way if one fails or the race is stopped."""

    def __init__(self, jobs: int):
        self.jobs, self.under_way, self.stopping = jobs, set(), threading.Event()
        self.threads = {"OMP_NUM_THREADS": str(max(1, psutil.cpu_count() // jobs))} if jobs > 1 else {}

    def start(self, command: list[str], run: Job) -> tuple[int, str]:
        """(exit status, what it said last) of a command, whose output goes to the run's log."""
        path = run.folder.with_name(f"{run.folder.name}.log")
        with path.open("a", encoding="utf-8") as log:
            # In a session of its own: Ctrl+C in the terminal reaches it once, through `stop`.
            process = Popen(command, stdout=log, stderr=log, env=os.environ | self.threads, start_new_session=True)
            self.under_way.add(process)
            if self.stopping.is_set():
                process.terminate()
            code = process.wait()
            self.under_way.discard(process)
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if line.startswith("train.py: ")), (lines or [""])[-1])
        return code, f"{said} (see {path})"

    def check(self, run: Job) -> None:
        """Raises UserError if train.py refuses the run: better now than after hours."""
        code, said = self.start([sys.executable, str(TRAIN), *run.flags, "--dry-run"], run)
        if code and not self.stopping.is_set():
            raise UserError(f"{run.folder.name} cannot be trained: {said}")

    def train(self, run: Job) -> None:
        if is_held(run.folder):  # by what was started before the race was killed, or by another race
            say(tr("{} is being trained by another process: waiting for it", run.folder.name))
        while not run.is_over and not self.stopping.is_set():
            if is_held(run.folder):
                self.stopping.wait(0.2)
                continue
            code, said = self.start([*run.start, *run.flags, "--resume"], run)
            if run.is_over:
                status = read_status(run.folder)
                loss = f"{status['best_loss']:.4f}" if status.get("best_loss") is not None else "-"
                say(tr("{}: {}, best loss {}", run.folder.name, tr(status["status"]), loss))
            elif not self.stopping.is_set() and not is_held(run.folder):
                raise UserError(f"{run.folder.name} ended with status {code}: {said}")

    def stop(self) -> None:
        self.stopping.set()
        for process in list(self.under_way):
            process.terminate()  # train.py then writes a checkpoint

    def all(self, runs: dict[str, dict[int, Job]]) -> None:
        """All runs, one seed after another, so that a part of a race has all candidates."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        rounds = list(zip(*(by_seed.values() for by_seed in runs.values()), strict=True))
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(self.check, (run for run in rounds[0] if not run.folder.exists())))
                list(pool.map(self.train, (run for one in rounds for run in one)))
            except BaseException as error:
                self.stop()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    warn(tr("stopped; the same command goes on"))
                raise


def read_results(runs: dict[str, dict[int, Job]], but: set[str]) -> list[Candidate]:
    """Raises UserError if the runs of one candidate are not of one method. but: in what they may differ."""
    found = [Candidate(name, {seed: read_record(run.folder) for seed, run in by_seed.items()})
             for name, by_seed in runs.items()]  # fmt: skip
    for one in found:
        if len({method_of(record, but) for record in one.runs.values()}) > 1:
            raise UserError(f"the runs of {one.name} have different code, settings or rows; name another --out")
    return found


def check_unchanged(runs: dict[str, dict[int, Job]]) -> None:
    """Raises UserError if a run is there already and was another: it would be shown under the new command."""
    for run in (run for by_seed in runs.values() for run in by_seed.values()):
        if not (run.folder / "run.json").exists():
            continue
        was, now = read_run(run.folder), json.loads(json.dumps(dataclasses.asdict(run.config)))
        # What `auto` became is in the record; what is not asked for is as it was.
        asked = {name: value for name, value in now.items() if name not in MAY_CHANGE and value not in ("auto", -1)}
        changed = [name for name, value in asked.items() if was.get(name, value) != value]
        file, recorded = step_path(run.config.step_file), was["step_files"][-1]
        imports = recorded.get("imports", {}).items()  # of the project, or beside the step file
        code = {folder / name: sha for folder in (TRAIN.parent, file.parent) for name, sha in imports}
        code |= {file: recorded["sha256"]}
        changed += ["step file"] * any(path.is_file() and sha256_of(path) != sha for path, sha in code.items())
        if changed:
            raise UserError(f"{run.folder} was trained with another {', '.join(changed)}; name another --out")


def write_results(args: argparse.Namespace, runs: dict[str, dict[int, Job]]) -> None:
    candidates = read_results(runs, ROWS | {"max_steps"} if args.split_by_seed else set())
    path, figures = write_candidates(candidates, None, args.out, measure_test(args.out, candidates))
    lines = []
    for one, found in zip(candidates, figures, strict=True):
        losses, verdict = [*found["losses"].values()], found["verdict"] or tr("the others are compared with it")
        config = next(iter(runs[one.name].values())).config
        lines.append({
            "command": shlex.join(["python", *sys.orig_argv[1:]]), "step_file": step_file_of(one.first.run),
            "settings": settings_of(config, with_seed=False), "n": len(losses),
            "mean": statistics.fmean(losses) if losses else math.nan,
            "sd": statistics.stdev(losses) if len(losses) > 1 else math.nan, "verdict": verdict,
        })  # fmt: skip
        print(f"{one.name}: {verdict}")
    add_lines(args.out, *lines, once=True)
    print(path)


@tool("race")
def main() -> None:
    args, flags = read_arguments()
    runs = plan(args, flags)
    speak(next(iter(next(iter(runs.values())).values())).config.language)
    check_unchanged(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    Runner(args.jobs).all(runs)
    write_results(args, runs)


if __name__ == "__main__":
    main()
