"""A chat endpoint of our own on this machine, which answers as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | bytes | tuple[int, dict[str, str], bytes] | Callable[[], bytes]
"""A completion's text, what goes over the wire before it is closed, or status, headers and body."""


class Stub:
    """An endpoint on 127.0.0.1 that answers as `reply` says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Answer] = lambda body: "Fine."
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.finish = "stop"
        stub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.asked.append(body)
                    stub.headers.append({"path": self.path, **dict(self.headers)})
                    answer = stub.reply(body)
                if callable(answer):
                    answer = answer()
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                    self.close_connection = True
                    return
                if isinstance(answer, str):
                    choice = {"message": {"content": answer}, "finish_reason": stub.finish}
                    usage = {"prompt_tokens": 10, "completion_tokens": 3}
                    content = json.dumps({"choices": [choice], "usage": usage}).encode()
                    answer = (200, {}, content)
                status, headers, content = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@contextmanager
def endpoint_stub() -> Iterator[Stub]:
    """Runs inside."""
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()
