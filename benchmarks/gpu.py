"""Everything that only a GPU can tell, in about ten minutes; results are appended to --out part by part.

    python benchmarks/gpu.py                 # CUDA: the shape of Qwen3-1.7B, random weights
    python benchmarks/gpu.py --shape small   # proves the script on a CPU

Correct first (attention, resume; the losses of the contest must agree), then fast. pip install -e ".[bench,lowmem]"
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from loop.start.environment import set_before_torch  # noqa: E402

CARDS = {"32g": 31.0, "24g": 23.0, "16g": 15.0}  # GiB that such a card has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.7b")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a contestant")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        set_before_torch()
        print(json.dumps(PARTS[args.worker](args)))
        return
    for name in args.parts:  # in a process each, so that a part that fails takes no other with it
        begin = time.perf_counter()
        own = [sys.executable, __file__, "--shape", args.shape, "--worker", name]
        own += ["--out", str(args.out), "--steps", str(args.steps), "--warmup", str(args.warmup)]
        done = subprocess.run(own, capture_output=True, text=True)
        try:
            result = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            result = {"error": done.stderr[-1500:]}
        result = {"part": name, "seconds": round(time.perf_counter() - begin, 1), **result}
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result, indent=1), flush=True)


def attention(args) -> dict:
    """The product's attention in bf16 against fp32, row by row: largest error of output and gradients, as a share of
    the largest value. bf16 itself rounds by 0.4 %."""
    import torch

    from model.attention import attend_row_by_row, packed_attention

    device = the_device()
    torch.manual_seed(0)
    lengths = torch.tensor([0, 700, 1500, 1513, 2400], dtype=torch.int32, device=device)
    shapes = [(1, heads, 2400, 128) for heads in (16, 8, 8)]
    exact = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    wanted = attend_row_by_row(*exact, lengths, 128**-0.5, 0.0)
    found, _ = packed_attention(None, *half, None, scaling=128**-0.5, cu_seqlens=lengths, max_seqlen=900)
    direction = torch.randn_like(wanted)
    (wanted * direction).sum().backward()
    (found.float() * direction).sum().backward()
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(half, exact, strict=True))]
    errors = [((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    return dict(zip(("output", "query", "key", "value"), errors, strict=True))


def resume(args) -> dict:
    """Whether a run that was stopped and went on ends with the bits of one that was not, and how far apart they are."""
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        flags = ["tiny", "--mixed-precision", "bf16", "--swanlab-mode", "disabled", "--num-samples", "0"]
        flags += ["--max-steps", "60", "--eval-steps", "60", "--save-steps", "20", "--resume", "--output-dir"]
        whole, again, parts = (Path(folder, name) for name in ("whole", "again", "parts"))
        for out in (whole, again):
            train([*flags, str(out)])
        train([*flags, str(parts)], until=parts / "checkpoints/step-00000020")
        stopped = json.loads((parts / "run_status.json").read_text())["status"]
        train([*flags, str(parts)])
        files = [out / "best/model.safetensors" for out in (whole, again, parts)]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        first, *others = (load_file(file) for file in files)
        apart = [max((first[n].float() - other[n].float()).abs().max().item() for n in first) for other in others]
    return {
        "first launch": stopped,
        "two runs equal": digests[0] == digests[1],
        "resumed equal": digests[0] == digests[2],
        "two runs apart": apart[0],
        "resumed apart": apart[1],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def contest(args, rows: int, only: list[str], steps: int, *more: str) -> dict:
    out = args.out.with_name(f"{args.out.stem}-compare.jsonl")
    command = [sys.executable, str(HERE / "compare.py"), "--shape", args.shape, "--rows", str(rows), "--rounds", "1"]
    command += ["--steps", str(steps), "--warmup", str(args.warmup), "--out", str(out), "--only", *only, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"table": done.stdout.splitlines(), **({"error": done.stderr[-800:]} if done.returncode else {})}


def four_rows(args) -> dict:
    return contest(args, 4, ["ours", "ours eager", "ours 32g", "recipe", "trainer", "trl"], args.steps)


def sixteen_rows(args) -> dict:
    return contest(args, 16, ["ours", "trl"], max(3, args.steps // 4))


def memory(args) -> dict:
    """Each profile in the memory of its card: tokens/s, and the peak beside what is predicted."""
    capped = the_device().type == "cuda"
    runs = {
        card: contest(args, 4, [f"ours {card}"], max(3, args.steps // 4), *(["--cap", str(cap)] if capped else []))
        for card, cap in CARDS.items()
    }
    return {card: run["table"] for card, run in runs.items()}


def sampling(args) -> dict:
    """Seconds a token of three answers by a model in training: weights cast once, and for each token."""
    import torch
    from compare import SHAPES
    from transformers import AutoModelForCausalLM, Qwen3Config

    from model.attention import PACKED
    from model.generate import ready_to_generate

    device = the_device()
    with device:
        config = Qwen3Config(**SHAPES[args.shape], tie_word_embeddings=True, eos_token_id=None, pad_token_id=0)
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.float32)
    prompt, number = torch.randint(100, (3, 64), device=device), 64 if device.type == "cuda" else 4
    found = {}
    for name, in_bf16 in (("cast for each token", False), ("cast once", True)) * 2:
        with ready_to_generate(causal_lm, in_bf16), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            begin = time.perf_counter()
            causal_lm.generate(prompt, max_new_tokens=number, min_new_tokens=number, do_sample=False)
            found[name] = round((time.perf_counter() - begin) / number, 5)
    return found


def checkpoint(args) -> dict:
    done = subprocess.run([sys.executable, str(HERE / "checkpoint.py")], capture_output=True, text=True)
    return {"lines": done.stdout.splitlines(), **({"error": done.stderr[-800:]} if done.returncode else {})}


def families(args) -> dict:
    """Losses of other families and of 4 bits on the device, in bf16. Each start asks whether rows reach each other, and
    the run ends if they do."""
    kinds = {"qwen3": [], "qwen3.5": ["--model", "tiny-qwen3.5"]}
    kinds |= {"lora": ["--lora-rank", "8"], "nf4": ["--lora-rank", "8", "--frozen", "nf4"]}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, own in kinds.items():
            flags = ["tiny", "--mixed-precision", "bf16", "--swanlab-mode", "disabled", "--num-samples", "0"]
            flags += ["--max-steps", "20", "--eval-steps", "20", "--output-dir", f"{folder}/{name}", *own]
            train(flags)
            rows = map(json.loads, Path(folder, name, "metrics.jsonl").read_text().splitlines())
            found[name] = [round(row["eval/loss"], 4) for row in rows if "eval/loss" in row]
    return found


PARTS = {
    "attention": attention,
    "resume": resume,
    "four_rows": four_rows,
    "memory": memory,
    "sixteen_rows": sixteen_rows,
    "sampling": sampling,
    "checkpoint": checkpoint,
    "families": families,
}


def the_device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(flags: list[str], until: Path | None = None) -> None:
    """train.py with these flags; until: a folder, at whose sight the run is asked to stop."""
    command = [sys.executable, str(HERE.parent / "train.py"), *flags]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while until and not until.exists() and run.poll() is None:
        time.sleep(0.02)
    if until:
        run.terminate()
    _, errors = run.communicate()
    if run.returncode:
        raise SystemExit(errors[-800:])


if __name__ == "__main__":
    main()
