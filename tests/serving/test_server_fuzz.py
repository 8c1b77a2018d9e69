"""Hostile requests: bodies that are nearly right, and paths that are none. Seeded."""

import copy
import http.client
import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
from serving_setup import make_served_run, post, serving

pytestmark = pytest.mark.slow

ASK = [{"role": "user", "content": "Anna paints the river"}]
ANSWERED = [*ASK, {"role": "assistant", "content": "the queen"}]
LOADING = "/v1/load_lora_adapter"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "policy", "messages": ASK, "max_tokens": 2, "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "n": 2, "seed": 1, "stop": ["a"], "logprobs": True, "top_logprobs": 2,
        "stop_token_ids": [3], "stream": False, "user": "me", "return_token_ids": True,
    },
    "/v1/completions": {
        "model": "sft", "prompt": ["Anna", "the"], "max_tokens": 2, "logprobs": 2, "stream": True,
        "stream_options": {"include_usage": True}, "stop": "x", "temperature": 0.0,
    },
    "/v1/score": {"model": "reward", "conversations": [ANSWERED, ANSWERED]},
    "/v1/token_kl": {"model": "policy", "reference": "base", "messages": ANSWERED},
    "/v1/votes": {
        "messages": ASK, "answers": ["a", "b"], "models": ["sft", "policy"], "verdict": "a",
        "reason": "shorter",
    },
    LOADING: {"lora_name": "one", "lora_path": "extra", "load_inplace": True},
    "/v1/unload_lora_adapter": {"lora_name": "one"},
}  # fmt: skip
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 1e308, -0.0, 1e-320, 0.5, "", " ",
    "\x00", "../..", "/etc/passwd", "..%2f..%2fetc", "a" * 3000, "\ud800", "\u202e", "🙂" * 300,
    "</s>", "[INST]", [], {}, [[]], [None], {"a": {}}, ["x"] * 300, [0] * 300, [10**9], "policy",
    [{"role": "user", "content": ""}], [{"role": "tool", "content": "x"}], "reward", "base", "NaN",
]  # fmt: skip
PATHS = [
    "/..", "/../etc/passwd", "//etc/passwd", "/page.css/..", "/%2e%2e/%2e%2e/etc/passwd", "/%00",
    "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/" + "a" * 5000, "/v1", "/?",
    "/v1/models?x=" + "y" * 5000, "/static/../page.js", "/v1/votes/", "/%ff", "/v1/models/%ff%fe",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(part, (*path, key))
    return found


def damaged(body: dict[str, Any], luck: random.Random) -> Any:
    """A body with up to three changes: values replaced, taken away, repeated or added."""
    body = copy.deepcopy(body)
    for _ in range(luck.randint(0, 3)):
        *way, last = luck.choice(places(body) or [("messages",)])
        parent = cast(Any, body)
        for key in way:
            parent = parent[key]
        match luck.randrange(5):
            case 0:
                parent.pop(last, None) if isinstance(parent, dict) else parent.pop(last)
            case 1 if isinstance(parent, list) and len(parent) < 10:
                parent.extend(copy.deepcopy(parent) * luck.randint(1, 60))
            case 2 if isinstance(parent, dict):
                parent[luck.choice(["tools", "x", "logit_bias", "", "best_of"])] = luck.choice(
                    HOSTILE
                )
            case _:
                cast(Any, parent)[last] = copy.deepcopy(luck.choice(HOSTILE))
    return body


def test_hostile_bodies_break_nothing_and_learn_nothing(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    luck, seen = random.Random(5), set()
    (tmp_path / "hidden_place").mkdir()
    run = make_served_run(tmp_path / "hidden_place", tiny_tokenizer_dir)
    with serving(run, max_tokens=4) as url:
        bodies = BODIES | {LOADING: BODIES[LOADING] | {"lora_path": str(run.root / "extra")}}
        for path, body in bodies.items():
            assert post(url, path, body)[0] == 200, path
        for _ in range(600):
            path = luck.choice(list(bodies))
            body = damaged(bodies[path], luck)
            data = json.dumps(body, ensure_ascii=luck.random() < 0.9).encode(errors="surrogatepass")
            if luck.random() < 0.05:
                data = data[: luck.randrange(len(data))]
            status, told = post(url, path, data)
            seen.add((path, status))
            assert status in (200, 400, 404, 413), (path, data[:2000], told)
            if status != 200:
                assert set(told["error"]) == {"message", "type", "param", "code"}
            for secret in ("hidden_place", "Traceback", "site-packages", str(Path.home())):
                assert secret not in str(told), (path, data[:2000], told)
        for path in PATHS:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
                connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
                connection.request(method, path, b"{}" if method == "POST" else None)
                response = connection.getresponse()
                content = response.read()
                connection.close()
                assert response.status < 500 and response.status != 415, (method, path)
                assert b"hidden_place" not in content and b"root:" not in content
        assert post(url, "/v1/completions", {"prompt": "the", "max_tokens": 2})[0] == 200
    # The requests are near enough to right ones to get behind the schema.
    assert {path for path, status in seen if status == 200} == set(BODIES)


def test_the_description_is_of_what_is_answered(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    (tmp_path / "run").mkdir()
    with serving(make_served_run(tmp_path / "run", tiny_tokenizer_dir)) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.request("GET", "/openapi.json")
        described = json.load(connection.getresponse())["paths"]
        for path in ("/v1/completions", "/v1/chat/completions"):
            answered = described[path]["post"]["responses"]
            assert set(answered["200"]["content"]) == {"application/json", "text/event-stream"}
            assert set(answered["400"]["content"]) == {"application/json"} and "422" not in answered
        # What takes no body says so, whatever the type of the one that it gets.
        connection.request("POST", "/health", b"x")
        response = connection.getresponse()
        assert response.status == 405 and json.load(response)["error"]["code"] == "http_error"
        connection.close()
