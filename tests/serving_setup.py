"""A run with random weights, and servers of it in threads of this process."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import LORA, REWARD_LORA, tiny_llama

from chatllama.config.model import ChatSection
from chatllama.inference.load import LoadedRun, load_run
from chatllama.model.adapters import save_adapter
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.serving.server import Server, open_socket
from chatllama.serving.service import Service
from chatllama.serving.settings import ServerSettings, check_settings
from chatllama.text.chat_format import describe_contract
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

KEY = "a-key-of-twenty-chars"


def make_served_run(folder: Path, tokenizer_dir: Path) -> RunFolder:
    """A finished run; `folder`/extra is one more adapter, equal to the policy's."""
    run = RunFolder(folder)
    llama = tiny_llama(vocabulary=300)
    llama.save_pretrained(run.backbone)
    tokenizer = load_tokenizer(tokenizer_dir)
    save_tokenizer(tokenizer, run.backbone)
    run.config.write_text(
        f"run_dir: {run.root}\nbackbone: {{path: {run.backbone}, dtype: float32}}\n"
        "generation: {max_new_tokens: 24}\n"
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapters = {
            "reference": Adapter(LORA),
            "policy": Adapter(LORA),
            "reward": Adapter(REWARD_LORA),
        }
        model = RoleModel(llama, adapters, heads=("reward",))
        for role in adapters:
            for parameter in adapter_parameters(model, role):
                parameter.data.normal_(std=0.2)
    info = {"base": str(run.backbone), "contract": describe_contract(tokenizer, ChatSection())}
    policy = adapter_state(model, "policy")
    save_adapter(run.sft_adapter, adapter_state(model, "reference"), LORA, info)
    save_adapter(run.policy_adapter, policy, LORA, info)
    save_adapter(folder / "extra", policy, LORA, info)
    head = model.heads["reward"].state_dict()
    save_adapter(run.reward_adapter, adapter_state(model, "reward"), REWARD_LORA, info, head)
    return run


@contextmanager
def serving(run: RunFolder, loaded: LoadedRun | None = None, **changes: Any) -> Iterator[str]:
    """The address of a server that runs inside; on leaving it has stopped gracefully."""
    settings = replace(ServerSettings(run=run.root, port=0, grace=5.0), **changes)
    check_settings(settings)
    bound: socket.socket = open_socket(settings)
    server = Server(Service(settings, loaded or load_run(run)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        assert server.ready.wait(120), "the server did not start"
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(300)
        bound.close()
        assert not thread.is_alive()
        assert not server._service.engine.alive


def post(url: str, path: str, body: object) -> tuple[int, Any]:
    """Status and decoded body of a request without OpenAI's client."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        url + path, data, {"content-type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read()
            status = response.status
    except urllib.error.HTTPError as error:
        content, status = error.read(), error.code
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode()


def metric(url: str, name: str) -> float:
    """One of the server's counters or gauges."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"chatllama_{name} ")))
