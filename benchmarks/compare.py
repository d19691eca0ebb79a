"""This loop beside what one would use instead: the same rows, order, model and settings, each in its own process.

    python benchmarks/compare.py                       # CPU: a small Qwen3 with the real vocabulary
    python benchmarks/compare.py --shape small-4096    # CPU: the same with 4,096 words
    python benchmarks/compare.py --shape 1.7b          # CUDA: the shape of Qwen3-1.7B, random weights

Rows have the lengths of 120 rows of the dataset (lengths.json) and random tokens. Rounds are interleaved; a
ratio is the median over rounds of ours to theirs, with its range. Results are appended to --out as they come.
The losses of the first steps must agree, or no figure is given. pip install -e ".[bench]"
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from loop.start.environment import set_before_torch  # noqa: E402

SMALL = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
             intermediate_size=1536)  # fmt: skip
SHAPES = {
    "small": {**SMALL, "vocab_size": 151936},
    "small-4096": {**SMALL, "vocab_size": 4096},
    "1.7b": dict(hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                 intermediate_size=6144, vocab_size=151936),
}  # fmt: skip
# name -> what it is. The first is what the others are compared with.
CONTESTANTS = {
    "ours": "this loop as train.py runs it, --memory speed; compiled on CUDA, on a CPU the loss alone",
    "ours compiled": "the same with --compile on",
    "ours eager": "the same with --compile off",
    "ours 32g": "this loop, --memory 32g (gradient checkpointing)",
    "ours 24g": "this loop, --memory 24g",
    "ours 16g": "this loop, --memory 16g",
    "recipe": "the original recipe: Trainer, bf16 weights, gradient checkpointing, batch 1, accumulation 4",
    "trainer": "Trainer, fp32 weights, bf16 autocast, batch 1, accumulation 4",
    "trainer ckpt": "the same with gradient checkpointing",
    "trainer thp": "trainer, with THP_MEM_ALLOC_ENABLE=1, which train.py sets for itself",
    "trl": "TRL SFTTrainer, fp32 weights, bf16 autocast, its fused head, no checkpointing: on CPU batch 1, "
    "accumulation 4; on CUDA batch 4, padding-free with this project's varlen attention",
}
# Weights in bf16 take another path from the first update on.
LOSS_TOLERANCE = {"recipe": 0.02, "ours 24g": 0.02, "ours 16g": 0.02}
LR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=int, default=4, help="rows in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a process, after --warmup")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=["ours", "recipe", "trainer", "trl"])
    parser.add_argument("--out", type=Path, default=Path("compare.jsonl"))
    parser.add_argument("--fp32", action="store_true", help="products in fp32, as on a CPU that emulates bf16")
    parser.add_argument("--cap", type=float, help="GiB of the GPU that a process may use, its own context included")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker.startswith("ours"):
            set_before_torch()
        print(json.dumps(matmul_rate(args) if args.worker == "matmul" else work(args)))
        return
    results = {name: [] for name in ["matmul", *args.only]}
    for number in range(args.rounds):
        turn = number % len(args.only)
        for name in ["matmul", *args.only[turn:], *args.only[:turn]]:
            result = {"contestant": name, "shape": args.shape, "rows": args.rows, "round": number, **start(args, name)}
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            results[name].append(result)
            print(
                f"round {number}  {name:<14}" + "  ".join(f"{k} {v}" for k, v in result.items() if k in SHOWN),
                flush=True,
            )
    report(args, results)


SHOWN = ("tflops", "tokens_per_s", "step_p50_s", "peak_gib", "predicted_gib", "recompiled", "error")


def start(args, name: str) -> dict:
    """One contestant in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    if name == "trainer thp":
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {args.timeout:.0f} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": done.stderr[-600:]}


def report(args, results: dict[str, list[dict]]) -> None:
    peak = max(result["tflops"] for result in results["matmul"])
    good = {name: [r for r in results[name] if "error" not in r] for name in args.only}
    first = args.only[0]
    precision = "fp32" if in_fp32(args) else "bf16"
    print(f"\n{args.shape}, {args.rows} rows a step, {precision} matmul {peak:.3f} TFLOP/s")
    print(f"{'':<14}{'tokens/s':>10}{'ratio':>8}{'range':>14}{'MFU':>7}{'p50 s':>9}{'p99 s':>9}{'GiB':>8}")
    for name in args.only:
        for mine, theirs in zip(good[first], good[name], strict=False):
            tolerance = LOSS_TOLERANCE.get(name, 0.005)
            if any(abs(a - b) > tolerance * b for a, b in zip(mine["losses"], theirs["losses"], strict=True)):
                raise SystemExit(f"{name}: other losses than {first}: {theirs['losses']} against {mine['losses']}")
        if not good[name]:
            print(f"{name:<14}  {results[name][-1]['error'][-200:]}")
            continue
        by_round = {r["round"]: r["tokens_per_s"] for r in good[name]}
        ratios = [r["tokens_per_s"] / by_round[r["round"]] for r in good[first] if r["round"] in by_round]
        middle = {k: statistics.median(r[k] for r in good[name]) for k in ("tokens_per_s", "step_p50_s", "peak_gib")}
        slowest = max(r["step_p99_s"] for r in good[name])
        mfu = statistics.median(r["tokens_per_s"] * r["flop_per_token"] for r in good[name]) / peak / 1e12
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{name:<14}{middle['tokens_per_s']:>10.0f}{statistics.median(ratios):>8.2f}{spread:>14}{mfu:>7.1%}"
            f"{middle['step_p50_s']:>9.3f}{slowest:>9.3f}{middle['peak_gib']:>8.2f}"
        )


def work(args) -> dict:
    """Trains one contestant for warmup + steps steps."""
    import torch
    from transformers import Qwen3Config

    from data.encode import Example

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Qwen3Config(
        **SHAPES[args.shape],
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    num_steps = args.warmup + args.steps
    lengths = json.loads((HERE / "lengths.json").read_text())
    lengths = [lengths[index % len(lengths)] for index in range(num_steps * args.rows)]
    generator = torch.Generator().manual_seed(0)
    rows = [
        Example(torch.randint(2, config.vocab_size, (length,), generator=generator), prompt, answer, "")
        for prompt, answer, length in lengths
    ]
    torch.manual_seed(0)
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.mem_get_info()[1])
    run = train_ours if args.worker.startswith("ours") else train_with_trainer
    losses, ends, more = run(args, config, rows, device)
    # A step that met a new graph spent its time in the compiler.
    timed_steps = [step for step in range(args.warmup, num_steps) if step not in more.get("compiling", ())]
    seconds = [ends[step + 1] - ends[step] for step in timed_steps]
    timed = [len(row) for step in timed_steps for row in rows[step * args.rows : (step + 1) * args.rows]]
    mean_context = sum(n * n for n in timed) / sum(timed)
    parameters = config.vocab_size * config.hidden_size + config.num_hidden_layers * (
        config.hidden_size * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        + 3 * config.hidden_size * config.intermediate_size
    )
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * mean_context
    seconds_sorted = sorted(seconds)
    return {
        "tokens_per_s": round(sum(timed) / sum(seconds), 1),
        "step_p50_s": round(statistics.median(seconds), 4),
        "step_p99_s": round(seconds_sorted[min(len(seconds) - 1, int(0.99 * len(seconds)))], 4),
        "first_step_s": round(ends[1] - ends[0], 1),
        "peak_gib": round(peak_gib(device), 2),
        # 6 for each weight of the linears and the head, causal attention at the rows' mean context; no recomputation.
        "flop_per_token": 6 * parameters + attention,
        "losses": [round(loss, 5) for loss in losses[:4]],
        "recompiled": num_steps - args.warmup - len(timed_steps),
        "predicted_gib": more.get("predicted_gib"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def train_ours(args, config, rows, device):
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM

    from data.batches import make_batch
    from loop.config import Resolved
    from loop.distributed import make_accelerator, prepare, to_device
    from loop.start.memory import PROFILES, plan_all
    from loop.step import make_optimizers, train_step
    from model.attention import PACKED
    from model.loss import SFTModel

    variant = args.worker.partition(" ")[2]
    is_compiled = variant == "compiled" or (device.type == "cuda" and variant != "eager")
    memory = variant if variant in PROFILES else "speed"
    compile = "on" if is_compiled else "off" if variant == "eager" or in_fp32(args) else "loss"
    settings = Resolved(
        learning_rate=LR,
        memory=memory,
        optim=PROFILES[memory].optim,
        compile=compile,
        mixed_precision="no" if in_fp32(args) else "bf16",
        max_steps=1,
        gradient_accumulation_steps=args.rows,
    )
    profile = PROFILES[memory]
    accelerator = make_accelerator(settings)
    with device:
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=profile.weights).train()
    lengths = [len(row) for row in rows]
    plan = plan_all(settings, causal_lm, lengths, device, 1)[memory]
    if profile.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable()
    for layer in causal_lm.model.layers if is_compiled else ():
        layer.compile(dynamic=True)
    model = SFTModel(causal_lm, profile.loss_chunk, compiled=compile != "off")
    model, optimizers = prepare(accelerator, model, make_optimizers(model, settings))
    packing = dict(batch_size=1, micro_batch_tokens=profile.micro_batch_tokens)
    losses, ends, compiling, known = [], [time.perf_counter()], [], 0
    for start in range(0, len(rows), args.rows):
        batch = to_device(make_batch(rows[start : start + args.rows], **packing), device)
        metrics = train_step(model, optimizers, batch, accelerator, 1.0, settings)
        losses.append(
            (metrics.think_loss_sum + metrics.answer_loss_sum) / (metrics.num_think_tokens + metrics.num_answer_tokens)
        )
        finish(device)
        ends.append(time.perf_counter())
        graphs = counters["stats"]["unique_graphs"]
        if graphs > known:
            compiling.append(len(losses) - 1)
        known = graphs
    needs = plan.total if device.type == "cpu" else plan.tensors
    return losses, ends, {"compiling": compiling, "predicted_gib": round(needs / 2**30, 2)}


def train_with_trainer(args, config, rows, device):
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            finish(device)
            ends.append(time.perf_counter())

    ends = []
    is_recipe, is_trl = args.worker == "recipe", args.worker == "trl"
    padding_free = is_trl and device.type == "cuda"
    batch = args.rows if padding_free else 1
    settings = dict(
        output_dir="/tmp/compare", per_device_train_batch_size=batch, gradient_accumulation_steps=args.rows // batch,
        max_steps=args.warmup + args.steps, learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=1.0,
        weight_decay=0.0, bf16=not (is_recipe or in_fp32(args)),
        gradient_checkpointing=is_recipe or args.worker == "trainer ckpt",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    attention = "sdpa"
    if padding_free:
        from transformers import AttentionInterface

        from model.attention import packed_attention

        def packed(*tensors, cu_seq_lens_q, max_length_q, **more):
            return packed_attention(*tensors, cu_seqlens=cu_seq_lens_q, max_seqlen=max_length_q, **more)

        AttentionInterface.register(attention := "packed_for_trl", packed)
    with device:
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=attention,
            dtype=torch.bfloat16 if is_recipe and not in_fp32(args) else torch.float32,
        )
    data = [
        {
            "input_ids": row.input_ids.tolist(),
            "labels": [-100] * row.prompt_length + row.input_ids[row.prompt_length :].tolist(),
        }
        for row in rows
    ]
    if is_trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from model.tiny import tiny_tokenizer

        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings, max_length=None, padding_free=padding_free),
            train_dataset=Dataset.from_list(data),
            processing_class=tiny_tokenizer(["a"]),
            callbacks=[Clock()],
        )
    else:
        trainer = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, callbacks=[Clock()])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], ends, {}


def in_fp32(args) -> bool:
    import torch

    from model.generate import emulates_bf16

    return args.fp32 or (not torch.cuda.is_available() and emulates_bf16(torch.device("cpu")))


def matmul_rate(args) -> dict:
    """The best of some large matrix products, in TFLOP/s."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, best = 8192 if device.type == "cuda" else 3072, float("inf")
    dtype = torch.float32 if in_fp32(args) else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(12):
        finish(device)
        begin = time.perf_counter()
        a @ b
        finish(device)
        best = min(best, time.perf_counter() - begin)
    return {"tflops": round(2 * size**3 / best / 1e12, 4)}


def finish(device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_gib(device) -> float:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
