"""Scores of reward models on other machines: `/v1/score` of `chatllama serve`."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chatllama.config.ppo import RewardSource
from chatllama.runtime.distributed import rank, world_size
from chatllama.runtime.http_client import HttpClient, HttpError
from trainers.functions.sample import Sample

CONVERSATIONS = 16
"""In one request; servers take up to 64."""
SECONDS = 300.0


class ScoreServers:
    """Servers with the same reward model; one that fails is left to the others."""

    def __init__(self, source: RewardSource) -> None:
        timeout = source.timeout or SECONDS
        roots = [url.rstrip("/").removesuffix("/v1") for url in source.urls]
        self.clients = {root: HttpClient(root, None, timeout) for root in roots}

    def rows(self, count: int) -> Sequence[int]:
        """Which of `count` answers this rank requests."""
        return range(rank(), count, world_size())

    def values(self, samples: Sequence[Sample]) -> list[float]:
        """One number for each of this rank's samples; ValueError if no server gives it."""
        starts = range(0, len(samples), CONVERSATIONS)
        parts = [samples[start : start + CONVERSATIONS] for start in starts]
        with ThreadPoolExecutor(len(self.clients)) as threads:
            found = threads.map(self._part, range(len(parts)), parts)
            return [score for scores in found for score in scores]

    def _part(self, number: int, samples: Sequence[Sample]) -> list[float]:
        """Scores from the first server, in turn, that gives them."""
        roots, failures = list(self.clients), list[str]()
        first = (number + rank()) % len(roots)
        body = {"conversations": [sample.conversation for sample in samples]}
        for root in roots[first:] + roots[:first]:
            try:
                answer: Any = json.loads(self.clients[root].send("POST", "/v1/score", body))
                scores = {int(each["index"]): float(each["score"]) for each in answer["data"]}
                return [scores[i] for i in range(len(samples))]
            except HttpError as error:
                failures.append(str(error))
            except (ValueError, KeyError, TypeError) as error:
                failures.append(f"{root}/v1/score gives no scores: {error!r}")
        raise ValueError(f"no server of ppo.rewards scored {samples[0]}: {'; '.join(failures)}")
