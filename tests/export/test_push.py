"""Uploading an export, to a server that stands in for the Hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from rlhf.errors import UserError
from rlhf.export.run import ExportConfig, export


class Hub(BaseHTTPRequestHandler):
    """What an upload asks of the Hub: make a repository, sort files, commit them."""

    created: dict
    files: dict
    refuse = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.refuse:
            self.answer(403, {"error": "no write access"})
        elif self.path == "/api/repos/create":
            self.created.update(json.loads(body))
            self.answer(200, {"url": f"http://{self.headers['Host']}/me/polite", "id": "me/polite"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self.answer(200, {"files": modes})
        elif self.path == "/api/validate-yaml":
            # the head of the card; the Hub would refuse a bad one here
            assert json.loads(body)["content"].startswith("---\n")
            self.answer(200, {"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            place = "https://huggingface.co/me/polite/commit/1"
            self.answer(200, {"commitUrl": place, "commitOid": "1", "success": True})

    def do_GET(self):
        self.answer(200, {"id": "me/polite", "sha": "0", "siblings": [], "private": True})

    def answer(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback, and the official client turned to it."""
    monkeypatch.setattr(Hub, "created", {}, raising=False)
    monkeypatch.setattr(Hub, "files", {}, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = huggingface_hub.HfApi
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client(endpoint=address, token="hf_x"))
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_export_is_pushed_with_its_card_into_a_private_repository(
    hub, sft_path, tmp_path, capsys
):
    out = tmp_path / "out"
    export(ExportConfig(run=sft_path, to="vllm", out=str(out), check=1, push_to_hub="me/polite"))
    assert hub.created["name"] == "polite" and hub.created["organization"] == "me"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    assert "adapter_model.safetensors" in hub.files and b"# sft" in hub.files["README.md"]
    assert "pushed: https://huggingface.co/me/polite/commit/1" in capsys.readouterr().out


def test_a_push_that_is_refused_leaves_the_export(hub, sft_path, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "refuse", True)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"is written, but not pushed to me/polite .*hf auth login"):
        export(
            ExportConfig(run=sft_path, to="vllm", out=str(out), check=1, push_to_hub="me/polite")
        )
    assert (out / "export.json").is_file()
