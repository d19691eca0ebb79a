"""DPO on a pretrained model: python benchmarks/corrections.py RUN_DIR OUT.jsonl [--max-new-tokens 256]

Writes feedback as if the answers in the data of a run were corrections of the replies that its best/ gives to the same
questions. What is trained on it: train.py preference --model RUN_DIR/best --dataset OUT.jsonl --val-dataset
RUN_DIR/data/val.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data.encode import control_tokens
from data.template import generation_prompt
from model.generate import generate_ids, load_for_generation, split_reply
from tools.shared.runs import read_side

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--max-new-tokens", type=int, default=256)
args = parser.parse_args()
model, tokenizer = load_for_generation(args.run / "best", torch.device("cpu"))
torch.manual_seed(0)
rows, ends = read_side(args.run, "train"), model.generation_config.eos_token_id
ends = ends if isinstance(ends, list) else [ends]
with args.out.open("w", encoding="utf-8") as file:
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        prompts = [generation_prompt(row.messages[:-1], tokenizer) for row in some]
        found = generate_ids(
            model, tokenizer, prompts, args.max_new_tokens, do_sample=True, temperature=0.6, top_p=0.95
        )
        for row, prompt, (_, ids) in zip(some, prompts, found, strict=True):
            reply, true = split_reply(ids, tokenizer, ends, prompt), row.messages[-1]
            # What is not one block of thinking and an answer is all answer, without the tokens that it may not have.
            is_whole = (
                reply.closed and reply.answer and not control_tokens(tokenizer).search(reply.think + reply.answer)
            )
            whole = control_tokens(tokenizer).sub("", tokenizer.decode(ids)).strip()
            think, answer = (reply.think, reply.answer) if is_whole else ("", whole)
            if answer:
                said = {"role": "assistant", "content": answer} | ({"reasoning_content": think} if think else {})
                correction = {name: true[name] for name in ("content", "reasoning_content") if name in true}
                line = {"id": row.location, "messages": [*row.messages[:-1], said], "verdict": "edit"}
                file.write(json.dumps({**line, "correction": correction}, ensure_ascii=False) + "\n")
        print(f"{min(start + 16, len(rows))} of {len(rows)} questions", flush=True)
