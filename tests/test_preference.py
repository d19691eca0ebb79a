"""Replies that are compared: read, put together, trained as plain PyTorch would, and measured."""

import contextlib
import copy
import dataclasses
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, peaks, settings
from ranks import run
from runs import assert_same_end, metrics_of

from data.batches import make_batch
from data.compared import encode_compared, units_of
from data.reading.feedback import take_feedback
from data.reading.preference import read_rated
from data.reading.rows import Row
from loop.evaluate import Scored
from loop.preference import held_out
from loop.start.step_file import load_step_file

USER, GOOD, BAD = {"role": "user", "content": "头晕？"}, "先量血压。", "多喝水。"
SAID = [{"role": "assistant", "content": text} for text in (GOOD, BAD)]
PAIRS = {
    "TRL": {"prompt": "头晕？", "chosen": GOOD, "rejected": BAD},
    "TRL, messages": {"prompt": [USER], "chosen": SAID[:1], "rejected": SAID[1:]},
    "whole dialogues": {"chosen": [USER, SAID[0]], "rejected": [USER, SAID[1]]},
    "UltraFeedback": {"prompt": "头晕？", "chosen": [USER, SAID[0]], "rejected": [USER, SAID[1]],
                      "messages": [USER, SAID[0]], "score_chosen": 8.0},
    "LLaMA-Factory": {"conversations": [{"from": "human", "value": "头晕？"}],
                      "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
    "alpaca": {"instruction": "头晕？", "input": "", "chosen": GOOD, "rejected": BAD},
    "ms-swift": {"messages": [USER, SAID[0]], "rejected_response": BAD},
    "OpenAI": {"input": {"messages": [USER]}, "preferred_output": SAID[:1], "non_preferred_output": SAID[1:]},
    "HH-RLHF": {"chosen": f"\n\nHuman: 头晕？\n\nAssistant: {GOOD}",
                "rejected": f"\n\nHuman: 头晕？\n\nAssistant: {BAD}"},
    "a prompt with its speaker": {"prompt": "\n\nHuman: 头晕？\n\nAssistant:", "chosen": GOOD, "rejected": BAD},
    "with scores": {"question": "头晕？", "chosen": {"text": GOOD, "score": 9}, "rejected": {"text": BAD, "score": 1}},
    "a label of another kind": {"question": "头晕？", "label": "心内科", "chosen": GOOD, "rejected": BAD},
    "JSON in cells": {"prompt": json.dumps([USER]), "chosen": json.dumps(SAID[:1]), "rejected": json.dumps(SAID[1:])},
}  # fmt: skip
THUMBS = {
    "TRL": {"prompt": [USER], "completion": SAID[:1], "label": True},
    "LLaMA-Factory": {"instruction": "头晕？", "output": GOOD, "kto_tag": "true"},
    "ms-swift": {"messages": [USER, SAID[0]], "label": 1},
    "CSV": {"问题": "头晕？", "回答": GOOD, "标签": "赞"},
}
REFUSED = {
    "rejected is empty": ({**PAIRS["TRL"], "rejected": " "}, "pairs", "`rejected` is empty"),
    "the same": ({**PAIRS["TRL"], "rejected": GOOD}, "pairs", "the same"),
    "other prompts": ({"chosen": [USER, SAID[0]], "rejected": [{**USER, "content": "咳嗽？"}, SAID[1]]}, "pairs",
                      "different prompts"),
    "another prompt beside them": ({**PAIRS["whole dialogues"], "prompt": "咳嗽？"}, "pairs", "different prompts"),
    "ends with a question": ({"chosen": [USER, SAID[0], USER], "rejected": [USER, SAID[1]]}, "pairs",
                             "end with a reply"),
    "a thumb for pairs": (THUMBS["TRL"], "pairs", "recipes/kto.py"),
    "a label like no other": ({**THUMBS["TRL"], "label": "一般"}, "thumbs", "一般"),
    "a dialogue alone": ({"messages": [USER, SAID[0]]}, "pairs", "compares no replies"),
    "thinking that never ends": ({**PAIRS["TRL"], "rejected": "<think>\n想"}, "pairs", "rejected: has <think> without"),
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_are_read_in_the_forms_that_people_keep(form):
    for kind in ("pairs", "thumbs"):
        dialogue, replies = read_rated(PAIRS[form], kind, "")
        assert [(m["role"], m["content"]) for m in dialogue.messages] == [("user", "头晕？"), ("assistant", GOOD)]
        assert replies == [(SAID[0], True), (SAID[1], False)]


@pytest.mark.parametrize("form", THUMBS)
def test_thumbs_are_read_in_the_forms_that_people_keep(form):
    dialogue, replies = read_rated(THUMBS[form], "thumbs", "")
    assert dialogue.messages == [{"role": "user", "content": "头晕？"}, SAID[0]] and replies == [(SAID[0], True)]


@pytest.mark.parametrize("case", REFUSED)
def test_what_compares_nothing_is_named(case):
    columns, kind, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        read_rated(columns, kind, "")


PARTS = (
    None, "", 5, 1.5, True, [], {}, "头晕？", "[1]", "{", '[{"role": "user"}]', ["a", "b"], [1], [[]], {"a": 1}, USER,
    {"role": None}, SAID[0], [USER, SAID[0]], SAID[:1], {"content": "z", "label": True}, [{"label": 1}],
    [{"content": "z", "label": True}, {"content": "w", "label": False}], "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:",
)  # fmt: skip
NAMES = (
    "prompt", "chosen", "rejected", "messages", "conversations", "label", "replies", "completion", "question", "input",
    "system", "history", "context", "output", "think", "verdict", "correction", "rejected_response", "form", "rater",
)  # fmt: skip


def test_no_row_whatever_it_holds_is_more_than_a_reason():
    chance = random.Random(0)
    for _ in range(20_000):
        row = {name: chance.choice(PARTS) for name in chance.sample(NAMES, chance.randint(1, 6))}
        if chance.random() < 0.3:
            row["verdict"] = chance.choice(["like", "edit", "a", "both_good", "x"])
        for kind in ("pairs", "thumbs"):
            rows, _ = take_feedback([("f:1", row), ("f:2", dict(row))], False, kind)
            for _, columns in rows:
                with contextlib.suppress(ValueError):
                    read_rated(columns, kind, "系统")


def test_thinking_is_part_of_a_reply_and_earlier_turns_are_of_the_prompt():
    first = [USER, {"role": "assistant", "content": "多久了？"}, {"role": "user", "content": "一周。"}]
    row = {"prompt": first, "chosen": f"<think>\n想。\n</think>\n\n{GOOD}",
           "rejected": {"role": "assistant", "content": BAD, "reasoning_content": "想错。"}}  # fmt: skip
    dialogue, replies = read_rated(row, "pairs", "系统")
    assert [m["role"] for m in dialogue.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert dialogue.messages[2]["loss"] is False and "loss" not in dialogue.messages[-1]
    assert [reply.get("reasoning_content") for reply, _ in replies] == ["想。", "想错。"]


def test_what_each_line_of_feedback_compares():
    think = {"role": "assistant", "content": BAD, "reasoning_content": "想。"}
    lines = [
        {"id": "a", "messages": [USER, think], "verdict": "edit", "correction": {"content": GOOD}},
        {"id": "b", "messages": [USER, think], "verdict": "like"},
        {"id": "c", "messages": [USER, think], "verdict": "dislike"},
        {"id": "d", "messages": [USER], "replies": [*SAID], "verdict": "b"},
        {"id": "e", "messages": [{**USER, "content": "晕？"}], "replies": [*SAID], "verdict": "both_bad"},
        {"id": "f", "messages": [USER, think], "verdict": "withdrawn"},
        {"id": "i", "messages": [USER, SAID[1]], "verdict": "withdrawn", "correction": {"content": GOOD}},
        {"id": "g", "messages": [USER, think], "verdict": "edit", "correction": {"content": BAD}},
        {"id": "h", "messages": [USER], "replies": [*SAID], "verdict": "c"},
    ]
    corrected, bad = {"role": "assistant", "content": GOOD, "reasoning_content": "想。"}, [(think, False)]
    expected = {
        "pairs": {"a": [(corrected, True), *bad], "i": [(SAID[0], True), (SAID[1], False)],
                  "d": [(SAID[1], True), (SAID[0], False)]},
        # A correction of the answer alone has no thumb, which would be one for the old thinking, too.
        "thumbs": {"a": bad, "b": [(think, True)], "c": bad,
                   "d": [(SAID[0], False), (SAID[1], True)], "e": [(SAID[0], False), (SAID[1], False)],
                   "i": [(SAID[0], True), (SAID[1], False)]},
    }  # fmt: skip
    for kind, wanted in expected.items():
        rows, said = take_feedback([(line["id"], line) for line in lines], False, kind)
        (problem,) = [row for name, row in rows if name == "h"]
        assert "has the verdict 'c'" in problem
        found = {name: read_rated(row, kind, "")[1] for name, row in rows if name != "h"}
        assert found == wanted and said.others.total() == 8 - len(wanted)
    rows, said = take_feedback([(line["id"], line) for line in lines[3:5]], True)
    assert rows == [] and said.others == {"vote": 2}


def rows_of(number: int, prompts: int = 99) -> list[Row]:
    """Rows with a good and a bad reply, whose lengths differ."""
    rows = []
    for n in range(number):
        prompt = [
            {"role": "system", "content": "你是一个医学专家。"},
            {"role": "user", "content": f"第{n % prompts}个问题？"},
        ]
        good = {"role": "assistant", "content": f"第{n}个回答。" * (n % 3 + 1), "reasoning_content": f"先想第{n}步。"}
        bad = {
            "role": "assistant",
            "content": "多喝水，注意休息。" * (n % 2 + 1),
            "reasoning_content": "先想一步。" * (n % 4 + 1),
        }
        rows.append(Row(f"f:{n}", {}, [*prompt, good], replies=((good, True), (bad, False))))
    return rows


def test_kto_measures_each_reply_after_a_prompt_that_it_does_not_answer():
    """Wrong elsewhere: a reversed batch, whose middle row is its own; a batch of one, which has no other."""
    same = [dataclasses.replace(row, replies=row.replies[1:]) for row in rows_of(9)]  # many have one text
    for rows in (rows_of(2), rows_of(5), rows_of(9, prompts=2), same):
        units = units_of(rows, "thumbs")
        assert len(units) == sum(len(row.replies) for row in rows)
        for (reply, label), (other, measured) in units:
            assert label in (1, -1) and measured == 0 and reply.messages[:-1] == other.messages[:-1]
            assert reply.messages[-1] != other.messages[-1]
            source = [row for row in rows if other.messages[-1] in [one for one, _ in row.replies]]
            assert any(row.messages[-2] != other.messages[-2] for row in source)
    assert all(len(unit) == 1 for unit in units_of(rows_of(3, prompts=1), "thumbs"))  # there is no other prompt


@pytest.mark.parametrize(
    ("verdicts", "pairs", "thumbs"),
    [("aab", [True, False], [True, False]), ("ab", None, None), ("bgg", [False, True], [False, True]),
     ("gg", None, [True, True]), ("dab", None, [False, False])],
)  # fmt: skip
def test_several_votes_on_the_same_replies_are_what_most_say(verdicts, pairs, thumbs):
    """As votes of their own, some in training and some held out, they would cancel out."""
    names = {"g": "both_good", "d": "both_bad"}
    lines = [(str(n), {"id": f"v{n}", "rater": str(n), "messages": [USER], "replies": SAID, "verdict": names.get(v, v)})
             for n, v in enumerate(verdicts)]  # fmt: skip
    for kind, wanted in (("pairs", pairs), ("thumbs", thumbs)):
        rows, said = take_feedback(lines, False, kind)
        found = [[is_good for _, is_good in read_rated(row, kind, "")[1]] for _, row in rows]
        goods = [sorted(wanted, reverse=True)] if wanted and kind == "pairs" else [wanted] if wanted else []
        assert found == goods and said.together == len(verdicts) - 1


def test_answers_alone_are_compared_after_the_same_thinking(tokenizer):
    both, _ = encode_compared(rows_of(3), tokenizer, 512, "error", "pairs", answers_alone=False)
    alone, _ = encode_compared(rows_of(3), tokenizer, 512, "error", "pairs", answers_alone=True)
    for (good, bad), whole in zip(zip(alone[::2], alone[1::2], strict=True), both[::2], strict=True):
        assert good.input_ids.tolist() == whole.input_ids.tolist() and good.prompt_length == whole.answer_start
        assert good.num_think_targets == bad.num_think_targets == 0
        same = good.prompt_length
        assert bad.prompt_length == same and good.input_ids[:same].tolist() == bad.input_ids[:same].tolist()
    for row in both:  # thinking from its opening tag, and the end token, are targets of both sides
        text = tokenizer.decode(row.input_ids[row.prompt_length :])
        assert text.startswith("<think>") and text.endswith("<|im_end|>")


def test_a_pair_is_left_out_if_half_of_it_is_too_long(tokenizer):
    rows = rows_of(4)
    long = {"role": "assistant", "content": "长" * 200}
    rows[1] = dataclasses.replace(rows[1], replies=(rows[1].replies[0], (long, False)))
    encoded, problems = encode_compared(rows, tokenizer, 150, "truncate", "pairs", answers_alone=False)
    assert encoded.num_units == 3 and len(encoded) == 6 and encoded.labels == [1, -1] * 3
    assert [p["location"] for p in problems] == ["f:1 rejected", "f:1 chosen"]


# --- the gradient ---


def with_references(encoded, causal_lm) -> list:
    """Examples with the losses of their targets before training."""
    found = []
    for unit, places in enumerate(encoded.units):
        for place in places:
            row = encoded[place]
            with torch.no_grad():
                losses = losses_of(causal_lm, row)
            found.append(dataclasses.replace(row, unit=unit, reference=losses))
    return found


def losses_of(causal_lm, row) -> torch.Tensor:
    logits = causal_lm(input_ids=row.input_ids.long()[None]).logits[0, row.prompt_length - 1 : -1]
    return F.cross_entropy(logits, row.input_ids[row.prompt_length :].long(), reduction="none")


def plain_loss(name: str, causal_lm, rows, beta=0.1) -> torch.Tensor:
    """Of a batch, row by row over transformers' logits, written apart from the recipes."""
    ratio, length, ce = {}, {}, []
    for row in rows:
        losses = losses_of(causal_lm, row)
        ratio[row.unit, row.label] = (row.reference - losses).sum()
        length[row.unit, row.label] = len(losses)
        ce += [losses] if row.label == 1 else []
    units = sorted({unit for unit, _ in ratio})
    if name == "kto":
        kl = max(0.0, sum(ratio[unit, 0].item() for unit in units) / len(units))
        each = [1 - torch.sigmoid(beta * (ratio[u, 1] - kl)) if (u, 1) in ratio else
                1 - torch.sigmoid(beta * (kl - ratio[u, -1])) for u in units]  # fmt: skip
        return torch.stack(each).mean()
    if name == "ipo":  # means over the tokens of each reply
        each = [(ratio[u, 1] / length[u, 1] - ratio[u, -1] / length[u, -1] - 1 / (2 * beta)) ** 2 for u in units]
        return torch.stack(each).mean()
    each = torch.stack([-F.logsigmoid(beta * (ratio[u, 1] - ratio[u, -1])) for u in units])
    return each.mean() + (torch.cat(ce).mean() if name == "rpo" else 0)


SETTINGS = {"dpo": (), "ipo": ("IPO=True",), "rpo": ("RPO=1.0",), "kto": ()}
PACKINGS = ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 1, "micro_batch_tokens": 120})


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_is_that_of_the_loss_written_out(name, make_model, tokenizer, accelerator):
    method = load_step_file(str(ROOT / f"recipes/{'kto' if name == 'kto' else 'dpo'}.py"), SETTINGS[name])
    model = make_model()
    before = copy.deepcopy(model.causal_lm).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # it has been trained for a while
            parameter.add_(torch.randn_like(parameter) * 0.01)
    for lm in (before, plain := copy.deepcopy(model.causal_lm)):
        lm.set_attn_implementation("sdpa")
    encoded, _ = encode_compared(rows_of(5), tokenizer, 512, "error", method.PREFERENCE, answers_alone=False)
    rows = with_references(encoded, before)
    loss = plain_loss(name, plain, rows)
    wanted = dict(zip([n for n, _ in plain.named_parameters()],
                      torch.autograd.grad(loss, list(plain.parameters())), strict=True))  # fmt: skip
    scale = max(one.abs().max() for one in wanted.values())
    good = [row for row in rows if row.label == 1]
    for packing in PACKINGS:
        model.zero_grad()
        batch = make_batch(rows, len(encoded.units), **packing)
        sums = method.forward_backward(model, batch, accelerator, settings())
        for path, parameter in model.causal_lm.named_parameters():
            assert (parameter.grad - wanted[path]).abs().max() <= 1e-5 * scale, (packing, path)
        logged = {key: float(total) / count for key, total, count in batch.logged}
        extra = sum(losses_of(plain, row).sum() for row in good) / sum(row.num_targets for row in good)
        assert logged["preference_loss"] + (extra.item() if name == "rpo" else 0) == pytest.approx(
            loss.item(), rel=1e-5
        )
        # What is reported as the loss is the cross-entropy of the good replies, and nothing of the others.
        assert float(sums.sum()) / batch.num_targets == pytest.approx(extra.item(), rel=1e-5)
        assert batch.num_targets == sum(row.num_targets for row in good)


def test_kto_goes_on_with_a_single_reply_and_without_a_measured_one(make_model, tokenizer, accelerator):
    method = load_step_file(str(ROOT / "recipes/kto.py"))
    encoded, _ = encode_compared(rows_of(2), tokenizer, 512, "error", "thumbs", answers_alone=False)
    model = make_model()
    before = copy.deepcopy(model.causal_lm)
    before.set_attn_implementation("sdpa")
    rows = with_references(encoded, before)[:2]
    for some in (rows, rows[:1]):
        batch = make_batch(some, 1, batch_size=1)
        optimizers = peaks(method.make_optimizers(model, settings()))
        metrics = method.train_step(model, optimizers, batch, accelerator, 0.0, settings())
        assert metrics.finite and metrics.grad_norm > 0


@pytest.mark.integration
@pytest.mark.parametrize(("recipe", "number", "strategy"), [("dpo", 10, "ddp3"), ("kto", 7, "fsdp2")])
def test_a_rank_without_a_reply_waits_for_the_others(recipe, number, strategy, small_folder, tmp_path):
    """The last batch of the epoch has one pair, or one reply."""
    args = arguments(small_folder, recipe, strategy, tmp_path / recipe)
    args[args.index("sample-feedback:60")] = f"sample-feedback:{number * 2}"
    done = run([*args, "--num-train-epochs", 2, "--max-steps", -1], strategy, log=tmp_path / "log")
    assert set(done.codes) == {0}, done.output


def test_figures_of_held_out_replies():
    @dataclasses.dataclass
    class Row:
        label: int
        location: str
        num_targets: int
        own_parts: tuple = ()

    class Held(list):
        units = ((0, 1), (2, 3))

    rows = [Row(1, "a", 2), Row(-1, "b", 4), Row(1, "c", 2), Row(-1, "d", 2)]
    data = type("Data", (), {"held": Held(rows)})
    first = [Scored(row.location, "reply", 10.0, row.num_targets, 0) for row in rows]
    now = [
        Scored(row.location, "reply", loss, row.num_targets, 0) for row, loss in zip(rows, (8, 12, 11, 9), strict=True)
    ]
    dpo = load_step_file(str(ROOT / "recipes/dpo.py"))
    figures = held_out(data, dpo.loss_of).of(now, first)
    assert figures["accuracy"] == 0.5 and figures["margin"] == (4 - 2) / 2
    assert figures["loss"] == pytest.approx((math.log1p(math.exp(-0.4)) + math.log1p(math.exp(0.2))) / 2)
    assert figures["good_log_likelihood"] == -19 / 4 and figures["bad_log_likelihood"] == -21 / 6
    assert held_out(data, dpo.loss_of).of(first, first)["accuracy"] == 0.5  # before training neither is ahead


# --- runs ---

ARGS = (
    "preference --dataset sample-feedback:60 --max-length 200 --mixed-precision no --learning-rate 1e-4 --max-steps 6 "
)
ARGS += "--val-fraction 0.2 --eval-steps 3 --save-steps 2 --num-samples 0 --early-stopping-patience 0 --language en"
BATCH = {"one": 6, "ddp2": 3, "ddp3": 2, "fsdp2": 3, "lora": 6}


def arguments(small_folder, recipe: str, strategy: str, folder) -> list:
    more = ["--step-set", "RPO=0.5"] if recipe == "dpo" else []
    more += ["--lora-rank", 4] if strategy == "lora" else []
    return [*ARGS.split(), "--model", small_folder, "--step-file", ROOT / f"recipes/{recipe}.py", *more,
            "--gradient-accumulation-steps", BATCH[strategy], "--output-dir", folder]  # fmt: skip


@pytest.fixture(scope="module")
def whole(small_folder, tmp_path_factory):
    kept = {}

    def folder_of(recipe: str, strategy: str):
        if (recipe, strategy) not in kept:
            folder = kept[recipe, strategy] = tmp_path_factory.mktemp(f"{recipe}-{strategy}") / "run"
            launch = "one" if strategy == "lora" else strategy
            done = run(arguments(small_folder, recipe, strategy, folder), launch, log=folder.parent / "log")
            assert set(done.codes) == {0}, done.output
        return kept[recipe, strategy]

    return folder_of


@pytest.mark.integration
@pytest.mark.parametrize("recipe", ["dpo", "kto"])
@pytest.mark.parametrize("strategy", ["ddp2", "ddp3", "fsdp2"])
def test_any_number_of_processes_trains_the_same(recipe, strategy, whole):
    one, many = (metrics_of(whole(recipe, launch)) for launch in ("one", strategy))
    wanted = {"train/loss", "train/grad_norm", "method/preference_loss", "eval/loss", "eval/preference/loss",
              "eval/preference/margin", "eval/preference/good_log_likelihood"}  # fmt: skip
    for ours, theirs in zip(one, many, strict=True):
        for name in wanted & ours.keys():
            # Gradients of good and bad replies nearly cancel, which leaves their norm fewer digits.
            close = 3e-5 if name == "train/grad_norm" else 1e-5
            assert theirs[name] == pytest.approx(ours[name], rel=close, abs=1e-5), (name, ours["step"])
    assert set().union(*one) >= wanted


@pytest.mark.integration
@pytest.mark.parametrize(("recipe", "strategy"), [("dpo", "one"), ("kto", "ddp2"), ("dpo", "fsdp2"), ("kto", "lora")])
def test_a_run_killed_and_resumed_ends_with_the_same_bits(recipe, strategy, whole, small_folder, tmp_path):
    args, launch = (
        arguments(small_folder, recipe, strategy, tmp_path / "run"),
        "one" if strategy == "lora" else strategy,
    )
    assert -9 in run([*args], launch, "kill_in_step(5)", tmp_path / "log").codes
    done = run([*args, "--resume"], launch, log=tmp_path / "log")
    assert set(done.codes) == {0} and "resumed from" in done.output, done.output
    for folder in (tmp_path / "run", whole(recipe, strategy)):
        (folder / "samples.jsonl").touch()
    assert_same_end(tmp_path / "run", whole(recipe, strategy))


def test_other_constants_do_not_go_on_with_a_run(whole, small_folder, tmp_path):
    """Its best model is chosen by their loss, which would have another scale."""
    args = arguments(small_folder, "kto", "one", whole("kto", "one"))
    done = run([*args, "--step-set", "BETA=0.7", "--resume"], log=tmp_path / "log")
    assert done.codes == [2] and "the loss that chooses best/ depends on it" in done.output


def test_the_record_of_a_run(whole):
    folder = whole("dpo", "one")
    first, *_, last = [row for row in metrics_of(folder) if "eval/preference/loss" in row]
    assert first["eval/preference/loss"] == pytest.approx(math.log(2)) and first["eval/preference/margin"] == 0
    assert first["eval/preference/accuracy"] == 0.5 and last["eval/preference/accuracy"] > 0.8
    train = [row for row in metrics_of(folder) if "method/preference_loss" in row]
    assert train[0]["method/preference_loss"] == pytest.approx(math.log(2), abs=1e-5)  # before the first update
    held = [json.loads(line) for line in (folder / "data/held.jsonl").read_text(encoding="utf-8").splitlines()]
    val = [json.loads(line) for line in (folder / "data/val.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(held) == len(val) and all(len(row["replies"]) == 2 for row in held)
    good = [next(reply["content"] for reply in row["replies"] if reply["label"]) for row in held]
    assert [row["messages"][-1]["content"] for row in val] == good
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "eval/preference/accuracy" in report


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--learning-rate", "1e-3"], "at most 0.0001 is taken"),
        (["--think-weight", "0.5"], "ANSWERS_ALONE"),
        (["--train-liked"], "--train-liked does not act"),
        (["--dataset", "sample:30"], "30 of 30 rows are unusable"),
        (["--dataset", ROOT / "nothing.jsonl"], "there is no dataset file"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_remedy(more, said, small_folder, tmp_path):
    args = [*arguments(small_folder, "dpo", "one", tmp_path / "run"), "--dry-run"]
    done = run([*args, *more], log=tmp_path / "log")
    assert done.codes == [2] and said in done.output and "Traceback" not in done.output


def test_rows_of_the_run_before_are_what_the_usual_losses_are_of(small_folder, jsonl, tmp_path):
    val = jsonl(
        [{"question": f"第{n}个问题？", "think": "想。", "answer": f"第{n}个。"} for n in range(7)], "val.jsonl"
    )
    args = [*arguments(small_folder, "kto", "one", tmp_path / "run"), "--max-steps", 1, "--val-dataset", val]
    done = run(args, log=tmp_path / "log")
    assert done.codes == [0], done.output
    lines = (tmp_path / "run/data/val.jsonl").read_text(encoding="utf-8").splitlines()
    held = (tmp_path / "run/data/held.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7 and len(held) == 12
    rows = [json.loads(line) for line in (tmp_path / "run/eval_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["row"].partition(":")[0] for line in rows} == {"val.jsonl"}
