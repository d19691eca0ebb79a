"""The first three losses of DPO, IPO, RPO and KTO beside TRL's, on the same pairs and weights: python
benchmarks/preference.py (pip install -e ".[bench]"). In fp32 on a CPU, with the embedded feedback and a small model.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "TRL_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from data.batches import make_batch
from data.compared import units_of
from data.dataset import load_data
from data.encode import encode_rows
from loop.config import PRESETS, Resolved
from loop.distributed import note_peaks
from loop.score import score
from loop.start.step_file import load_step_file
from model.export import export
from model.loss import SFTModel
from model.qwen3 import load_model, load_tokenizer

ROWS, STEPS, RATE = 4, 3, 1e-4


def main() -> None:
    disable_progress_bar()
    folder = Path(tempfile.mkdtemp()) / "model"
    for name, file, settings, theirs in (
        ("DPO", "dpo", (), {"loss_type": ["sigmoid"]}),
        ("IPO", "dpo", ("IPO=True",), {"loss_type": ["ipo"]}),
        ("DPO + RPO", "dpo", ("RPO=1.0",), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
        ("KTO", "kto", (), {"loss_type": "kto"}),
    ):
        method = load_step_file(f"recipes/{file}.py", settings)
        config = Resolved(**dataclasses.asdict(PRESETS["tiny"]) | {
            "dataset": ("sample-feedback",), "learning_rate": RATE, "warmup_ratio": 0.0, "max_grad_norm": 0.0,
            "system_prompt": ""})  # fmt: skip
        data = load_data(config, lambda texts: load_tokenizer("tiny", texts), 0, 1, method.PREFERENCE)
        if not folder.exists():
            torch.manual_seed(0)
            model = load_model("tiny", data.tokenizer, gradient_checkpointing=False)
            export(model, model.state_dict(), data.tokenizer, folder)
        rows = data.split.train[: 64 if method.PREFERENCE == "thumbs" else ROWS * STEPS]
        units = units_of(rows, method.PREFERENCE)[: ROWS * STEPS]
        if file == "kto":  # TRL: within each batch, the reply of the row before
            units = [[units[n][0], (mismatched(units[n][0][0], units[n - 1 if n % ROWS else n - 1 + ROWS][0][0]), 0)]
                     for n in range(len(units))]  # fmt: skip
        ours, other = our_losses(method, units, config, folder), their_losses(file, units, folder, theirs)
        apart = max(abs(a - b) for a, b in zip(ours, other, strict=True))
        print(f"{name:10} ours {numbers(ours)}  TRL {numbers(other)}  largest difference {apart:.1e}")


def numbers(losses: list[float]) -> str:
    return " ".join(f"{loss:.6f}" for loss in losses)


def mismatched(row, other):
    return dataclasses.replace(
        row, location=f"{row.location}, other", messages=[*row.messages[:-1], other.messages[-1]]
    )


def our_losses(method, units, config, folder: Path) -> list[float]:
    accelerator, tokenizer = Accelerator(mixed_precision="no"), AutoTokenizer.from_pretrained(folder)
    model, before = (
        SFTModel(load_model(str(folder), tokenizer, gradient_checkpointing=False, dtype=torch.float32), 1024)
        for _ in range(2)
    )
    optimizers, losses = method.make_optimizers(model, config), []
    note_peaks(optimizers)
    for step in range(STEPS):
        rows = []
        for number, unit in enumerate(units[step * ROWS : (step + 1) * ROWS]):
            for row, label in unit:
                ((example, *_), _) = encode_rows([row], tokenizer, 512, "error")
                rows.append(dataclasses.replace(example, label=label, unit=number))
        rows = [with_reference(row, before, accelerator) for row in rows]
        batch = make_batch(rows, ROWS, batch_size=3, seed=step)
        metrics = method.train_step(model, optimizers, batch, accelerator, 1.0, config)
        loss = next(float(total) / count for name, total, count in batch.logged if name == "preference_loss")
        if method.STEP_SET.get("RPO"):
            loss += (metrics.think_loss_sum + metrics.answer_loss_sum) / batch.num_targets
        losses.append(loss)
    return losses


def with_reference(row, before: SFTModel, accelerator):
    each = dataclasses.replace(row, own_parts=tuple(("", n, n + 1) for n in range(row.num_targets)))
    losses = [line.loss_sum for line in score(before, [each], accelerator)]
    return dataclasses.replace(row, reference=torch.tensor(losses))


def their_losses(file: str, units, folder: Path, more: dict) -> list[float]:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for unit in units:
        prompt, *_ = texts(unit[0][0], tokenizer)
        replies = [texts(row, tokenizer)[1] for row, label in unit if label]
        if file == "dpo":
            rows.append({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})
        else:
            rows.append({"prompt": prompt, "completion": replies[0], "label": unit[0][1] > 0})
    kind, trainer = (DPOConfig, DPOTrainer) if file == "dpo" else (KTOConfig, KTOTrainer)
    settings = kind(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=RATE, beta=0.1,
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        train_sampling_strategy="sequential", max_length=None, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    run = trainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def texts(row, tokenizer) -> tuple[str, str]:
    """Prompt and reply as this project renders them; TRL ends a text with the end token itself."""
    whole = tokenizer.apply_chat_template(row.messages, tokenize=False).removesuffix("\n")
    prompt = tokenizer.apply_chat_template(row.messages[:-1], tokenize=False, add_generation_prompt=True)
    return prompt, whole[len(prompt) :].removesuffix(tokenizer.eos_token)


if __name__ == "__main__":
    main()
