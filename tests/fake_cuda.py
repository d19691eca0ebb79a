"""Steps of the product on a CUDA device that is not there: python tests/fake_cuda.py '[{"memory": "32g"}, ...]'

Tensors are fake: they have a shape, a type and the device `cuda`, and no bytes. So the code takes the paths that it
takes on a GPU, at the true size of a model, and every storage, launch and wait can be counted. What is not seen: time,
the allocator's fragments, workspaces inside of kernels, and Triton's code (a compiled layer keeps for the backward
what inductor's partitioner decides, and its graph then runs operator by operator). Prints a line of JSON for each case.
"""

import ctypes
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
SHAPES = {
    "0.6b": dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=3072),
    "1.7b": dict(hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, intermediate_size=6144),
    "4b": dict(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, intermediate_size=9728),
    "8b": dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12288),
    "14b": dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=17408),
}
# Qwen3.5, whose layers are of two kinds.
RECURRENT = {
    "3.5-0.8b": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
                     intermediate_size=3584, linear_num_value_heads=16),
    "3.5-2b": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
                   intermediate_size=6144, linear_num_value_heads=16),
    "3.5-4b": dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4,
                   intermediate_size=9216, linear_num_value_heads=32),
    "3.5-9b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4,
                   intermediate_size=12288, linear_num_value_heads=32),
}  # fmt: skip
COMMON = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, eos_token_id=1)


def load_device() -> None:
    """Builds fake_cuda.cpp and loads it before torch, which asks only once whether there is CUDA."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", str(HERE / "fake_cuda.cpp"), "-o", str(library)]
        command += [f"-I{torch}/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True)
        ctypes.CDLL(str(torch / "lib/libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


if __name__ == "__main__":
    load_device()
    sys.path[:0] = [str(HERE.parent)]

import torch  # noqa: E402
from functorch.compile import make_boxed_func  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._guards import TracingContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from data.batches import make_batch  # noqa: E402
from data.encode import Example  # noqa: E402
from loop.config import Resolved  # noqa: E402

aten = torch.ops.aten
VIEWS = (aten.detach.default, aten._unsafe_view.default, aten.lift_fresh.default)
# What torch.cuda says of the device.
ANSWERS = dict(
    is_available=lambda: True,
    is_initialized=lambda: True,
    is_bf16_supported=lambda *_, **__: True,
    get_device_capability=lambda *_: (9, 0),
    device_count=lambda: 1,
    current_device=lambda: 0,
    set_device=lambda *_: None,
    get_rng_state=lambda *_: torch.get_rng_state(),
    set_rng_state=lambda *_: None,
)


class HostGenerator(torch.Generator):
    """In the place of one of the device, whose numbers nobody draws."""

    def __new__(cls, device=None):
        return super().__new__(cls)


class Recorder(TorchDispatchMode):
    """Bytes of live storages on the device and their peak, launches by name, waits, and what makes float64."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        self.launches, self.waits, self.float64 = Counter(), [], []

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or nothing is compiled under it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        # On CUDA the engine adds gradients up in place; of fake tensors, which are subclasses, it makes new ones.
        if in_backward and func is aten.add.Tensor and args[0].shape == getattr(args[1], "shape", None):
            func = aten.add_.Tensor
        out = func(*args, **(kwargs or {}))
        if TracingContext.try_get():  # a layer is compiled; nothing runs
            return out
        tensors = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        if on_device and not func.is_view and func not in VIEWS:
            self.launches[str(func)] += 1
        if any(tensor.dtype == torch.float64 for tensor in on_device):
            self.float64.append(str(func))
        if len(on_device) < len(tensors) and any(
            isinstance(arg, torch.Tensor) and arg.device.type == "cuda" for arg in tree_leaves(args)
        ):
            self.waits.append(str(func))
        for tensor in on_device:
            self.track(tensor.untyped_storage())
        return out

    def track(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, storage._cdata)

    def freed(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def tolist(self, tensor: torch.Tensor) -> list[float]:
        """In the place of Tensor.tolist, which waits for the device once, whatever the number of its values."""
        self.waits.append("tolist")
        return [0.0] * tensor.numel()

    def begin(self) -> None:
        self.peak = self.now
        self.launches.clear()
        self.waits.clear()
        self.float64.clear()


def run_graph(graph, _):
    return make_boxed_func(graph.forward)


# Layers keep for the backward what inductor decides; their graphs run operator by operator.
PARTITIONED = aot_autograd(
    fw_compiler=run_graph,
    bw_compiler=run_graph,
    partition_fn=min_cut_rematerialization_partition,
    decompositions=select_decomp_table(),
)


def measure(
    shape: str,
    lengths: list[int],
    memory: str,
    compile: bool = False,
    tied: bool = True,
    layers: int = 0,
    layer_types=None,
    **settings,
) -> dict:
    """The second of two steps over rows of these lengths, and what loop/start/memory.py predicts of it."""
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3Config

    import loop.start.memory
    from loop.distributed import make_accelerator, prepare, to_device
    from loop.reference import copy_of
    from loop.start.step_file import load_step_file
    from model.attention import PACKED
    from model.lora import add_lora
    from model.loss import Reference, SFTModel
    from model.recurrent import replace_recurrent_layers

    torch._dynamo.reset()
    optim = loop.start.memory.PROFILES[memory].optim
    config = Resolved(memory=memory, optim=optim, compile="on" if compile else "off", **settings)
    accelerator, method = make_accelerator(config), load_step_file(config.step_file)
    if shape in RECURRENT:
        replace_recurrent_layers()
        sizes = (
            RECURRENT[shape]
            | ({"num_hidden_layers": layers} if layers else {})
            | ({"layer_types": layer_types} if layer_types else {})
        )
        shaped = Qwen3_5TextConfig(**sizes, tie_word_embeddings=tied, eos_token_id=1)
    else:
        shaped = Qwen3Config(**SHAPES[shape], **COMMON, tie_word_embeddings=tied)
        shaped.num_hidden_layers = layers or shaped.num_hidden_layers
    with torch.device("meta"):
        meta_lm = AutoModelForCausalLM.from_config(shaped)
    if config.lora_rank:
        add_lora(meta_lm, config.lora_rank, "", config.frozen)
    plan = loop.start.memory.plan_all(config, meta_lm, lengths, accelerator.device, 1, [memory])[memory]
    profile = plan.profile
    rows = [Example(torch.zeros(length, dtype=torch.int64), 68, length // 2, "") for length in lengths]
    if method.REFERENCE == "losses":
        rows = [dataclasses.replace(row, reference=torch.zeros(row.num_targets)) for row in rows]
    units = len(rows)
    if method.PREFERENCE == "pairs":
        units //= 2
        rows = [dataclasses.replace(row, label=1 - 2 * (n % 2), unit=n // 2) for n, row in enumerate(rows)]
    elif method.PREFERENCE:
        pairs = [(n, row, label) for n, row in enumerate(rows) for label in (1 - 2 * (n % 2), 0)]
        rows = [dataclasses.replace(row, label=label, unit=n) for n, row, label in pairs]
    batch = make_batch(rows, units, batch_size=1, micro_batch_tokens=profile.micro_batch_tokens)
    rows_of_first = batch.micro_batches[0].inputs["cu_seqlens"].diff().tolist()
    recorder = Recorder()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        recorder,
        mock.patch.object(FakeTensor, "tolist", lambda t: recorder.tolist(t)),
        mock.patch("loop.state.FakeTensor", Recorder),  # the step waits as on a device that is there
        mock.patch("model.recurrent.lengths_of", lambda _: rows_of_first),  # no tensor has values
    ):
        with accelerator.device:
            causal_lm = AutoModelForCausalLM.from_config(shaped, attn_implementation=PACKED, dtype=profile.weights)
            if config.lora_rank:
                add_lora(causal_lm, config.lora_rank, "", config.frozen)
        if profile.gradient_checkpointing:
            causal_lm.gradient_checkpointing_enable()
        for layer in causal_lm.model.layers if compile else ():
            layer.compile(dynamic=True, backend=PARTITIONED)
        model = SFTModel(causal_lm.train(), profile.loss_chunk)
        model, optimizers = prepare(accelerator, model, method.make_optimizers(model, config))
        if method.REFERENCE == "logits":
            model.reference = (Reference(causal_lm) if config.lora_rank else copy_of(causal_lm, config),)
        for _ in range(2):
            recorder.begin()
            method.train_step(model, optimizers, to_device(batch, accelerator.device), accelerator, 1.0, config)
    return {
        "peak": recorder.peak,
        "kept": recorder.now,
        "predicted": plan.tensors,
        "micro_batches": len(batch.micro_batches),
        "launches": sum(recorder.launches.values()),
        "waits": recorder.waits,
        "float64": recorder.float64,
    }


def main(cases: list[dict]) -> None:
    with (
        mock.patch.multiple(torch.cuda, **ANSWERS),
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(torch, "Generator", HostGenerator),
        mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module),  # all is made where it belongs
    ):
        for case in cases:
            print(json.dumps(case | measure(**case)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
