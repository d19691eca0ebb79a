"""The real clients of ModelScope and Hugging Face against hubs on this machine that have one model and one dataset."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from conftest import ROOT
from ranks import run
from runs import metrics_of

from data.base.errors import UserError
from data.reading.hub import HUGGING_FACE, MODELSCOPE, hub_id, page_of
from data.reading.source import SAMPLE, find_source
from model.lora import add_lora
from model.qwen3 import load_model

COMMIT = {"main": "a" * 40, "master": "a" * 40, "v1": "b" * 40}  # of each revision that there is


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME`; `cut` is cut off in the middle once."""

    root: Path
    cut: set
    asked: list

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.asked.append((url.path, self.headers.get("Range"), self.query))
        self.answer([unquote(part) for part in url.path.strip("/").split("/")])

    do_HEAD = do_GET

    def send_file(self, path: Path):
        if not path.is_file():
            return self.reply(404, b"{}")
        return self.reply(200, path.read_bytes(), "application/octet-stream", path.name)

    def reply(self, status, body, kind="application/json", name="", **headers):
        start = 0
        if requested := self.headers.get("Range"):
            start, end = requested.removeprefix("bytes=").split("-")
            total, start = len(body), int(start)
            body = body[start : int(end) + 1 if end else None]
            status = 206
        self.send_response(status)
        if name:
            headers = {
                "ETag": f'"{hashlib.sha256(name.encode()).hexdigest()}"',
                "X-Repo-Commit": self.commit,
                **headers,
            }
        for header, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        self.end_headers()
        if self.command == "GET":
            if name in self.cut and not start:
                self.cut.discard(name)
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class ModelScope(Hub):
    def answer(self, parts):
        _, _, kind, owner, name, *_ = [*parts, "", "", "", "", ""]
        folder = self.root / kind / owner / name
        self.commit = COMMIT.get(self.query.get("Revision", "master"))
        if not folder.is_dir() or self.commit is None:
            return self.reply(404, b"{}")
        if owner == "private":
            return self.reply(403, json.dumps({"Code": 403, "Message": "no access"}).encode())
        if "FilePath" in self.query:
            return self.send_file(folder / self.query["FilePath"])
        files = [
            {
                "Path": path.name,
                "Name": path.name,
                "Type": "blob",
                "Size": path.stat().st_size,
                "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "Revision": "master",
            }
            for path in sorted(folder.iterdir())
        ]
        answer = {"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}}
        return self.reply(200, json.dumps(answer).encode())


class HuggingFace(Hub):
    def answer(self, parts):
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts if parts[0] == "datasets" else ["models", *parts]
        if len(parts) < 3:
            return self.reply(404, b"{}")
        kind, owner, name, verb, revision, *file = [*parts, "revision", "main"][: max(5, len(parts))]
        folder, self.commit = self.root / kind / owner / name, COMMIT.get(revision, revision)
        if owner == "private" or not folder.is_dir():
            return self.reply(401, b"{}", X_Error_Code="RepoNotFound")
        if len(self.commit) != 40:
            return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
        if verb == "resolve":
            return self.send_file(folder / "/".join(file))
        if verb == "tree":
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": self.commit} for p in folder.iterdir()
            ]
            return self.reply(200, json.dumps(files).encode())
        files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        return self.reply(200, json.dumps({"id": f"{owner}/{name}", "sha": self.commit, "siblings": files}).encode())


def environment_of(kind: type, server, folder: Path) -> dict:
    address = f"http://127.0.0.1:{server.server_port}"
    if kind is ModelScope:
        names = {
            "MODELSCOPE_ENDPOINT": address,
            "MODELSCOPE_CACHE": folder / "cache",
            "MODELSCOPE_HOME": folder / "home",
        }
    else:
        names = {"HF_ENDPOINT": address, "HF_HOME": folder / "cache", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {name: str(value) for name, value in names.items()}


@pytest.fixture(params=[ModelScope, HuggingFace])
def hub(request, tmp_path):
    """(prefix of a name, folder, environment, the hub's class)"""
    handler = type("Local", (request.param,), {"root": tmp_path / "hub", "cut": set(), "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    prefix = "" if request.param is ModelScope else "hf:"
    yield prefix, tmp_path / "hub", environment_of(request.param, server, tmp_path), handler
    server.shutdown()


def downloads(environment: dict, *asked: tuple[str, str]) -> list[str]:
    """What becomes of each (kind, name) in one process: a folder, or the message."""
    code = f"""
from data.base.errors import UserError
from data.reading.hub import download
for kind, name in {asked!r}:
    try:
        print(download(kind, name, ["*.json", "*.safetensors", "*.jsonl"]))
    except UserError as error:
        print("error", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, timeout=120,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_and_a_dataset_train_from_a_hub(hub, train_py, small_folder, tmp_path):
    prefix, root, environment, handler = hub
    model, dataset = root / "models/Qwen/Qwen3-1.7B", root / "datasets/krisfu/delicate_medical_r1_data"
    shutil.copytree(small_folder, model)
    (model / "evil.py").write_text("raise SystemExit('executed')")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    dataset.mkdir(parents=True)
    shutil.copy(SAMPLE, dataset / "r1_data.jsonl")
    (dataset / "README.md").write_text("数据集")

    args = ["tiny", "--max-steps", "1", "--num-samples", "0", "--language", "en", "--output-dir"]
    names = [f"{prefix}krisfu/delicate_medical_r1_data@v1:120", f"{prefix}Qwen/Qwen3-1.7B@v1"]
    flags = ["--dataset", names[0], "--model", names[1]]
    dry = train_py(*args, tmp_path / "hub-run", *flags, "--dry-run", **environment)
    assert "120 rows read from r1_data.jsonl" in dry.stdout
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # a dry run fetches no weights
    train_py(*args, tmp_path / "hub-run", *flags, **environment)
    own = ["--dataset", "sample:120", "--model", small_folder]
    assert run([*args, tmp_path / "own", *own], log=tmp_path / "log").codes == [0]
    for ours, theirs in zip(metrics_of(tmp_path / "hub-run"), metrics_of(tmp_path / "own"), strict=True):
        assert ours.get("eval/loss") == theirs.get("eval/loss")
    recorded = json.loads((tmp_path / "hub-run/run.json").read_text())
    assert (recorded["dataset"], recorded["model"]) == ([names[0]], names[1])
    page = page_of(names[1])
    assert f"]({page})" in (tmp_path / "hub-run/best/README.md").read_text()
    assert page.startswith("https://huggingface.co/Qwen" if prefix else "https://modelscope.cn/models/Qwen")
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() or path.is_symlink()}
    assert {"model.safetensors", "r1_data.jsonl"} <= fetched and not {"evil.py", "pytorch_model.bin"} & fetched
    asked = [query.get("Revision") or path for path, _, query in handler.asked]
    assert any("v1" in text or COMMIT["v1"] in text for text in asked)


def test_a_download_that_is_cut_goes_on_and_failures_are_one_line(hub, tmp_path):
    prefix, root, environment, handler = hub
    for owner in ("Qwen", "private"):
        (root / f"models/{owner}/Some").mkdir(parents=True)
        (root / f"models/{owner}/Some/config.json").write_text("{}")
    weights = os.urandom(24_000_000)  # Hugging Face's client keeps pieces of 10 MiB
    (root / "models/Qwen/Some/model.safetensors").write_bytes(weights)
    handler.cut.add("model.safetensors")
    names = ["Qwen/Some", "Qwen/Some", "private/Some", "Qwen/None", "Qwen/Some@v9"]
    folder, again, *errors = downloads(environment, *[("model", prefix + name) for name in names])
    if folder.startswith("error"):  # the client gave up; the next call goes on
        folder = again
    assert (Path(folder) / "model.safetensors").read_bytes() == weights
    ranges = [text for path, text, query in handler.asked if text and "model.safetensors" in f"{path} {query}"]
    assert any(int(text.removeprefix("bytes=").split("-")[0]) > 0 for text in ranges), handler.asked
    site, login = (HUGGING_FACE, "hf auth login") if prefix else (MODELSCOPE, "modelscope login")
    for name, error in zip(names[2:], errors, strict=True):
        assert error.startswith(f"error cannot get the model {prefix}{name} from {site}")
        assert login in error and len(error) < 500


def test_a_hub_that_is_not_there_is_one_line_through_the_command_line(hub, train_py, tmp_path):
    prefix, _, environment, _ = hub
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        environment |= {name: "http://127.0.0.1:9"} if name in environment else {}
    done = train_py("tiny", "--model", f"{prefix}Qwen/Qwen3-1.7B", "--output-dir", tmp_path / "x", check=False,
                    timeout=90, **environment)  # fmt: skip
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "Qwen/Qwen3-1.7B" in line]
    assert line.startswith("train.py: cannot get the model")


def test_names_of_datasets_with_revisions(monkeypatch, tmp_path):
    asked = []

    def download(kind, name, patterns):
        asked.append((kind, name, patterns[0]))
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part/a.jsonl").write_text("{}")
        return tmp_path

    monkeypatch.setattr("data.reading.source.download", download)
    names = {
        "hf:a/b@refs/convert/parquet/part/a.jsonl:5": ("hf:a/b@refs/convert/parquet", "part/a.jsonl"),
        "a/b@v1.0/part/a.jsonl": ("a/b@v1.0", "part/a.jsonl"),
        "hf:a/b@refs/pr/1": ("hf:a/b@refs/pr/1", "*.jsonl"),
        "hf:a/b@main:10%": ("hf:a/b@main", "*.jsonl"),
    }
    for text, (name, pattern) in names.items():
        source = find_source(text)
        assert asked[-1][:2] == ("dataset", name), text
        assert pattern.startswith("*") or asked[-1][2] == pattern, text
        assert source.label in ("a", "b"), text
    for text in ("hf:gpt2", "hf:", "hf:/a", "../typo", "hf:../a"):
        with pytest.raises(UserError, match=f"there is no dataset file '{text}'"):
            find_source(text)


def test_names_of_hubs(tokenizer):
    assert hub_id("Qwen/Qwen3-8B") == (MODELSCOPE, "Qwen/Qwen3-8B", None)
    assert hub_id("hf:Qwen/Qwen3-8B@refs/pr/3") == (HUGGING_FACE, "Qwen/Qwen3-8B", "refs/pr/3")
    assert hub_id("Qwen/Qwen3-8B@v1.0") == (MODELSCOPE, "Qwen/Qwen3-8B", "v1.0")
    for text in (
        "hf:",
        "hf:Qwen",
        "hf:/Qwen",
        "Qwen/Qwen3-8B@",
        "a/b/c",
        "HF:Qwen/Qwen3",
        "../a",
        "a/..",
        "hf:../a",
        "a/b@/c",
    ):
        assert hub_id(text) is None, text
    model = load_model("tiny", tokenizer, False)
    add_lora(model, 2, "hf:Qwen/Qwen3-8B@v1.0")  # as peft reads it
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("Qwen/Qwen3-8B", "v1.0")
