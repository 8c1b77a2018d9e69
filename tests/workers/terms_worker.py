"""What tests/ppo/terms/test_terms_on_ranks.py runs in one process and, launched, on two ranks.

Heavy imports are inside: the processes of a reward function import this module, too.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
WORDS = ["a river", "it", "a garden is it", "river", "what is a garden", "it it", "slow"]


def scores(terms: list[dict[str, Any]]) -> tuple[list[list[float]], str]:
    """Every term's score of every answer, and what the first says of one that it fails for."""
    import torch
    from ppo_runs import sample_of

    from chatllama.config.schema import Config
    from trainers.functions.functions import RewardFunction
    from trainers.functions.sample import judged
    from trainers.ppo.rewards import Scorer

    changes = {"run_dir": "r", "backbone": {"path": "b"}}
    scorer = Scorer(Config.model_validate({**changes, "ppo": {"rewards": terms}}), [])
    samples = [sample_of("what is it", text, answer=number) for number, text in enumerate(WORDS)]
    found = scorer.term_scores(torch.zeros(len(samples), 0), samples).tolist()
    function, error = scorer.terms[0].judge, ""
    assert isinstance(function, RewardFunction) and function.pool is not None
    try:
        judged(function, [*samples[:2], sample_of("what is it", "bad", answer=1)])
    except ValueError as problem:
        error = str(problem)
    function.pool.close()
    return found, error


def main() -> None:
    from chatllama.config.schema import DeepSpeedSection
    from chatllama.runtime.distributed import rank, shut_down
    from trainers.engine.start import initialise

    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("terms", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    initialise(DeepSpeedSection())
    found = scores(json.loads(arguments.terms.read_text()))
    (arguments.folder / f"out-{rank()}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    main()
