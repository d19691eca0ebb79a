"""What the thinking is worth, and an exam at evaluations: against plain transformers, alike on ranks."""

import json

import pytest
import torch
from conftest import good_row
from ranks import run
from runs import curve
from transformers import AutoModelForCausalLM

from data.reading.exam import read_exam
from model.qwen3 import load_tokenizer
from tools.exam import take_exam

EXAM = ",Question,A,B,C,D,Answer\n" + "".join(f"{i},第{i}项是什么,对{i},错{i},误{i},非{i},A\n" for i in range(9))
PROBE = ("own", "none", "other")


@pytest.fixture(scope="module")
def probed(small_folder, tmp_path_factory):
    """strategy -> rows of metrics of a run with both; some validation rows do not think, one has two turns."""
    folder = tmp_path_factory.mktemp("probes")
    (folder / "exam.csv").write_text(EXAM, encoding="utf-8")
    first, second = good_row(91), good_row(92)
    turns = [
        {"role": "user", "content": first["question"]},
        {"role": "assistant", "content": first["answer"], "reasoning_content": first["think"]},
        {"role": "user", "content": second["question"]},
        {"role": "assistant", "content": second["answer"], "reasoning_content": second["think"]},
    ]
    rows = {"train": [good_row(i) for i in range(12)] + [{"question": "第3项是什么", "answer": "对3"}]}
    rows["val"] = [good_row(i) for i in range(80, 85)] + [{**good_row(90), "think": ""}, {"messages": turns}]
    for name, side in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side))
    found = {}

    def metrics(strategy: str) -> list[dict]:
        if strategy not in found:
            args = ["tiny", "--model", small_folder, "--dataset", folder / "train.jsonl", "--system-prompt", ""]
            args += ["--val-dataset", folder / "val.jsonl", "--think-probe", "--exam", folder / "exam.csv"]
            args += ["--max-steps", 4, "--eval-steps", 1, "--exam-steps", 2, "--num-samples", 0, "--save-steps", 99]
            if strategy != "one":
                args += ["--gradient-accumulation-steps", 2]
            out = folder / strategy
            done = run([*args, "--output-dir", out], strategy, log=folder / "log")
            assert set(done.codes) == {0}, done.output
            assert "1 rows left out, because --exclude or --exam holds them" in done.output
            found[strategy] = [row for row in curve(out) if "eval/loss" in row]
        return found[strategy]

    metrics.folder = folder
    return metrics


def answer_loss(model, tokenizer, messages: list[dict], thinking: str | None) -> tuple[float, int]:
    """(sum over the answer's tokens, their number), one row at a time, through transformers' own attention."""
    *before, reply = messages
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    prompt += f"<think>\n{thinking.strip()}\n</think>\n\n" if thinking else "<think>\n\n</think>\n\n"
    begin, ids = (tokenizer(text, add_special_tokens=False)["input_ids"]
                  for text in (prompt, prompt + reply["content"] + "<|im_end|>"))  # fmt: skip
    assert ids[: len(begin)] == begin
    losses = -model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(losses[i - 1, ids[i]].item() for i in range(len(begin), len(ids))), len(ids) - len(begin)


def test_the_probe_is_what_transformers_computes(probed, small_folder):
    """At step 0, when the model is that of the folder."""
    row, *_ = probed("one")
    model = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = load_tokenizer(str(small_folder))
    dialogues = []
    for line in (probed.folder / "one/data/val_format.jsonl").read_text(encoding="utf-8").splitlines():
        shown = json.loads(line)
        thinking, answer = shown["output"].removeprefix("<think>\n").split("\n</think>\n\n")
        before = []
        for question, reply in shown.get("history", []):
            before += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        turn = [{"role": "user", "content": shown["input"]}, {"content": answer}]
        dialogues.append(([*before, *turn], thinking))
    dialogues = [(messages, thinking) for messages, thinking in dialogues if thinking]
    assert len(dialogues) == 7
    firsts = [messages[0]["content"] for messages, _ in dialogues]  # a row's two turns begin alike
    others = [
        next(dialogues[(i + k) % 7][1] for k in range(1, 7) if firsts[(i + k) % 7] != firsts[i]) for i in range(7)
    ]
    assert len(set(firsts)) == 6
    for name, given in {"own": [t for _, t in dialogues], "none": [None] * 7, "other": others}.items():
        pairs = [answer_loss(model, tokenizer, messages, thinking)
                 for (messages, _), thinking in zip(dialogues, given, strict=True)]  # fmt: skip
        sums, counts = zip(*pairs, strict=True)
        assert row[f"think_probe/{name}"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5), name
    assert row["think_probe/own"] != pytest.approx(row["eval/answer_loss"], rel=1e-6)  # one row does not think


def test_the_exam_of_a_run_is_that_of_the_tool(probed, small_folder):
    rows = probed("one")
    assert [row["step"] for row in rows if "exam/accuracy" in row] == [0, 2, 4]
    questions = read_exam([str(probed.folder / "exam.csv")]).questions
    right = take_exam(str(small_folder), questions, "", {})
    assert rows[0]["exam/accuracy"] == sum(right) / 9


@pytest.mark.parametrize("strategy", ["ddp2", "fsdp2"])
def test_ranks_measure_the_same(probed, strategy):
    for ours, theirs in zip(probed("one"), probed(strategy), strict=True):
        names = [name for name in ours if name.startswith(("think_probe", "exam", "eval/"))]
        assert len([name for name in names if name.startswith("think_probe")]) == 3
        for name in names:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exam", "none.csv"], "there is no dataset file 'none.csv'"),
        (["--exam", "{folder}/train.jsonl"], "has no question with choices and one right answer"),
        (["--exam", "{folder}/exam.csv", "--exam-steps", "15"], "exam_steps must be a multiple of eval_steps 30"),
    ],
)
def test_an_exam_that_cannot_be_taken_is_refused(probed, tmp_path, arguments, message):
    probed("one")
    args = [argument.format(folder=probed.folder) for argument in arguments]
    done = run(["tiny", *args, "--output-dir", tmp_path / "out"], log=tmp_path / "log")
    assert done.codes != [0] and message in done.output and "Traceback" not in done.output
    assert not (tmp_path / "out/best").exists()
