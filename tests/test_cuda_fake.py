"""The step on CUDA at the true size of Qwen3, on a device that is not there: see fake_cuda.py."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

LENGTHS = [2048, 1100, 800, 702]
FULL = [2048] * 4
# The most operators that one micro-batch and the update may launch.
LAUNCHES = {"speed": 6_700, "32g": 8_600, "24g": 9_200, "16g": 9_200}
CASES = {
    "speed": [
        {"memory": "speed", "lengths": LENGTHS},
        {"memory": "speed", "lengths": LENGTHS, "compile": True},
        {"memory": "speed", "lengths": LENGTHS, "lora_rank": 16, "layers": 7},
        {"memory": "24g", "lengths": LENGTHS, "step_file": "recipes/sam.py", "layers": 7},
        {"memory": "16g", "lengths": LENGTHS, "step_file": "recipes/ema.py", "layers": 7},
    ],
    "small cards": [
        {"memory": "24g", "lengths": LENGTHS, "shape": "8b", "tied": False, "lora_rank": 16, "frozen": "nf4"},
        {"memory": "24g", "lengths": LENGTHS, "shape": "14b", "tied": False, "lora_rank": 16, "frozen": "nf4"},
        {"memory": "speed", "lengths": LENGTHS, "lora_rank": 16, "frozen": "nf4", "compile": True, "layers": 7},
        {"memory": "32g", "lengths": LENGTHS},
        {"memory": "24g", "lengths": LENGTHS},
        {"memory": "16g", "lengths": FULL, "micro_batch_tokens": 4096},
        {"memory": "32g", "lengths": LENGTHS, "shape": "4b", "tied": False, "layers": 7},
        {"memory": "32g", "lengths": LENGTHS, "step_file": "recipes/kl.py", "lora_rank": 16, "layers": 7},
    ],
}
SHORT = [768, 576, 448, 256]
CASES["recurrent"] = [
    {"memory": "speed", "lengths": SHORT, "shape": "3.5-0.8b", "layers": 4},
    {"memory": "32g", "lengths": SHORT, "shape": "3.5-9b", "layers": 4},
    {"memory": "24g", "lengths": SHORT, "shape": "3.5-4b", "layers": 4, "lora_rank": 16},
]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
IN_FP32 = ("l2sp", "muon", "sam", "schedule_free")  # with 16g they are refused by name


needs_device = pytest.mark.skipif(
    not shutil.which("g++") or torch.version.cuda is not None, reason="needs g++, and a torch without CUDA's own device"
)


@needs_device
@pytest.mark.parametrize(
    "group", ["speed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("small cards", "recurrent"))]
)
def test_the_memory_of_a_step_is_what_is_predicted(group):
    """Within 5 %, at the true size, and with fewer layers for what is beside it; the host waits for the device once;
    nothing is float64 there; few launches."""
    check(CASES[group])


@pytest.mark.slow
@needs_device
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_memory_of_each_recipe_is_what_is_predicted_with_each_profile(recipe):
    profiles = [name for name in ("speed", "32g", "24g", "16g") if name != "16g" or recipe not in IN_FP32]
    check([{"memory": name, "lengths": LENGTHS, "step_file": f"recipes/{recipe}.py"} for name in profiles])


def check(cases: list[dict]) -> None:
    cases = [{"shape": "1.7b", **case} for case in cases]
    command = [sys.executable, str(ROOT / "tests/fake_cuda.py"), json.dumps(cases)]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        assert result["predicted"] == pytest.approx(result["peak"], rel=0.05), case
        assert result["waits"] == ["tolist"] and not result["float64"], case
        if case["shape"] == "1.7b" and not {"compile", "lora_rank", "step_file"} & case.keys():
            assert result["launches"] / result["micro_batches"] <= LAUNCHES[case["memory"]], case
        assert result["micro_batches"] == (2 if "micro_batch_tokens" in case else 1)
