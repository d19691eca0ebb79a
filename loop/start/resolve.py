"""Every "auto" of the settings, replaced once by what acts; and what --dry-run shows."""

import dataclasses
import math
import os
import shutil
import sys
from pathlib import Path
from shutil import which

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import is_bf16_available, parse_flag_from_env

from data.base.console import is_main_process, say, visible, warn
from data.base.errors import UserError
from data.base.language import tr
from data.dataset import Data
from loop.config import Resolved, TrainConfig
from loop.distributed import gather, on_main_process
from loop.record.run_folder import has_output, keep_global_batch, read_run
from loop.record.tracking import choose_mode
from loop.start.memory import GIB, PROFILES, Plan, choose, count_parameters, disk_of, memory_of, memory_table, plan_all
from loop.start.show import report_table, show_example, thinking_warning
from model.adamw_8bit import import_torchao
from model.generate import emulates_bf16
from model.head import compiles
from model.qwen3 import is_recurrent

# Compile only above this many tokens for each process; it costs some 25 s. By a model of Qwen3-1.7B's step an H100
# needs 15 s less for each million of them.
COMPILING_PAYS = 2_000_000
# Logits from which on compiling the loss on a CPU, some 11 s, pays: two cores need 0.14 ms less a target of Qwen3.
COMPILING_THE_LOSS_PAYS = 10**10


def choose_precision(config: TrainConfig) -> TrainConfig:
    """With mixed_precision as it acts. Before there are processes that know of each other."""
    if config.mixed_precision != "auto":
        return config
    folder = Path(config.output_dir)
    if config.resume and has_output(folder):
        return dataclasses.replace(config, mixed_precision=read_run(folder)["mixed_precision"])
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    kind = "cpu" if on_cpu else torch.accelerator.current_accelerator().type
    if kind == "cuda":
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)  # before Ampere it is emulated
    else:
        has_bf16 = is_bf16_available() and not emulates_bf16(torch.device(kind))
    return dataclasses.replace(config, mixed_precision="bf16" if has_bf16 else "no")


def resolve(config: TrainConfig, data: Data, meta_lm, accelerator: Accelerator) -> tuple[Resolved, Plan]:
    """The settings as they act, and the bytes that the run will need. meta_lm: the model on the meta device.

    Raises UserError if the run cannot be made on this device or with this number of processes.
    """
    device, processes = accelerator.device, accelerator.num_processes
    if len({*gather(config.mixed_precision)}) > 1:
        raise UserError("some processes have bf16 and some have not: --mixed-precision no, or bf16, for all of them")
    if config.resume:
        config = on_main_process(lambda: keep_global_batch(config, processes))
    max_steps = config.max_steps
    if max_steps <= 0:
        max_steps = math.ceil(config.num_train_epochs * data.steps_per_epoch(config))
    tokens = int(data.train.lengths.sum()) * max_steps // data.steps_per_epoch(config) // processes
    compiled = what_to_compile(config, device, tokens, meta_lm.config.vocab_size)
    config = Resolved(**dataclasses.asdict(config) | {"max_steps": max_steps, "compile": compiled})
    shards = processes if accelerator.is_fsdp2 else 1
    available = memory_of(device)
    lengths, rows_in_unit = data.train.lengths.tolist(), 2 if data.held else 1
    asked = ("speed", "32g") if config.memory == "auto" else (config.memory,)
    plans = plan_all(config, meta_lm, lengths, device, shards, PROFILES if config.dry_run else asked, rows_in_unit)
    if all(plan.total > available for plan in plans.values()):  # what else would fit?
        plans = plan_all(config, meta_lm, lengths, device, shards, rows_in_unit=rows_in_unit)
    plan = choose(plans, config.memory, device, available, config.dry_run)
    if plan.profile.optim == "adamw_8bit" and not config.dry_run:
        import_torchao()
    config = dataclasses.replace(
        config,
        memory=plan.name,
        gradient_checkpointing="on" if plan.profile.gradient_checkpointing else "off",
        micro_batch_tokens=plan.profile.micro_batch_tokens,
        optim=plan.profile.optim,
        weights=str(plan.profile.weights).removeprefix("torch."),
        loss_chunk=plan.profile.loss_chunk,
        swanlab_mode="disabled" if config.dry_run else choose_mode(config),
    )
    if config.mixed_precision == "bf16" and emulates_bf16(device):
        warn("this CPU emulates bf16, which is several times slower than fp32: --mixed-precision no")
    if config.max_length > (positions := meta_lm.config.max_position_embeddings):
        warn(f"--max-length {config.max_length} is more than the {positions} positions that the model was made for")
    announce(config, data, plans, available, accelerator)
    trained, frozen = count_parameters(meta_lm)
    if frozen:
        say(tr("trained: {:,} of {:,} parameters; the others are frozen", trained, trained + frozen))
    if is_recurrent(meta_lm.config):
        say_how_rows_stay_apart(device)
    needed = disk_of(plan, meta_lm, config, shards)
    on_main_process(lambda: check_disk(needed, Path(config.output_dir), config.dry_run))
    return config, plan


def say_how_rows_stay_apart(device: torch.device) -> None:
    from model.recurrent import KERNELS, use_kernels  # its import takes 0.3 s

    if use_kernels(device):
        say(tr("recurrent layers: packed rows, by the kernels of {}", " and ".join(KERNELS)))
    elif device.type == "cuda":
        say(tr("recurrent layers: row by row, which is slower; pip install {} for packed rows", " ".join(KERNELS)))
    else:
        say(tr("recurrent layers: row by row, because {} has no kernels for them", device))


def announce(config: Resolved, data: Data, plans: dict[str, Plan], available: float, accelerator) -> None:
    """What acts, before a weight is loaded; on a dry run all of it."""
    device, processes, plan = accelerator.device, accelerator.num_processes, plans[config.memory]
    if config.dry_run:
        settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
        say(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))
    say(report_table(data.split.report, config.dry_run))
    if warning := thinking_warning(data.split.report):
        warn(warning)
    batch = config.per_device_train_batch_size, config.gradient_accumulation_steps, processes
    say(
        tr(
            "{:,} optimizer steps of {} rows (per_device_train_batch_size {} x gradient_accumulation_steps {} x {} "
            "processes)",
            config.max_steps,
            data.rows_per_step(config),
            *batch,
        )
    )
    if config.dry_run:
        if is_main_process():
            for example in data.train[: 2 if data.held else 1]:
                show_example(example, data.tokenizer, visible)
        say(memory_table(plans, plan.name, device, available))
    else:
        strategy = "FSDP2" if accelerator.is_fsdp2 else "DDP" if processes > 1 else tr("one process")
        threads = tr("; threads: {}", torch.get_num_threads()) if device.type == "cpu" else ""
        say(
            tr(
                "{} on {}{}; mixed precision: {}; compile: {}; gradient checkpointing: {}; memory: {}, about {:.1f} of "
                "{:.1f} GiB; step file: {}",
                *(strategy, device, threads, config.mixed_precision, config.compile, config.gradient_checkpointing),
                plan.name,
                *(plan.total / GIB, available / GIB, config.step_file),
            )
        )


def what_to_compile(config: TrainConfig, device: torch.device, tokens: int, vocabulary: int) -> str:
    """on, loss or off. tokens: that one process trains on in the whole run, so that a resumed run compiles as it did
    before. Raises UserError if there is nothing to compile with."""
    on_cpu = device.type == "cpu"
    names = (os.environ.get("CXX"), "c++", "g++") if on_cpu else (os.environ.get("CC"), "cc", "gcc", "clang")
    can_compile = any(name and which(name) for name in names)
    if config.compile in ("on", "loss") and not can_compile:
        raise UserError(
            f"--compile {config.compile} needs a {'C++' if on_cpu else 'C'} compiler; install g++, or leave it out"
        )
    if config.compile != "auto":
        return config.compile
    if not can_compile or config.mixed_precision != "bf16":
        return "off"
    if device.type == "cuda" and tokens >= COMPILING_PAYS:
        return "on"
    pays = on_cpu and sys.platform == "linux" and tokens * vocabulary >= COMPILING_THE_LOSS_PAYS
    return "loss" if pays and (config.dry_run or compiles()) else "off"


def check_disk(needed: float, folder: Path, dry_run: bool) -> None:
    """Says what the run will write; raises UserError if the disk has no room for it. What the run has already written
    there, and will replace, counts as free."""
    files = [path for name in ("checkpoints", "best") for path in (folder / name).rglob("*") if path.is_file()]
    own = sum(path.stat().st_size for path in files)
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free + own
    size = f"{needed / 1e9:.1f} GB" if needed >= 1e9 else f"{needed / 1e6:.0f} MB"
    text = tr("disk: up to {} of checkpoints and models in {}, {:.1f} GB free", size, folder, free / 1e9)
    if needed > free and not dry_run:
        raise UserError(f"{text}; a smaller --save-total-limit needs less, or choose another --output-dir")
    say(text if needed <= free else f"{text}{tr(': not enough')}")
