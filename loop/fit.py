"""The whole training, from top to bottom."""

from contextlib import suppress
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment, set_seed
from transformers.utils.logging import disable_progress_bar

from data.base.console import say
from data.base.errors import UserError
from data.base.language import tr
from data.dataset import Data, load_data
from loop.config import Resolved, TrainConfig
from loop.distributed import end_processes, make_accelerator, prepare, reshard, seed_step, to_device
from loop.evaluate import Evaluation
from loop.record.checkpoint import check_ranks_agree, load_checkpoint
from loop.record.checkpoint_writer import CheckpointWriter
from loop.record.interrupt import Interrupt, Stopped
from loop.reference import add_reference
from loop.run import Run
from loop.start.checks import check_preference
from loop.start.memory import Plan, count_parameters
from loop.start.probe import check_rows_are_apart
from loop.start.resolve import choose_precision, resolve
from loop.start.step_file import finite, load_step_file
from model.lora import add_lora
from model.loss import SFTModel
from model.qwen3 import is_recurrent, load_model, load_tokenizer, meta_model


def fit(config: TrainConfig) -> bool:
    """Trains, or goes on training, in config.output_dir; returns whether the training is over. All ranks.

    Raises UserError if it cannot begin, or diverges, or cannot write checkpoints; older ones are then intact.
    """
    method = load_step_file(config.step_file, config.step_set)
    accelerator = make_accelerator(config := choose_precision(config))
    data = read_data(config, accelerator, method)
    meta_lm = make_meta_lm(config, data.tokenizer)
    config, plan = resolve(config, data, meta_lm, accelerator)
    evaluation = Evaluation(data, config, accelerator, method)
    if config.dry_run:
        return False
    run = Run(config, data, plan, evaluation, about_model(meta_lm, plan), accelerator)
    state = run.state
    if run.is_finished:
        say(tr("this run is finished: {}", run.summary(state.best_step, state.best_loss)))
        return False

    model = build_model(config, data.tokenizer, accelerator)
    model, optimizers = prepare(accelerator, model, method.make_optimizers(model, config))
    check_rows_are_apart(model, accelerator)
    add_reference(method.REFERENCE, model, data.train, config, accelerator, is_new=run.checkpoint is None)
    if run.checkpoint:
        load_checkpoint(run.checkpoint, accelerator, model, optimizers if run.has_same_optimizers else [])
        say(tr("resumed from {}", run.checkpoint))
    start, root = (state.step, state.last_eval), run.folder / "checkpoints"
    with run, Interrupt(run.folder, config.max_time) as interrupt:
        with CheckpointWriter(root, config.save_total_limit, accelerator.device) as checkpoints:
            while True:
                # --- evaluate: before the first step, every eval_steps, after the last one ---
                if run.due(config.eval_steps) and state.last_eval != state.step:
                    check_ranks_agree(model, root)
                    with suppress(Stopped), method.evaluated_weights(model, optimizers):
                        figures, table = evaluation(model, state.step, interrupt.check)
                        run.evaluated(figures, table, model, interrupt)
                    reshard(model)

                # --- checkpoint, stop ---
                stop = run.is_over or interrupt.requested()
                is_new = state.step > 0 and (state.step, state.last_eval) != start
                if is_new and (stop or state.step % config.save_steps == 0):
                    check_ranks_agree(model, root)
                    run.collect_logged()
                    checkpoints.save(model, optimizers, state)
                if stop:
                    break

                # --- one optimizer step; its randomness is a function of (seed, step, rank) ---
                seed_step(config.seed, state.step, accelerator.process_index)
                batch = to_device(data.batch(state.step, config), accelerator.device)
                multiplier = finite(method.lr_multiplier(state.step, config.max_steps, config), method)
                metrics = method.train_step(model, optimizers, batch, accelerator, multiplier, config)
                run.stepped(metrics, batch, optimizers)
            checkpoints.wait(is_last=True)
        del model, optimizers
        accelerator.free_memory()
        is_over = run.finish(interrupt)
    end_processes(accelerator)
    return is_over


def read_data(config: TrainConfig, accelerator: Accelerator, method: ModuleType) -> Data:
    check_preference(config, method)
    with accelerator.local_main_process_first():  # a download happens once
        return load_data(
            config,
            lambda texts: load_tokenizer(config.model, texts, weights=not config.dry_run),
            accelerator.process_index,
            accelerator.num_processes,
            method.PREFERENCE,
            method.ANSWERS_ALONE,
        )


def make_meta_lm(config: TrainConfig, tokenizer):
    """The model without its weights, on the meta device."""
    meta_lm = meta_model(config.model, tokenizer, weights=not config.dry_run)
    if config.frozen == "nf4" and is_recurrent(meta_lm.config):
        raise UserError(f"{config.model}: 4 bits are advised against for Qwen3.5 (Unsloth's guide); --frozen full")
    if config.lora_rank:
        add_lora(meta_lm, config.lora_rank, config.model, config.frozen)
    return meta_lm


def about_model(meta_lm, plan: Plan) -> dict:
    trainable = sum(parameter.numel() for parameter in meta_lm.parameters() if parameter.requires_grad)
    counts = {"num_parameters": sum(count_parameters(meta_lm)), "num_trainable_parameters": trainable}
    return counts | {"optimizers": plan.optimizers}


def build_model(config: Resolved, tokenizer, accelerator: Accelerator) -> SFTModel:
    disable_progress_bar()  # of loading and saving weights
    set_seed(config.seed)
    # Weights in 4 bits are made on every rank, of weights that transformers may else load on one alone for FSDP2.
    whole = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"} if config.frozen == "nf4" else {}
    with accelerator.local_main_process_first(), patch_environment(**whole):
        causal_lm = load_model(
            config.model,
            tokenizer,
            gradient_checkpointing=config.gradient_checkpointing == "on",
            dtype=getattr(torch, config.weights),
            compile=config.compile == "on",
        )
    if config.lora_rank:
        add_lora(causal_lm, config.lora_rank, config.model, config.frozen)
    return SFTModel(causal_lm, config.loss_chunk, compiled=config.compile in ("on", "loss"))
