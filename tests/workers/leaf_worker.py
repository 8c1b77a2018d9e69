"""What tests/engine/test_whole_layers.py runs on two ranks: collectives of a pass under ZeRO-3."""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from chatllama.config.schema import DeepSpeedSection, GenerationSection
from chatllama.generation.decoding_batch import DecodingBatch, Request
from chatllama.generation.sampling import Sampling
from chatllama.model.scoring import response_logprobs
from chatllama.runtime.distributed import rank, shut_down
from tests.workers import engine_worker
from tests.workers.engine_worker import build, data, step, weights
from trainers.engine.engine import Engine
from trainers.engine.start import initialise
from trainers.ppo.rollout import _sampling

NEW = 6


def count_gathers() -> list[int]:
    """Grows by one for each collective that fetches weights."""
    from deepspeed.runtime.zero import partition_parameters

    module = cast(Any, partition_parameters)
    counted: list[int] = []
    gather = module._dist_allgather_fn

    def counting(own: torch.Tensor, whole: torch.Tensor, group: object = None) -> object:
        counted.append(1)
        return gather(own, whole, group)

    module._dist_allgather_fn = counting
    return counted


def adapters_in_their_own_type() -> Any:
    """Float32 adapters of a bfloat16 model are sent as they are inside."""
    from deepspeed.runtime.zero import partition_parameters

    return mock.patch.object(partition_parameters, "has_comm_dtype", lambda parameter: False)


def sample(engine: Engine, gathers: list[int]) -> tuple[list[list[int]], list[int]]:
    """Greedy answers of the policy, and the collectives of each step."""
    engine.model.eval()
    prompts = [[5 + rank(), 6, 7], [8, 9], [10, 11, 12, 13 + rank()]]
    requests = [Request(p, Sampling(NEW, 0.0), [], torch.zeros(NEW)) for p in prompts]
    steps, produced = [], [[] for _ in prompts]
    section = GenerationSection(max_new_tokens=NEW)
    with engine.gathered_model(), _sampling(engine, "policy", section):
        batch = DecodingBatch(engine.model.llama, len(prompts))
        sampled = batch.admit(requests)
        while batch.running:
            for one in sampled:
                produced[one.row].append(one.token)
            before = len(gathers)
            sampled = batch.step()
            steps.append(len(gathers) - before)
    engine.model.train()
    return produced, steps


def run(base: str, dtype: str, gathers: list[int]) -> dict[str, Any]:
    """A step of training, answers, scores, and two more steps."""
    engine = build(base, stage=3, dtype=dtype)
    engine._gather = False
    out: dict[str, Any] = {"losses": [step(engine, 1)]}
    out["answers"], out["steps"] = sample(engine, gathers)
    tokens, mask, response_mask = data()
    before = len(gathers)
    with torch.no_grad(), engine.whole_layers():
        scores = response_logprobs(engine.model, "policy", tokens, mask, response_mask, 0.8)
    out["scoring"] = len(gathers) - before
    out["logprobs"] = scores.logprobs.flatten().tolist()
    out["losses"] += [step(engine, number) for number in (2, 3)]
    trained = weights(engine, trained=True)
    out["weights"] = {name: tensor.flatten().tolist() for name, tensor in trained.items()}
    return out


def whole_after_scoring(base: str) -> list[str]:
    """Parameters that scoring has changed where DeepSpeed keeps small ones whole; none may be."""
    expected = build(base, stage=3, dtype="bfloat16")
    with mock.patch.object(
        engine_worker, "deepspeed_section", lambda stage: DeepSpeedSection(stage=stage)
    ):
        engine = build(base, stage=3, dtype="bfloat16")
    tokens, mask, response_mask = data()
    with torch.no_grad(), engine.whole_layers():
        response_logprobs(engine.model, "policy", tokens, mask, response_mask, 0.8)
    pairs = zip(engine.model.named_parameters(), expected.model.parameters(), strict=True)
    return [
        name
        for (name, own), other in pairs
        if not torch.equal(engine.whole_value(own), expected.whole_value(other))
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    initialise(DeepSpeedSection())
    gathers = count_gathers()
    out = {dtype: run(arguments.base, dtype, gathers) for dtype in ("float32", "bfloat16")}
    out["kept whole"] = {"changed": whole_after_scoring(arguments.base)}
    with adapters_in_their_own_type():
        out["plain bfloat16"] = run(arguments.base, "bfloat16", gathers)
    cast(Any, Engine).whole_layers = lambda engine: nullcontext()
    out["plain float32"] = run(arguments.base, "float32", gathers)
    (arguments.folder / f"passes-{rank()}.json").write_text(json.dumps(out))
    shut_down()


if __name__ == "__main__":
    main()
