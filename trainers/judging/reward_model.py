"""Reward models behind one door: of a run, an adapter alone, or a folder of plain transformers."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chatllama.config.schema import with_weights
from chatllama.inference.answerer import Answerer
from chatllama.inference.folders import find_model
from chatllama.inference.load import load_run, reward_role
from chatllama.inference.options import WeightsOptions
from chatllama.runs.folder import RunFolder
from trainers.functions.sample import Sample
from trainers.ppo.terms.models import ClassifierModel

BATCH_SIZE = 8


@dataclass(frozen=True)
class RewardModel:
    """What gives an answer one number."""

    name: str
    """As it was given on the command line."""
    run: RunFolder
    """The run that it belongs to; of a plain model, its folder."""
    batch_size: int
    longest: int
    """Tokens of a conversation that it reads at most."""
    length: Callable[[Sample], int]
    """Tokens of a conversation."""
    score: Callable[[Sequence[Sample]], list[float]]
    """Scores of a few conversations, in one batch."""

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """A finite score for each; None for one that is longer than the model reads.

        Each conversation is read once: in another batch its score would round otherwise, and equal
        answers would not tie.
        """
        keys = [json.dumps(sample.conversation) for sample in samples]
        distinct = dict(zip(keys, samples, strict=True))
        lengths = {key: self.length(sample) for key, sample in distinct.items()}
        fitting = [key for key, length in lengths.items() if length <= self.longest]
        fitting.sort(key=lengths.__getitem__)
        found = dict[str, float]()
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            for key, score in zip(batch, self.score([distinct[i] for i in batch]), strict=True):
                if not math.isfinite(score):
                    raise ValueError(f"reward model {self.name} gave {score} for {distinct[key]}")
                found[key] = score
        return [found.get(key) for key in keys]


def open_reward_model(
    place: str | Path, options: WeightsOptions, batch_size: int | None = None
) -> RewardModel:
    """The reward model of a run (its whole ensemble), an adapter, or a sequence classifier.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    run, cfg = find_model(place)
    if not run.reward_adapter.is_dir():
        if run.config.is_file():
            raise ValueError(f"{place} has no reward model: {run.reward_adapter} is missing")
        rows = batch_size or BATCH_SIZE
        model = ClassifierModel(str(place), "reward model", rows)
        return RewardModel(
            str(place), run, rows, model.longest,
            lambda sample: len(model.encode(sample)["input_ids"]), model.values,
        )  # fmt: skip
    cfg = with_weights(cfg, options.dtype, options.quantization)
    roles = [reward_role(number) for number in range(len(run.reward_members()))]
    loaded = load_run(run, cfg, roles, options.trust_remote_code)
    answerer = Answerer(loaded, "base")

    def render(sample: Sample) -> list[int]:
        try:
            return answerer.render(sample.conversation, False)
        except ValueError as error:
            raise ValueError(f"{sample.where}: {error}") from error

    return RewardModel(
        str(place), run, batch_size or cfg.generation.batch_size,
        loaded.model.llama.config.max_position_embeddings,
        lambda sample: len(render(sample)),
        lambda samples: answerer.scores([render(sample) for sample in samples]),
    )  # fmt: skip
