"""Imported once by the process that ranks are forked from: fills caches that each of them would fill again
(transformers' table of weight conversions, compiled templates), a second or two of every run."""

import dataclasses
import gc
import tempfile
from pathlib import Path

import small  # noqa: F401
import torch

from data.encoded import encode_all
from data.reading.rows import Row
from loop.config import PRESETS, Resolved
from loop.start.trial import try_step
from model.export import TEMPLATES, export
from model.qwen3 import load_model
from model.tiny import tiny_tokenizer
from tools.reports.pages import TEMPLATES as REPORTS

torch.set_num_threads(1)
tokenizer = tiny_tokenizer(["热"])
tokenizer.apply_chat_template([{"role": "user", "content": "热"}], tokenize=False)
model = load_model("tiny", tokenizer, gradient_checkpointing=False)
if torch.version.cuda is None:  # the others allow no backward in a process that will fork
    try_step(model, Resolved(**dataclasses.asdict(PRESETS["tiny"])), torch.float32)
turns = [{"role": "user", "content": "热"}, {"role": "assistant", "content": "热"}]
encode_all([Row("", {}, turns)], tokenizer, 64, "error")
with tempfile.TemporaryDirectory() as folder:
    export(model, model.state_dict(), tokenizer, Path(folder) / "model")
for templates, names in ((TEMPLATES, ("card.zh.md", "Modelfile")), (REPORTS, ("zh.md",))):
    for name in names:
        templates.get_template(name)
# What a fork only reads stays shared: a collection in it would write to every object, and copy every page.
gc.collect()
gc.freeze()
