"""Fine-tunes Qwen3 on medical questions with reasoning: accelerate launch train.py [PRESET] [--flag value ...]

Parse the command line -> data, model, loop -> fit -> samples. Importing this file does nothing.
"""

import dataclasses
import math
import os
import sys
import uuid
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import yaml

from loop.command_line import is_main_process, parse_config, refuse
from loop.config import TrainConfig


def main(args: list[str] | None = None) -> None:
    config = parse_config(sys.argv[1:] if args is None else args)
    # Read when torch is loaded: large tensors in huge pages, which spares a CPU most of its page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Heavy imports wait until the command line is known to be right.
    from data.hub import HubError
    from data.source import DataError
    from loop.interrupt import end_with_launcher
    from loop.run_folder import RunError, claim
    from model.qwen3 import ModelError

    try:
        end_with_launcher()
        if config.dry_run:
            return run(config)
        with claim(Path(config.output_dir), config.resume) if is_main_process() else nullcontext():
            run(config)
    except (HubError, DataError, ModelError, RunError) as error:
        refuse(str(error))
    except BrokenPipeError:  # whoever read what is printed is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, say; what was written before is whole
        refuse(f"{error}; what is in {config.output_dir} is intact, go on with --resume")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run(config: TrainConfig) -> None:
    import torch
    from accelerate.utils import set_seed
    from torch.distributed.fsdp import register_fsdp_forward_method
    from transformers.utils.logging import disable_progress_bar

    from data.batches import rank_batches, step_batch, steps_per_epoch
    from data.encode import digest, encode_split
    from data.medical import load_split, write_split
    from data.show import report_table, show_example
    from loop.checkpoint import load_checkpoint, newest_sound
    from loop.early_stopping import EarlyStopping
    from loop.evaluate import EvalMetrics
    from loop.fit import fit
    from loop.interrupt import Interrupt
    from loop.memory import GIB, choose, memory_of, memory_table, plan_all
    from loop.optimizer import make_optimizer
    from loop.processes import end_processes, make_accelerator, on_main_process
    from loop.report import write_report
    from loop.run_folder import check_same_run, keep_global_batch, read_status, write_status
    from loop.samples import Samples
    from loop.saving import CheckpointWriter, save_best
    from loop.state import TrainState, read_state
    from loop.tracking import Tracker, choose_mode, peak_memory_gib
    from model.export import card, restore_export
    from model.lora import add_lora
    from model.loss import SFTModel
    from model.qwen3 import load_model, load_tokenizer, outline

    disable_progress_bar()  # of loading and saving weights: the only bar is the loop's
    output_dir = Path(config.output_dir)
    best = output_dir / "best"
    swanlab_mode = "disabled" if config.dry_run else choose_mode(config)
    accelerator = make_accelerator(config)
    if config.resume:
        config = on_main_process(accelerator, lambda: keep_global_batch(config, accelerator.num_processes))

    # --- data: every rank reads the same rows, the main process writes them down ----------------
    with accelerator.local_main_process_first():  # a download happens once
        split = load_split(config.dataset, config.system_prompt, config.val_fraction, config.seed)
        tokenizer = load_tokenizer(config.model, split.texts(), weights=not config.dry_run)
    train, val = encode_split(split, tokenizer, config.max_length, config.overlong)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    max_steps = config.max_steps
    if max_steps <= 0:
        max_steps = math.ceil(config.num_train_epochs * steps_per_epoch(len(train), rows_per_step))
    if config.dry_run:
        accelerator.print(yaml.safe_dump(dataclasses.asdict(config), allow_unicode=True, sort_keys=False))
    accelerator.print(report_table(split.report))
    accelerator.print(
        f"{max_steps:,} optimizer steps of {rows_per_step} rows (per_device_train_batch_size "
        f"{config.per_device_train_batch_size} x gradient_accumulation_steps {config.gradient_accumulation_steps} "
        f"x {accelerator.num_processes} processes) on {accelerator.device}"
    )
    if config.dry_run:
        accelerator.print(show_example(train[0], tokenizer, color=use_color()))

    # --- memory: what fits, before any weight is loaded -----------------------------------------
    device, available = accelerator.device, memory_of(accelerator.device)
    shards = accelerator.num_processes if accelerator.is_fsdp2 else 1
    skeleton = outline(config.model, tokenizer, weights=not config.dry_run)
    if config.lora_rank:
        add_lora(skeleton, config.lora_rank, config.model)
    plans = plan_all(config, skeleton, [len(example) for example in train], device, shards)
    if config.dry_run:
        accelerator.print(memory_table(plans, config.memory, device, available))
        return
    plan = choose(plans, config.memory, device, available)
    profile = plan.profile
    accelerator.print(f"memory: {plan.name}, about {plan.total / GIB:.1f} of {available / GIB:.1f} GiB")
    cut = {"micro_batch_tokens": profile.micro_batch_tokens, **ranks}

    # --- state: of this run so far, or a new one ------------------------------------------------
    facts = {
        "max_steps": max_steps,
        "rows_per_step": rows_per_step,
        "train_rows": f"{len(train):,} with sha256 {digest(train)}",
        "val_rows": f"{len(val):,} with sha256 {digest(val)}",
        "weights": str(profile.weights),
        "optim": profile.optim,
        **{f"{name}_version": version(name) for name in ("torch", "transformers", "accelerate", "swanlab")},
    }
    run_facts = {**dataclasses.asdict(config), **facts}

    def checkpoint_to_resume() -> Path | None:
        check_same_run(output_dir, run_facts)
        restore_export(best)
        return newest_sound(output_dir / "checkpoints") if config.resume else None

    checkpoint = on_main_process(accelerator, checkpoint_to_resume)
    state = read_state(checkpoint) if checkpoint else TrainState(EarlyStopping(0), run_id=uuid.uuid4().hex[:12])
    state.early_stopping.patience = config.early_stopping_patience
    state.early_stopping.min_delta = config.early_stopping_min_delta
    is_trained = state.step >= max_steps or state.early_stopping.should_stop
    if is_trained and read_status(output_dir).get("status") in ("completed", "early_stopped"):
        accelerator.print(f"this run is finished: {state.summary(best)}")
        return
    if accelerator.is_main_process:
        write_split(split, output_dir / "data")

    # --- model, optimizer -----------------------------------------------------------------------
    set_seed(config.seed)
    with accelerator.local_main_process_first():
        causal_lm = load_model(
            config.model,
            tokenizer,
            gradient_checkpointing=profile.gradient_checkpointing,
            dtype=profile.weights,
            # Of all steps, not of those left: a resumed run computes what the whole one would.
            compile=config.compile == "on"
            or (config.compile == "auto" and device.type == "cuda" and max_steps >= 1000),
        )
    if config.lora_rank:
        add_lora(causal_lm, config.lora_rank, config.model)
    model = SFTModel(causal_lm, profile.loss_chunk, (config.think_weight, config.answer_weight))
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, profile.optim)
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        register_fsdp_forward_method(model, "generate")
    if checkpoint:
        load_checkpoint(checkpoint, accelerator, model, optimizer)
        accelerator.print(f"resumed from {checkpoint}")

    def export_best(metrics: EvalMetrics) -> None:
        """All ranks; raises SaveError."""
        figures = {"step": state.step, "num_train": len(train), "num_val": len(val), "perplexity": metrics.perplexity}
        texts = card(run_facts | figures | metrics._asdict(), config.language, causal_lm.generation_config)
        save_best(accelerator, model, tokenizer, best, texts)

    # --- train ----------------------------------------------------------------------------------
    launch = {
        "world_size": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_parameters": skeleton.num_parameters(),
        "optimizer": type(optimizer.optimizer).__name__,
    }
    tracker = Tracker(config, swanlab_mode, state.run_id, state.step, accelerator.is_main_process, facts | launch)
    samples = Samples(config, split.val, val, tokenizer, tracker, state.step, accelerator.is_main_process)

    def report(status: str, **more) -> None:
        if accelerator.is_main_process:
            write_status(output_dir, status, step=state.step, max_steps=max_steps, **launch, **more)

    report("running")
    try:
        root = output_dir / "checkpoints"
        with Interrupt(output_dir) as interrupt, CheckpointWriter(root, config.save_total_limit, device) as checkpoints:
            status = fit(
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
                    **cut,
                ),
                eval_batches=rank_batches(val, range(len(val)), batch_size=config.per_device_eval_batch_size, **cut),
                max_steps=max_steps,
                checkpoints=checkpoints,
                export_best=export_best,
                answer_samples=lambda: samples.answer(model, accelerator, state.step),
                interrupt=interrupt,
            )
        peak = peak_memory_gib(device)
        accelerator.print(f"peak memory {peak:.1f} GiB; predicted {plan.total / GIB:.1f}")
        if status == "interrupted":
            advice = "Go on: the same command --resume"
            accelerator.print(f"interrupted, with a checkpoint: {state.summary(best)}. {advice}")
            interrupt.done()
        else:
            accelerator.print(f"{status.replace('_', ' ')}: {state.summary(best)}")
            best_step = state.early_stopping.best_step
            model, optimizer, causal_lm = accelerator.free_memory(model, optimizer, causal_lm)
            if accelerator.is_main_process and best.exists():  # no best model where every evaluation was NaN
                samples.answer_with_best(best, device, best_step, state.step)
    except BaseException as error:
        # After its training a run is no longer asked to stop but stopped: --resume then makes what is missing.
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else getattr(error, "status", "failed")
        report(status, error=f"{type(error).__name__}: {error}")
        tracker.finish("aborted" if status == "interrupted" else "crashed", error=f"{type(error).__name__}: {error}")
        raise
    report(status, best_step=state.early_stopping.best_step, best_loss=state.early_stopping.best_loss)
    tracker.finish("aborted" if status == "interrupted" else "success")
    if accelerator.is_main_process and best.exists() and status != "interrupted":
        print(f"report: {write_report(output_dir, config.language)}\nchat: python -m model.chat {best}")
    end_processes(accelerator)


def use_color() -> bool:
    return "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)


if __name__ == "__main__":
    main()
