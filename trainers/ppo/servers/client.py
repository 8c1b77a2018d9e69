"""A client of one server that samples token ids: `chatllama serve`, or vLLM with runtime LoRA.

The requests are vLLM's documented ones, which our own server follows. Retries and the pool are in
`pool.py`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatllama.generation.sampling import Sampling
from chatllama.runtime.http_client import HttpClient, HttpError

# 404: a restarted server has lost its adapters; the next phase loads another.
RETRIED_STATUS = (404, 408, 409, 425, 429, 500, 502, 503, 504)


class ServerLost(Exception):
    """The server cannot be reached, or not now: trying again may help."""


class ServerRefused(ValueError):
    """The server refuses the request or answers it wrongly: trying again does not help."""


@dataclass(frozen=True)
class ServedResponse:
    """One sampled response of a server."""

    ids: list[int]
    """Its stop token included."""
    logprobs: list[float]
    """Of `ids`, computed by the server."""


class SamplingServer:
    """One server. Every request raises ServerLost without an answer, ServerRefused on a refusal.

    Args:
        url: `http://HOST:PORT`, with or without a final `/v1`.
        key: bearer key, or None.
        timeout: seconds for one answer.
    """

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = HttpClient(self.url, key, timeout)

    def base_model(self) -> str:
        """The name of the server's model without adapter."""
        listed = self._json("GET", "/v1/models", None)
        for model in listed.get("data", []):
            if model.get("parent") is None:
                return str(model["id"])
        raise ServerRefused(f"{self.url}/v1/models lists no model without adapter")

    def load(self, name: str, folder: str) -> None:
        """Loads the adapter in `folder`, a path that the server sees, under a name."""
        self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload(self, name: str) -> None:
        """Unloads an adapter."""
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def sample(
        self,
        model: str,
        prompt: Sequence[int],
        sampling: Sampling,
        stop_ids: Collection[int],
        seed: int,
    ) -> ServedResponse:
        """One response to a prompt of token ids.

        Refused is also one that lacks what training needs, or contradicts the request.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            # Spelled out: vLLM takes what is left out from the model's generation_config.json.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(stop_ids),
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
        }
        answer = self._json("POST", "/v1/completions", body)
        return self._checked(answer, prompt, sampling.max_new_tokens, stop_ids)

    def _checked(
        self,
        answer: Mapping[str, Any],
        prompt: Sequence[int],
        max_new_tokens: int,
        stop_ids: Collection[int],
    ) -> ServedResponse:
        choice = (answer.get("choices") or [{}])[0]
        ids = choice.get("token_ids")
        if not ids:
            raise ServerRefused(
                f"{self.url} gives no token ids: it must support `return_token_ids` (chatllama "
                "serve, vLLM 0.10.2 or later)"
            )
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and list(echoed) != list(prompt):
            raise ServerRefused(f"{self.url} changed the prompt's token ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(logprobs) != len(ids) or None in logprobs:
            raise ServerRefused(
                f"{self.url} gives {len(logprobs)} log-probabilities for {len(ids)} tokens"
            )
        ended = ids[-1] in stop_ids
        if any(index in stop_ids for index in ids[:-1]) or len(ids) > max_new_tokens:
            raise ServerRefused(f"{self.url} went on after a stop token or the longest answer")
        if not ended and len(ids) < max_new_tokens:
            raise ServerRefused(
                f"{self.url} ended an answer after {len(ids)} tokens with id {ids[-1]}, which is "
                f"none of the stop ids {sorted(stop_ids)}: it follows another end of turn"
            )
        return ServedResponse([int(i) for i in ids], [float(p) for p in logprobs])

    def _json(self, method: str, path: str, body: Mapping[str, object] | None) -> Mapping[str, Any]:
        content = self._call(method, path, body)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerRefused(f"{self.url}{path} does not answer in JSON: is it such a server?")
        return answer

    def _call(self, method: str, path: str, body: Mapping[str, object] | None) -> bytes:
        """The body of the answer."""
        try:
            return self._http.send(method, path, body)
        except HttpError as error:
            lost = error.status is None or error.status in RETRIED_STATUS
            raise (ServerLost if lost else ServerRefused)(str(error)) from error
