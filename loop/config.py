"""TrainConfig: every setting of a run, and its presets."""

import dataclasses
from typing import Literal

# What a column of a dataset can be; data/reading/formats.py has the names by which it is told.
ROLES = ("question", "think", "answer", "dialogue", "system", "history", "context", "options", "chosen", "rejected",
         "label")  # fmt: skip


def may_change(default):
    """A setting that may change on --resume, because it does not affect the result. (Data is compared by a hash of its
    tokens, the batch size by rows per step.)"""
    return dataclasses.field(default=default, metadata={"may_change": True})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    # --- data ---

    # One or more: a local file or folder, a ModelScope id (owner/name, owner/name:SUBSET, owner/name/FILE), one of
    # Hugging Face (hf:owner/name), each with @REVISION after the name if need be, or `sample` (embedded). NAME:500 and
    # NAME:10% take that many of its rows.
    dataset: tuple[str, ...] = may_change(("krisfu/delicate_medical_r1_data",))
    # Which column is which, if its name does not tell: think=Complex_CoT answer=Response.
    columns: tuple[str, ...] = may_change(())
    # System prompt of rows without a system message; an empty string leaves it out.
    system_prompt: str = "你是一个医学专家，你需要根据用户的问题，给出带有思考的回答。"
    # Longest row in tokens, prompt and reply together.
    max_length: int = 2048
    # Rows over max_length: shorten the thinking, drop the row, or stop with an error.
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    # Share of the rows held out for evaluation.
    val_fraction: float = 0.1
    # Seed of the split. Runs with other seeds then have the same validation rows, and can be compared.
    split_seed: int = 42
    # Rows to evaluate on, named as those of dataset, of which none is then held out (unless the step file compares
    # replies, of which some are held out all the same).
    val_dataset: tuple[str, ...] = may_change(())
    # Share of the rows held out for a test, in data/test.jsonl; neither early stopping nor best/ sees them.
    test_fraction: float = may_change(0.0)
    # Files of what must not be trained on: questions of multiple choice (rows that ask one are left out), and rows,
    # such as those that tools.rows suspects. The validation rows stay.
    exclude: tuple[str, ...] = may_change(())
    # Train the answers that a file of feedback likes, too; corrections always are.
    train_liked: bool = may_change(False)
    # A column, such as department: an evaluation loss of its own for each of its values.
    group_by: str = may_change("")

    # --- model ---

    # ModelScope model id, one of Hugging Face (hf:owner/name), either with @REVISION if need be, a local Hugging Face
    # folder, or `tiny` and `tiny-qwen3.5` (embedded, random weights).
    model: str = may_change("Qwen/Qwen3-1.7B")
    # Rank of LoRA's updates, trained instead of the weights; 0 trains all parameters.
    lora_rank: int = 0
    # The weights that LoRA does not train: as they are (full), or those of its linear layers in 4 bits (nf4), 8B on a
    # card of 24 GB. best/ is made of the weights as they are.
    frozen: Literal["full", "nf4"] = "full"
    # Autocast over fp32 weights (bf16), or all of it in fp32 (no). auto: bf16 if the device has it; a resumed run goes
    # on as it began.
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    # What a card's memory allows: speed, or a profile for 32, 24 or 16 GB (--dry-run shows what each needs and
    # changes). auto: the faster one that fits of speed and 32g, which compute the same.
    memory: Literal["auto", "speed", "32g", "24g", "16g"] = may_change("auto")
    # Recompute activations in the backward pass: less memory, about a third more compute. auto: as memory says.
    gradient_checkpointing: Literal["auto", "on", "off"] = may_change("auto")
    # Compile the decoder layers and the loss (on), or the loss alone, in seconds. auto: in bf16 and if there is a C
    # compiler, on CUDA all of it in runs long enough to repay it, on a CPU the loss.
    compile: Literal["auto", "on", "loss", "off"] = may_change("auto")

    # --- optimizer step ---

    # The method: a Python file with the functions of loop/step.py; recipes/ has more.
    step_file: str = may_change("loop/step.py")
    # Constants of the step file, in the place of the values that it gives them: RHO=0.1.
    step_set: tuple[str, ...] = may_change(())
    # Rows in one micro-batch on each process.
    per_device_train_batch_size: int = may_change(1)
    # Micro-batches in one optimizer step on each process.
    gradient_accumulation_steps: int = may_change(4)
    # Packs each process's rows into as few micro-batches of at most this many tokens as possible; affects speed
    # only. 0: per_device_train_batch_size rows each; -1: as memory says.
    micro_batch_tokens: int = may_change(-1)
    # Weights of thinking and answer tokens in the loss that is trained; reported losses are never weighted.
    think_weight: float = 1.0
    answer_weight: float = 1.0
    # Peak learning rate.
    learning_rate: float = 1e-4
    # Shape of the decay after warmup, down to 0 at the last step (constant: no decay).
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    # Share of all steps in which the learning rate rises from 0 to its peak.
    warmup_ratio: float = 0.0
    # Decoupled weight decay of matrices and embeddings; norms have none.
    weight_decay: float = 0.0
    # Largest global gradient norm; 0 turns clipping off.
    max_grad_norm: float = 1.0

    # --- length of the run ---

    # Passes over the training rows.
    num_train_epochs: float = 2
    # Optimizer steps in all; above 0 it replaces num_train_epochs.
    max_steps: int = -1
    # Seed of the data order, dropout and random weights.
    seed: int = 42

    # --- evaluation ---

    # Evaluate every N steps (and before the first and after the last one).
    eval_steps: int = 100
    # Rows in one evaluation micro-batch on each process; the loss does not depend on it. -1: as many as have 8,192
    # tokens together.
    per_device_eval_batch_size: int = may_change(-1)
    # At each evaluation also the answers' loss without thinking and with another row's: does the thinking help? Up to
    # twice an evaluation's time more.
    think_probe: bool = may_change(False)
    # Files of multiple choice (CMMLU, C-Eval, CMB, CMExam, MedQA and more) to answer at evaluations, by the likelihood
    # of the letter after no thinking. Rows with one of their questions are not trained on.
    exam: tuple[str, ...] = may_change(())
    # Answer them every N steps, a multiple of eval_steps, and before the first one and after step max_steps. 0: at
    # each evaluation.
    exam_steps: int = may_change(0)
    # Stop after N evaluations in a row without a better loss; 0 never stops early.
    early_stopping_patience: int = may_change(3)
    # An evaluation counts as better only by more than this.
    early_stopping_min_delta: float = may_change(0.0)

    # Files of `tools.replay --sample`: replies of the model before training. Their loss shows at each evaluation how
    # much the model has forgotten.
    forget: tuple[str, ...] = may_change(())

    # Validation questions that the model answers at each evaluation (and up to 32 that the best one answers at the
    # end); 0 turns it off.
    num_samples: int = may_change(3)
    # Most time that these answers may take, as a share of the time trained since the last evaluation (before training,
    # of the evaluation's own time); then they end where they are, and elsewhere after a resume. 0 for no limit.
    sample_budget: float = may_change(0.1)
    # Longest of these answers in tokens, thinking included.
    sample_max_new_tokens: int = may_change(1024)

    # --- output ---

    # Folder of the run: data/, checkpoints/, best/, metrics.jsonl, samples.jsonl, report.md.
    output_dir: str = may_change("outputs/qwen3-1.7b-medical")
    # Write train metrics every N steps.
    logging_steps: int = may_change(10)
    # Write a checkpoint every N steps (and after the last one).
    save_steps: int = may_change(400)
    # Checkpoints kept, newest first; at least 2, because the newest may be damaged.
    save_total_limit: int = may_change(2)
    # Language of report.md and of the model's README.
    language: Literal["zh", "en"] = may_change("zh")
    # SwanLab project and experiment name.
    swanlab_project: str = may_change("qwen3-sft-medical")
    run_name: str = may_change("qwen3-1.7b")
    # auto: your own SwanLab setting, else online with a key, else offline.
    swanlab_mode: Literal["auto", "online", "offline", "local", "disabled"] = may_change("auto")

    # --- this launch ---

    # Stop after so many hours, with a checkpoint, as a queue's limit asks for; 0 for no limit.
    max_time: float = may_change(0.0)
    # Go on from the newest complete checkpoint in output_dir; start if there is none.
    resume: bool = may_change(False)
    # Show configuration, data report and one rendered example; load no weights.
    dry_run: bool = may_change(False)

    def check(self) -> None:
        """Raises ValueError naming the first setting that is out of range."""
        at_least = {
            -1: "micro_batch_tokens per_device_eval_batch_size",
            0: "early_stopping_patience early_stopping_min_delta lora_rank num_samples think_weight answer_weight "
            "learning_rate weight_decay max_grad_norm seed split_seed max_time sample_budget exam_steps",
            1: "per_device_train_batch_size gradient_accumulation_steps eval_steps "
            "logging_steps save_steps sample_max_new_tokens",
            2: "save_total_limit",
            16: "max_length",
        }
        for low, names in at_least.items():
            for name in names.split():
                if not low <= getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be a finite number of at least {low}, not {getattr(self, name)}")
        if self.per_device_eval_batch_size == 0:
            raise ValueError("per_device_eval_batch_size must be -1 or at least 1, not 0")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32 (4,294,967,296), not {self.seed}")
        if self.exam_steps % self.eval_steps:
            raise ValueError(f"exam_steps must be a multiple of eval_steps {self.eval_steps}, not {self.exam_steps}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, not {self.val_fraction}")
        if not 0 <= self.test_fraction < 1 - (0 if self.val_dataset else self.val_fraction):
            raise ValueError(f"test_fraction must leave rows to train on, not {self.test_fraction}")
        for text in self.columns:
            role, equals, column = text.partition("=")
            if not equals or not column.strip() or role.strip() not in ROLES:
                raise ValueError(f"columns: {text!r} is not of the form think=COLUMN; known are {', '.join(ROLES)}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie between 0 and 1, not {self.warmup_ratio}")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < float("inf"):
            raise ValueError(f"num_train_epochs must be above 0, not {self.num_train_epochs}")
        if self.think_weight == self.answer_weight == 0:
            raise ValueError("think_weight and answer_weight are both 0, which leaves nothing to train")
        if self.frozen != "full" and not self.lora_rank:
            raise ValueError(f"frozen {self.frozen} is for weights that LoRA does not train: set lora_rank, such as 16")
        for name in ("dataset", "model", "output_dir"):
            value = getattr(self, name)
            if not value or not all(part.strip() for part in ([value] if isinstance(value, str) else value)):
                raise ValueError(f"{name} must not be empty")


@dataclasses.dataclass(frozen=True)
class Resolved(TrainConfig):
    """The settings as they act in a run: no `auto` is left, and the memory profile has become what it sets."""

    mixed_precision: Literal["bf16", "no"] = "bf16"
    optim: str = "adamw"  # or adamw_8bit: moments in 8 bits
    weights: str = "float32"  # their type, and that of the gradients
    loss_chunk: int = 1024  # targets whose logits exist at one time


PRESETS = {
    # The experiment as it was run.
    "medical": TrainConfig(),
    # What made the second epoch worth training, where it was measured: an averaged model, and a fifth of the rate.
    "better": TrainConfig(
        step_file="recipes/ema.py",
        learning_rate=2e-5,
        warmup_ratio=0.05,
        run_name="qwen3-1.7b-better",
        output_dir="outputs/qwen3-1.7b-medical-better",
    ),
    # The same with LoRA, whose updates take a higher rate.
    "lora": TrainConfig(
        lora_rank=16, learning_rate=2e-4, run_name="qwen3-1.7b-lora", output_dir="outputs/qwen3-1.7b-medical-lora"
    ),
    # After one of these, from feedback: good replies become likelier than bad ones.
    "preference": TrainConfig(
        step_file="recipes/dpo.py",
        model="outputs/qwen3-1.7b-medical/best",
        dataset=("feedback.jsonl",),
        learning_rate=1e-6,
        warmup_ratio=0.1,
        gradient_accumulation_steps=8,
        eval_steps=10,
        save_steps=50,
        logging_steps=1,
        run_name="qwen3-1.7b-preference",
        output_dir="outputs/qwen3-1.7b-medical-preference",
    ),
    # Embedded data and model: no download, no account, no GPU. Overfits on purpose, to show it.
    "tiny": TrainConfig(
        dataset=("sample",),
        model="tiny",
        max_length=512,
        mixed_precision="no",
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        warmup_ratio=0.01,
        num_train_epochs=24,
        eval_steps=30,
        logging_steps=5,
        save_steps=100,
        sample_max_new_tokens=256,
        sample_budget=0.0,
        run_name="tiny",
        output_dir="outputs/tiny",
    ),
}
