"""Is B better than A? Each candidate is trained with each seed, and the pairs are compared:

    python -m tools.race tiny --seeds 42 43 44 --against recipes/ema.py \\
        --against "recipes/sam.py --step-set RHO=0.02" --out races/sam

What is no option below goes to train.py, for all of them; the first candidate is that alone. --against adds one: a step
file, flags of train.py, or both, with a name in front if it needs one ("low=--learning-rate 1e-5"). The same command
goes on with a race that was cut off: finished runs are kept, others resumed. Written to --out: the runs, runs.md with
what may be concluded, runs.png, runs.json, and a line for each candidate in runs.tsv.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import psutil
from transformers.utils.logging import disable_progress_bar

from data.base.console import say, tool, warn
from data.base.errors import UserError
from data.base.files import write_json
from data.base.language import speak, tr
from data.encode import encode_rows
from loop.record.ledger import add_lines, settings_of
from loop.record.run_folder import FINISHED, is_held, read_run, read_status
from loop.score import loss_of, score
from loop.start.command_line import parse_config
from loop.start.step_file import sha256_of, step_path
from model.qwen3 import load_tokenizer
from tools.report import TEMPLATES, write_candidates
from tools.reports.candidates import Candidate, candidate_of, compare, difference, lowest, method_of
from tools.reports.record import read_record
from tools.shared.runs import accelerator_of, load_to_score, read_side

ROOT = Path(__file__).resolve().parent.parent
OWN = ("--seed", "--output-dir", "--run-name", "--resume", "--dry-run")  # flags that a race sets itself
OVER = (*FINISHED, "diverged")


class Entry(NamedTuple):
    """A candidate as it was asked for."""

    name: str
    flags: list[str]
    seeds: list[int]  # of its runs; the first is paired with the race's first, and so on


class Run(NamedTuple):
    folder: Path
    start: list[str]  # the command before the flags
    flags: list[str]
    threads: int  # for each run of several at a time; 0: as it finds them

    @property
    def is_over(self) -> bool:
        return read_status(self.folder).get("status") in OVER

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


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
    if args.jobs < 1 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--jobs is at least 1, and each seed is named once")
    return args, flags


def read_entry(text: str, seeds: list[int]) -> Entry:
    """A candidate of --against. Raises UserError if it says what the race says."""
    named = re.match(r"(\w[\w-]*)=(?=\S)", text)
    words = shlex.split(text[named.end() :] if named else text)
    flags = ["--step-file", *words] if words and words[0].endswith(".py") else words
    if "--seeds" in flags:  # its own, to see what seeds alone do
        start = flags.index("--seeds")
        end = next((n for n in range(start + 1, len(flags)) if flags[n].startswith("--")), len(flags))
        flags, seeds = flags[:start] + flags[end:], [*map(int, flags[start + 1 : end])]
    short = "-".join(Path(word).stem if word.endswith(".py") else word.lstrip("-") for word in words)
    return Entry(named[1] if named else re.sub(r"[^\w.=+-]+", "-", short).strip("-"), flags, seeds)


def plan(args: argparse.Namespace, flags: list[str]) -> dict[str, dict[int, Run]]:
    """name -> seed of the race -> run. Raises UserError, or exits as train.py does, if a command line is wrong."""
    preset = flags[0] if flags and not flags[0].startswith("-") else "medical"
    entries = [Entry(preset, [], args.seeds), *(read_entry(text, args.seeds) for text in args.against)]
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"two candidates have one name ({', '.join(names)}); put another in front: NAME=...")
    threads = max(1, psutil.cpu_count() // args.jobs) if args.jobs > 1 else 0
    start, runs = [*(shlex.split(args.launch) or [sys.executable]), str(ROOT / "train.py")], {}
    for entry in entries:
        if taken := [flag for flag in (*flags, *entry.flags) if flag.split("=")[0].replace("_", "-") in OWN]:
            raise UserError(f"{taken[0]} is what the race sets itself")
        if len(entry.seeds) != len(args.seeds):
            raise UserError(f"{entry.name} has {len(entry.seeds)} seeds of its own; it needs {len(args.seeds)}")
        for pair, seed in zip(args.seeds, entry.seeds, strict=True):
            folder = args.out / f"{entry.name}-{seed}"
            own = [*flags, *entry.flags, "--seed", str(seed), "--output-dir", str(folder), "--run-name", folder.name]
            own += ["--split-seed", str(seed)] if args.split_by_seed else []
            parse_config(own)
            runs.setdefault(entry.name, {})[pair] = Run(folder, start, own, threads)
    return runs


class Runner:
    """Starts runs, and ends those that are under way if one fails or the race is stopped."""

    def __init__(self):
        self.under_way: set[Popen] = set()
        self.stopping = threading.Event()

    def start(self, command: list[str], run: Run) -> tuple[int, str]:
        """(exit status, last line) of a command, whose output goes to the run's log."""
        env = os.environ | ({"OMP_NUM_THREADS": str(run.threads)} if run.threads else {})
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("a", encoding="utf-8") as log:
            # In a session of its own: Ctrl+C in the terminal reaches it once, through `stop`.
            process = Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
            self.under_way.add(process)
            if self.stopping.is_set():
                process.terminate()
            code = process.wait()
            self.under_way.discard(process)
        lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return code, next((line for line in reversed(lines) if line.startswith("train.py: ")), (lines or [""])[-1])

    def check(self, run: Run) -> None:
        """Raises UserError if train.py refuses the run: better now than after hours."""
        code, said = self.start([sys.executable, str(ROOT / "train.py"), *run.flags, "--dry-run"], run)
        if code and not self.stopping.is_set():
            raise UserError(f"{run.folder.name} cannot be trained: {said} (see {run.log})")

    def train(self, run: Run) -> None:
        while is_held(run.folder) and not self.stopping.wait(1):  # by what was started before the race was killed
            pass
        if self.stopping.is_set() or run.is_over:
            return
        code, said = self.start([*run.start, *run.flags, "--resume"], run)
        if self.stopping.is_set():
            return
        if not run.is_over:
            raise UserError(f"{run.folder.name} ended with status {code}: {said} (see {run.log})")
        status = read_status(run.folder)
        loss = status.get("best_loss")
        say(tr("{}: {}, best loss {}", run.folder.name, tr(status["status"]), "-" if loss is None else f"{loss:.4f}"))

    def stop(self) -> None:
        self.stopping.set()
        for process in list(self.under_way):
            process.terminate()  # train.py then writes a checkpoint

    def all(self, runs: dict[str, dict[int, Run]], jobs: int) -> None:
        """All runs, one seed after another, so that a part of a race has all candidates."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        begun = [one for by_seed in runs.values() if not (one := next(iter(by_seed.values()))).folder.exists()]
        seeds = next(iter(runs.values()))
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for _ in pool.map(self.check, begun):
                    pass
                for _ in pool.map(self.train, (runs[name][seed] for seed in seeds for name in runs)):
                    pass
            except BaseException as error:
                self.stop()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    warn(tr("stopped; the same command goes on"))
                raise


def read_candidates(runs: dict[str, dict[int, Run]]) -> list[Candidate]:
    """Raises UserError if the runs of one candidate are not of one method."""
    found = []
    for name, by_seed in runs.items():
        records = {seed: read_record(run.folder) for seed, run in by_seed.items()}
        if len({method_of(record, with_rows=False) for record in records.values()}) > 1:
            raise UserError(f"the runs of {name} have different code or settings; name another --out")
        found.append(candidate_of(name, records))
    return found


def check_unchanged(args: argparse.Namespace, runs: dict[str, dict[int, Run]]) -> None:
    """Writes down what the race trains. Raises UserError if a run of an earlier launch was another: what is finished
    would be shown under the new command."""
    asked, known = args.out / "race.json", {}
    for run in (run for by_seed in runs.values() for run in by_seed.values()):
        file = step_path(parse_config(run.flags).step_file)
        known[run.folder.name] = {"flags": run.flags, "step_file": sha256_of(file) if file.is_file() else ""}
    before = json.loads(asked.read_text(encoding="utf-8")) if asked.exists() else {}
    for name in known.keys() & before.keys():
        if before[name] != known[name] and (args.out / name / "run.json").exists():
            what = "another step file" if before[name]["flags"] == known[name]["flags"] else "other flags"
            raise UserError(f"{args.out / name} was trained with {what}; name another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(asked, before | known)


def measure_test(out: Path, candidates: list[Candidate]) -> dict | None:
    """The test losses of the first candidate and of the best other one, measured once; without test rows None."""
    path, (first, *others) = out / "test.json", candidates
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    ranked = [one.candidate for one in lowest(compare(candidates)) if one.candidate in others]
    if not ranked or not any((record.folder / "data" / "test.jsonl").exists() for record in first.runs.values()):
        return None
    losses = {one.name: {seed: test_loss(record.folder) for seed, record in one.runs.items()}
              for one in (first, ranked[0])}  # fmt: skip
    seeds = [seed for seed in first.runs if seed in ranked[0].runs]
    apart = difference(*([losses[one.name][seed] for seed in seeds] for one in (ranked[0], first)))
    test = {"date": time.strftime("%Y-%m-%d"), "difference": apart._asdict()}
    test["candidates"] = {name: {"losses": [*by_seed.values()]} for name, by_seed in losses.items()}
    write_json(path, test)
    return test


def test_loss(run_dir: Path) -> float:
    """Of RUN_DIR/best on RUN_DIR/data/test.jsonl, as the run evaluates."""
    disable_progress_bar()
    run, best = read_run(run_dir), str(run_dir / "best")
    tokenizer, accelerator = load_tokenizer(best), accelerator_of(run)
    rows, _ = encode_rows(read_side(run_dir, "test"), tokenizer, run["max_length"], run["overlong"])
    return loss_of(score(load_to_score(best, run, tokenizer, accelerator), rows, accelerator))


def write_results(args: argparse.Namespace, runs: dict[str, dict[int, Run]]) -> None:
    candidates = read_candidates(runs)
    run = next(iter(candidates[0].runs.values())).run
    speak(language := run.get("language", "zh"))
    path = write_candidates(candidates, language, args.out, measure_test(args.out, candidates))
    said, lines = TEMPLATES.get_template(f"verdict.{language}.md").module, []
    for one in compare(candidates):
        file = next(iter(one.candidate.runs.values())).run["step_files"][-1]
        is_first, losses = one.candidate is candidates[0], [*one.losses.values()]
        verdict = tr("the others are compared with it") if is_first else said.verdict(one).strip()
        config = parse_config(next(iter(runs[one.candidate.name].values())).flags)
        line = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "n": len(losses), "verdict": verdict}
        line |= {"step_file": f"{file['file']} {file['sha256'][:12]}", "settings": settings_of(config, with_seed=False)}
        line |= {"mean": statistics.fmean(losses), "sd": statistics.stdev(losses) if len(losses) > 1 else math.nan}
        lines.append(line)
        print(f"{one.candidate.name}: {verdict}")
    add_lines(args.out, *lines, once=True)
    print(path)


@tool("race")
def main() -> None:
    args, flags = read_arguments()
    runs = plan(args, flags)
    check_unchanged(args, runs)
    Runner().all(runs, args.jobs)
    write_results(args, runs)


if __name__ == "__main__":
    main()
