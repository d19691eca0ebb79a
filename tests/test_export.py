"""What best/ holds, and what becomes of a run whose model cannot be exported."""

import json
import shlex
import shutil

import pytest
from conftest import good_row
from ranks import run
from runs import status_of

ARGS = ["tiny", "--max-steps", "1", "--num-samples", "0", "--output-dir"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(12)), encoding="utf-8")
    return path


def test_weights_under_other_names_end_the_run_at_the_first_export(rows, tmp_path):
    """As torch.compile around the model would make them; a fresh model would read none of them."""
    out = tmp_path / "out"
    outcome = run([*ARGS, out, "--dataset", rows], "one", "rename_weights()", tmp_path / "log")
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    assert "cannot be exported" in outcome.output and "_orig_mod." in outcome.output
    assert status_of(out)["status"] == "failed" and status_of(out)["step"] == 0 and not (out / "best").exists()


def test_the_generation_config_of_a_base_model(small_folder, rows, tmp_path):
    """Qwen3-1.7B-Base answers greedily, which says nothing of how a model that thinks should answer."""
    base, out = tmp_path / "base", tmp_path / "a b"
    shutil.copytree(small_folder, base)
    greedy = {"do_sample": False, "max_new_tokens": 2048, "eos_token_id": 0, "bos_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(greedy))
    outcome = run([*ARGS, out, "--dataset", rows, "--model", base], log=tmp_path / "log")
    assert outcome.codes == [0] and "could not be written" not in outcome.output, outcome.output
    config = json.loads((out / "best/generation_config.json").read_text())
    sampling = {name: config[name] for name in ("do_sample", "temperature", "top_k", "top_p")}
    assert sampling == {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    # What is printed can be typed.
    assert f"chat: python -m tools.chat {shlex.quote(str(out / 'best'))}\n" in outcome.output


def test_what_transformers_4_reads(small_folder):
    config = json.loads((small_folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((small_folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_one_command_uploads_all_launches_of_a_run(rows, tmp_path):
    out = tmp_path / "out"
    args = ["tiny", "--max-steps", "3", "--num-samples", "0", "--dataset", rows, "--output-dir", out]
    args += ["--swanlab-mode", "offline", "--resume"]
    variables = {"SWANLAB_MODE": None, "HOME": str(tmp_path)}
    first = run(args, "one", "signal_in_step(0)", tmp_path / "log", **variables)
    assert first.codes == [0] and "swanlab sync --id" not in first.output, first.output
    second = run(args, log=tmp_path / "log", **variables)
    folders = sorted((out / "swanlog").glob("run-*"))
    assert second.codes == [0] and len(folders) == 2
    (line,) = [line for line in second.output.splitlines() if "swanlab sync --id" in line]
    commands = [command.split() for command in line.split("run with  ")[1].split(" && ")]
    assert [command[-1] for command in commands] == [str(folder) for folder in folders]
    assert len({command[3] for command in commands}) == 1
