"""The real ModelScope client against a hub on this machine that has one dataset and one model."""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from ranks import run
from runs import metrics_of

from data.reading.source import SAMPLE


class Hub(http.server.BaseHTTPRequestHandler):
    """Lists and serves `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME` over the hub's HTTP interface."""

    root: Path

    def do_GET(self):
        url = urlsplit(self.path)
        _, _, _, kind, owner, name, *_ = [*url.path.split("/"), "", "", ""]
        folder, query = self.root / kind / owner / name, parse_qs(url.query)
        if not folder.is_dir():
            return self.reply(404, b"{}")
        if "FilePath" in query:
            return self.reply(200, (folder / query["FilePath"][0]).read_bytes(), "application/octet-stream")
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

    do_HEAD = do_GET

    def reply(self, status, body, kind="application/json"):
        start = 0
        if requested := self.headers.get("Range"):
            start, end = requested.removeprefix("bytes=").split("-")
            total, start = len(body), int(start)
            body = body[start : int(end) + 1 if end else None]
            status = 206
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    handler = type("LocalHub", (Hub,), {"root": tmp_path / "hub"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "MODELSCOPE_CACHE": str(tmp_path / "cache"),
        "MODELSCOPE_HOME": str(tmp_path / "home"),
    }
    yield tmp_path / "hub", environment
    server.shutdown()


def test_model_and_dataset_come_from_modelscope(hub, tmp_path):
    root, environment = hub
    short = ["tiny", "--max-steps", "1", "--sample-max-new-tokens", "8", "--output-dir"]
    assert run([*short, tmp_path / "first"]).codes == [0]
    model, dataset = root / "models/Qwen/Qwen3-1.7B", root / "datasets/krisfu/delicate_medical_r1_data"
    shutil.copytree(tmp_path / "first/best", model)
    (model / "evil.py").write_text("raise SystemExit('executed')")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    dataset.mkdir(parents=True)
    shutil.copy(SAMPLE, dataset / "r1_data.jsonl")
    (dataset / "README.md").write_text("数据集")

    names = ["--dataset", "krisfu/delicate_medical_r1_data:120", "--model", "Qwen/Qwen3-1.7B"]
    dry = run(["tiny", *names, "--dry-run"], log=tmp_path / "log", **environment)
    assert dry.codes == [0] and "120 rows read from r1_data.jsonl" in dry.output
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # a dry run fetches no weights
    assert run([*short, tmp_path / "second", *names], log=tmp_path / "log", **environment).codes == [0]
    first, second = (metrics_of(tmp_path / name) for name in ("first", "second"))
    # The second run begins with the weights that the first one ended with, in bf16.
    assert second[0]["eval/loss"] == pytest.approx(first[-2]["eval/loss"], abs=2e-3)
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert {"model.safetensors", "r1_data.jsonl"} <= fetched and not {"evil.py", "pytorch_model.bin"} & fetched

    args = ["tiny", "--model", "Qwen/Qwen4", "--output-dir", tmp_path / "x"]
    missing = run(args, log=tmp_path / "log", **environment)
    assert missing.codes == [2] and "Qwen/Qwen4" in missing.output and "Traceback" not in missing.output
