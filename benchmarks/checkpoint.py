"""How long the training stands still for a checkpoint, and how long the write behind it takes.

python benchmarks/checkpoint.py        # CPU: a small Qwen3 of 103 million parameters; CUDA: Qwen3-1.7B's shape
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from loop.start.environment import set_before_torch  # noqa: E402

set_before_torch()


def main() -> None:
    import torch
    from compare import LR, SHAPES, finish
    from transformers import AutoModelForCausalLM, Qwen3Config

    from data.batches import make_batch
    from data.encode import Example
    from loop.config import Resolved
    from loop.distributed import make_accelerator, prepare, to_device
    from loop.record.checkpoint_writer import CheckpointWriter
    from loop.start.memory import PROFILES
    from loop.state import TrainState
    from loop.step import make_optimizers, train_step
    from model.attention import PACKED
    from model.loss import SFTModel

    settings = Resolved(learning_rate=LR)
    accelerator = make_accelerator(settings)
    device = accelerator.device
    config = Qwen3Config(**SHAPES["1.7b" if device.type == "cuda" else "small"], tie_word_embeddings=True)
    with device:
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.float32).train()
    model = SFTModel(causal_lm, PROFILES["speed"].loss_chunk)
    model, optimizers = prepare(accelerator, model, make_optimizers(model, settings))
    lengths = json.loads((HERE / "lengths.json").read_text())[:4]
    rows = [Example(torch.randint(config.vocab_size, (length,)), prompt, end, "") for prompt, end, length in lengths]
    batch = make_batch(rows, batch_size=1, micro_batch_tokens=16384)
    state = TrainState("")

    def step() -> float:
        begin = time.perf_counter()
        train_step(model, optimizers, to_device(batch, device), accelerator, 1.0, settings)
        finish(device)
        return time.perf_counter() - begin

    step()
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder), 2, device) as writer:
        for number in range(1, 4):
            plain = statistics.median(step() for _ in range(3))
            state.step = number
            begin = time.perf_counter()
            writer.save(model, optimizers, state)
            stall = time.perf_counter() - begin
            steps = [step() for _ in range(3)]
            writer.wait(is_last=True)
            whole = time.perf_counter() - begin
            size = sum(path.stat().st_size for path in Path(folder, f"step-{number:08d}").rglob("*") if path.is_file())
            during = ", ".join(f"{seconds:.2f}" for seconds in steps)
            print(
                f"{size / 1e9:.2f} GB: stands still {stall:.2f} s, {stall / (400 * plain):.2%} of 400 steps of "
                f"{plain:.2f} s; steps meanwhile {during}; all written within {whole:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
