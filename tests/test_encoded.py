"""Many rows: encoded in parallel, kept in a file, found again; the same Examples as a few at a time."""

import json

import pytest
import torch
from conftest import good_row, load
from datasets import load_from_disk

import data.encoded
from data.batches import rank_batches
from data.encode import digest, encode_rows
from data.encoded import encode_all


@pytest.fixture
def many(monkeypatch, tmp_path):
    """As for a million rows."""
    monkeypatch.setattr(data.encoded, "MANY", 10)
    monkeypatch.setattr(data.encoded, "CHUNK", 30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/qwen3-medical-loop"


@pytest.mark.integration
def test_many_rows_are_encoded_as_a_few_are(many, split, tokenizer, monkeypatch):
    expected, problems = encode_rows(split.train, tokenizer, 95, "truncate")
    encoded, found = encode_all(split.train, tokenizer, 95, "truncate")
    (folder,) = many.iterdir()
    assert found == problems != [] and digest(encoded) == digest(expected)
    assert [example.location for example in encoded] == [example.location for example in expected]
    assert encoded.lengths.tolist() == [len(example) for example in expected] and len(encoded) == len(expected)
    assert encoded[-1].input_ids.tolist() == expected[-1].input_ids.tolist()
    assert digest(encoded[3:7]) == digest(expected[3:7])
    with pytest.raises(IndexError):
        encoded[len(encoded)]
    for ours, theirs in zip(rank_batches(encoded, batch_size=4), rank_batches(expected, batch_size=4), strict=True):
        assert ours.inputs.keys() == theirs.inputs.keys() and torch.equal(ours.is_think, theirs.is_think)
        for name, tensor in theirs.inputs.items():
            assert ours.inputs[name] == tensor if name == "max_seqlen" else torch.equal(ours.inputs[name], tensor)

    (file,) = folder.glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])  # cut off: not taken, made again
    assert digest(encode_all(split.train, tokenizer, 95, "truncate")[0]) == digest(expected)
    assert list(many.iterdir()) == [folder]
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(data.encoded, "encode_texts", None)  # not called again
    again, problems = encode_all(split.train, tokenizer, 95, "truncate")
    assert digest(again) == digest(expected) and problems == found and file.stat().st_mtime_ns == written
    assert len(load_from_disk(str(folder))) == len(expected) + len(problems)  # others can open it
    with pytest.raises(TypeError):  # another length, another tokenizer, other rows: encoded anew
        encode_all(split.train, tokenizer, 94, "truncate")
    with pytest.raises(TypeError):
        encode_all(split.train[1:], tokenizer, 95, "truncate")


def test_a_few_rows_leave_nothing_in_the_cache(many, split, tokenizer, monkeypatch):
    monkeypatch.setattr(data.encoded, "MANY", 1000)
    encode_all(split.train, tokenizer, 512, "error")
    assert not many.exists()


def test_the_files_of_a_split_are_written_line_by_line(jsonl):
    from data.split import split_files

    split = load(jsonl([good_row(index) for index in range(20)]))
    lines = split_files(split)["train.jsonl"]
    assert iter(lines) is lines and json.loads(next(lines)) == split.train[0].columns
