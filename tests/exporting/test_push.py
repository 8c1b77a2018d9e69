"""`chatllama push` against a hub on this machine that keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from chatllama import cli

FILES = {"README.md": b"card", "chatllama.json": b"{}", "adapter_model.safetensors": b"\x00\x01"}


class Hub(HTTPServer):
    """Answers the requests of an upload; `stored` is the content of the files by name."""

    stored: dict[str, bytes]
    created: dict[str, object]
    refuses: bool = False


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: object = {}
        status = 403 if self.server.refuses else 200
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body) | {"token": self.headers["Authorization"]}
            answer = {"url": f"{constants.ENDPOINT}/me/mine"}
        elif self.path == "/api/models/me/mine/preupload/main":
            asked = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": each["path"], **modes} for each in asked]}
        elif self.path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.stored[value["path"]] = base64.b64decode(value["content"])
            answer = {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{constants.ENDPOINT}/me/mine",
            }
        self._send(status, answer)

    def do_GET(self) -> None:
        self._send(200, {"id": "me/mine", "siblings": [], "tags": []})

    def _send(self, status: int, answer: object) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    server.stored, server.created = {}, {}
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def test_every_file_arrives_and_the_repository_is_private(
    hub: Hub, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(export), "me/mine", "--private"]) == 0
    assert hub.stored == FILES
    assert hub.created["name"] == "mine" and hub.created["organization"] == "me"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.created["token"] == "Bearer hf_mine"
    assert "me/mine" in capsys.readouterr().out


def test_a_refusal_is_a_message(hub: Hub, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses = True
    assert cli.main(["push", str(export), "me/mine"]) == 2
    error = capsys.readouterr().err
    assert "me/mine: the hub refuses" in error and "hf auth login" in error


@pytest.mark.parametrize(
    ("change", "expected"),
    [("lineage.json", "is a run folder: `chatllama export"), ("-README.md", "no README.md"),
     ("-chatllama.json", "no chatllama.json")],
)  # fmt: skip
def test_only_exports_are_sent(
    hub: Hub, export: Path, change: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if change.startswith("-"):
        (export / change[1:]).unlink()
    else:
        (export / change).write_text("{}")
    assert cli.main(["push", str(export), "me/mine"]) == 2
    assert expected in capsys.readouterr().err and not hub.created
