"""A server with vLLM's documented requests and replies, answering with a tiny model of its own.

Sources: vLLM's documentation of LoRA adapters ("Dynamically serving LoRA Adapters") and of the
OpenAI-compatible server; the error texts are those of its `models/serving.py`.
"""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from chatllama.config.model import ChatSection
from chatllama.generation.decoding_batch import DecodingBatch, Request
from chatllama.generation.sampling import Sampling
from chatllama.model.adapters import load_adapter
from chatllama.model.roles import Adapter, RoleModel, acting_as

REQUIRED = {"temperature": (int, float), "max_tokens": int, "prompt": list, "model": str}
BASE = "meta-llama/tiny"
CHAT = ChatSection()


class VllmStub:
    """What one server knows, and what it was asked.

    Args:
        base: Hugging Face folder of the model.
    """

    def __init__(self, base: str) -> None:
        self.model = RoleModel(LlamaForCausalLM.from_pretrained(base), {}).eval()
        self.adapters: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failing = 0
        """How many of the next requests get a 503."""
        self.spoil = False
        """Log-probabilities off by 0.2 nats."""
        self._lock, self._numbers = threading.Lock(), itertools.count(1)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str | dict[str, Any]]:
        with self._lock:
            self.calls.append((path, body))
            if self.failing:
                self.failing -= 1
                return 503, error("busy", "ServiceUnavailable", 503)
            if path == "/v1/models":
                return 200, self._models()
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                return self._unload(body["lora_name"])
            if path == "/v1/completions":
                return self._complete(body)
        return 404, error("Not Found", "NotFoundError", 404)

    def _models(self) -> dict[str, Any]:
        cards = [(BASE, "/models/tiny", None)]
        cards += [(name, self.paths[name], BASE) for name in self.adapters]
        keys = ("id", "root", "parent")
        data = [
            {**dict(zip(keys, card, strict=True)), "object": "model", "owned_by": "vllm"}
            for card in cards
        ]
        return {"object": "list", "data": data}

    def _load(self, name: str, path: str) -> tuple[int, str | dict[str, Any]]:
        if name in self.adapters:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
            return 400, error(message, "InvalidUserInput", 400)
        saved, role = load_adapter(Path(path)), f"stub_{next(self._numbers)}"
        self.model.add(role, Adapter(saved.lora, saved.state))
        self.adapters[name], self.paths[name] = role, path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> tuple[int, str | dict[str, Any]]:
        if name not in self.adapters:
            message = f"The lora adapter '{name}' cannot be found."
            return 404, error(message, "NotFoundError", 404)
        self.model.remove(self.adapters.pop(name))
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        for key, kind in REQUIRED.items():
            assert isinstance(body[key], kind), key
        model, prompt = body["model"], body["prompt"]
        if model not in (*self.adapters, BASE):
            return 404, error(f"The model `{model}` does not exist.", "NotFoundError", 404)
        generator = torch.Generator().manual_seed(body["seed"])
        uniforms = torch.rand(body["max_tokens"], generator=generator)
        sampling = Sampling(body["max_tokens"], body["temperature"], 0, body["top_p"])
        request = Request(prompt, sampling, body["stop_token_ids"], uniforms, 1)
        with acting_as(self.model, self.adapters.get(model, "base")):
            batch = DecodingBatch(self.model.llama, 1)
            sampled = batch.admit([request])
            while batch.running:
                sampled += batch.step()
        ids = [one.token for one in sampled]
        logprobs = [(one.logprob or 0.0) - 0.2 * self.spoil for one in sampled]
        ended = sampled[-1].ended
        return 200, {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "text": "...",
                    "logprobs": {
                        "text_offset": [0] * len(ids),
                        "token_logprobs": logprobs,
                        "tokens": [f"token_id:{i}" for i in ids],
                        "top_logprobs": [{f"token_id:{i}": 0.0} for i in ids],
                    },
                    "finish_reason": ended,
                    "stop_reason": ids[-1] if ended == "stop" else None,
                    "token_ids": ids if body.get("return_token_ids") else None,
                    "prompt_token_ids": prompt if body.get("return_token_ids") else None,
                    "prompt_logprobs": None,
                }
            ],
            "usage": {
                "prompt_tokens": len(prompt),
                "total_tokens": len(prompt) + len(ids),
                "completion_tokens": len(ids),
            },
        }


def error(message: str, type: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


@contextmanager
def vllm_stub(base: str) -> Iterator[tuple[str, VllmStub]]:
    """The address of a stub that runs inside, and the stub."""
    stub = VllmStub(base)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            self._reply(json.loads(self.rfile.read(length)))

        def _reply(self, body: dict[str, Any]) -> None:
            status, told = stub.answer(self.path, body)
            content = told.encode() if isinstance(told, str) else json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", stub
    finally:
        server.shutdown()
        server.server_close()
