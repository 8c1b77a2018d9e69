"""Rollouts from several servers: adapters written, loaded and unloaded, prompts distributed.

A server that fails is tried again, then dropped; its prompts go to the others. Rank 0 sends all
requests and broadcasts the responses. Log-probabilities are compared with the trainer's own after
every phase.
"""

import contextlib
import os
import queue
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from chatllama.config.generation import ServersSection
from chatllama.config.schema import Config
from chatllama.generation.sampling import Sampling
from chatllama.model.adapters import save_adapter
from chatllama.model.roles import Role, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import from_rank_zero, rank
from trainers.engine.engine import gathered
from trainers.ppo.data import StopTokens
from trainers.ppo.rollout import Rollout
from trainers.ppo.servers.client import SamplingServer, ServedResponse, ServerLost, ServerRefused
from trainers.stages.stage import adapter_info

Result = TypeVar("Result")
FIRST_PAUSE = 0.5
"""Seconds before a failed request is tried again; doubles with each failure in a row."""


class NoServerLeft(ValueError):
    """Every server has been dropped."""


@dataclass
class _Member:
    """A server and its failures."""

    server: SamplingServer
    failures: int = 0
    """In a row; requests that fail together count once."""
    failed_at: float = 0.0
    """`time.monotonic()` of the last one counted."""
    resume_at: float = 0.0
    """No request is sent before then."""
    lost: bool = False


class ServerPool:
    """The servers that sample for one PPO run; adapters are written where they can read them."""

    def __init__(
        self,
        cfg: Config,
        section: ServersSection,
        run: RunFolder,
        model: RoleModel,
        stop: StopTokens,
    ) -> None:
        self.section, self._model = section, model
        self._sampling, self._stop_ids = Sampling.of(cfg.generation), stop.stop_ids
        self._info = adapter_info(cfg, run, stop.tokenizer, "ppo")
        self._folder = Path(section.adapter_dir or run.stage("ppo") / "served")
        key = os.environ.get(section.api_key_variable)
        self._members = [_Member(SamplingServer(url, key, section.timeout)) for url in section.urls]
        self._lock = threading.Lock()
        self._run_mark, self._count = secrets.token_hex(4), 0
        self._served: str | None = None

    @property
    def live(self) -> list[str]:
        """Addresses of the servers that have not been dropped; on rank 0."""
        return [member.server.url for member in self._members if not member.lost]

    def sample(
        self, role: Role, prompts: Sequence[Sequence[int]], seed: Sequence[int]
    ) -> list[ServedResponse]:
        """Responses of `role` to all prompts, on every rank.

        Raises:
            NoServerLeft: every server was dropped.
            ValueError: a server refuses a request.
        """
        result: Any = None  # the adapter's name, then the responses, or what went wrong
        bare = self._model.adapter_names[role] is None
        with gathered([] if bare else adapter_parameters(self._model, role)):
            if rank() == 0 and not bare:
                result = _result_or_error(self._publish, role)
        if rank() == 0 and not isinstance(result, Exception):
            result = _result_or_error(self._sample_all, result, prompts, seed)
        result = from_rank_zero(result)
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Unloads the last adapter from the servers that can be reached."""
        if rank() == 0:
            self._unpublish(self._served)
            self._served = None

    def _publish(self, role: Role) -> str | None:
        """Writes the role's adapter and loads it everywhere under a new name, which it returns.

        None for an adapter that changes nothing yet: the base model answers the same.
        """
        state = adapter_state(self._model, role)
        if not any(bool(tensor.any()) for name, tensor in state.items() if ".lora_B." in name):
            return None
        self._count += 1
        name = f"{role}-{self._run_mark}-{self._count}"
        folder = self._folder / name
        save_adapter(folder, state, self._model.lora[role], self._info)
        path = str(folder.resolve())
        for member in self._members:
            self._try(member, lambda member=member: member.server.load(name, path))
        self._check_some_left()
        old, self._served = self._served, name
        self._unpublish(old)
        return name

    def _unpublish(self, name: str | None) -> None:
        """Unloads an adapter and removes its folder."""
        if name is None:
            return
        for member in self._members:
            if not member.lost:
                try:
                    member.server.unload(name)
                except (ServerLost, ServerRefused) as error:
                    print(f"could not unload {name}: {error}", file=sys.stderr, flush=True)
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _try(self, member: _Member, work: Callable[[], Result]) -> Result | None:
        """The result of `work`, repeated until it succeeds; None once the server is dropped."""
        while not member.lost:
            time.sleep(max(0.0, member.resume_at - time.monotonic()))
            started = time.monotonic()
            try:
                result = work()
            except ServerLost as error:
                self._failed(member, started, error)
                continue
            with self._lock:
                if started >= member.failed_at:
                    member.failures = 0
            return result
        return None

    def _failed(self, member: _Member, started: float, error: ServerLost) -> None:
        """Counts a failure and sets a pause; drops the server after too many in a row."""
        with self._lock:
            if member.lost or started < member.failed_at:
                return  # began before the last failure: the same one
            now = time.monotonic()
            member.failures += 1
            member.failed_at = now
            member.resume_at = now + FIRST_PAUSE * 2 ** (member.failures - 1)
            member.lost = member.failures > self.section.retries
            if member.lost:
                print(
                    f"sampling server dropped after {member.failures} failures: {error}; "
                    f"left: {', '.join(self.live) or 'none'}",
                    file=sys.stderr,
                    flush=True,
                )

    def _check_some_left(self) -> None:
        if not self.live:
            raise NoServerLeft(
                f"none of the sampling servers answers any more: {', '.join(self.section.urls)}"
            )

    def _sample_all(
        self, name: str | None, prompts: Sequence[Sequence[int]], seed: Sequence[int]
    ) -> list[ServedResponse]:
        """One response to each prompt; every live server takes the next prompt as it gets free."""
        self._check_some_left()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(prompts)):
            waiting.put(i)
        found: dict[int, ServedResponse] = {}
        refused: list[ServerRefused] = []
        finished = threading.Event()

        def sample_one(member: _Member, model: str, i: int) -> None:
            options = (self._sampling, self._stop_ids, prompt_seed(seed, i))
            response = self._try(member, lambda: member.server.sample(model, prompts[i], *options))
            if response is None:
                waiting.put(i)
                return
            found[i] = response
            if len(found) == len(prompts):
                finished.set()

        def work(member: _Member, model: str) -> None:
            while not (finished.is_set() or member.lost):
                with contextlib.suppress(queue.Empty):
                    i = waiting.get(timeout=0.1)
                    try:
                        sample_one(member, model, i)
                    except ServerRefused as error:
                        refused.append(error)
                        finished.set()

        threads: list[threading.Thread] = []
        for member in self._members:
            model = name or self._try(member, member.server.base_model)
            if model is not None and not member.lost:
                threads += [
                    threading.Thread(target=work, args=(member, model), daemon=True)
                    for _ in range(min(self.section.requests_per_server, len(prompts)))
                ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if refused:
            raise refused[0]
        if len(found) < len(prompts):
            self._check_some_left()
        return [found[i] for i in range(len(prompts))]


def _result_or_error(work: Callable[..., Any], *arguments: object) -> Any:
    try:
        return work(*arguments)
    except (NoServerLeft, ServerRefused) as error:
        return error


def prompt_seed(seed: Sequence[int], prompt: int) -> int:
    """A seed in [0, 2^31) that belongs to one prompt of one batch."""
    return int(np.random.SeedSequence([*seed, prompt]).generate_state(1)[0] >> 1)


def compare(
    role: Role, responses: Sequence[ServedResponse], rollout: Rollout, limit: float
) -> dict[str, float]:
    """Mean and largest difference between the servers' log-probabilities and the trainer's.

    Args:
        role: who answered; `reference` is compared with the reference's, others with the policy's.
        rollout: the same responses, scored by the trainer.
        limit: nats, of the mean.

    Raises:
        ValueError: the mean difference is over the limit.
    """
    own = rollout.ref_logprobs if role == "reference" else rollout.logprobs
    theirs = torch.tensor([p for response in responses for p in response.logprobs])
    gaps = (own[rollout.response_mask].cpu() - theirs).abs()
    mean, most = float(gaps.mean()), float(gaps.max())
    if not mean <= limit:
        raise ValueError(
            f"the servers' log-probabilities differ from the trainer's by {mean:.3g} nats a token "
            f"(at most {most:.3g}); generation.servers.max_logprob_gap allows {limit:g}. Do the "
            "servers run the same backbone? vLLM needs --logprobs-mode processed_logprobs where "
            "generation.temperature is not 1; half precision may need a wider limit"
        )
    return {"ppo/sampler_gap": mean, "ppo/sampler_gap_max": most}
