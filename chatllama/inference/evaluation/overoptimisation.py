"""`chatllama eval RUN --suite overoptimisation`: best-of-n and PPO judged by gold, over the KL.

PPO's answers are those of its evaluations (RUN/ppo/evaluations.jsonl); best-of-n is sampled here
from PPO's start, for the same prompts, and chosen by the run's reward model. Estimates, fits and
plots are in `reporting/overoptimisation.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatllama.config.schema import Config
from chatllama.inference.evaluation.cli import SuiteOptions
from chatllama.inference.folders import find_model, is_run
from chatllama.inference.options import GenerateOptions, GenerationRole
from chatllama.inference.prompt_files import Prompt
from chatllama.reporting.overoptimisation import (
    Curves,
    Point,
    best_of_n,
    measured_curves,
    overoptimisation_section,
)
from chatllama.reporting.page import write_report
from chatllama.runs.folder import RunFolder
from chatllama.runtime.files import write_json
from chatllama.runtime.json_files import held_to_be_whole
from chatllama.runtime.jsonl import read_lines

SAMPLES = 64
"""Of each prompt, where --n does not say."""
Asked = Sequence[dict[str, Any]]
"""Prompts as RUN/ppo/evaluations.jsonl keeps them: messages, text, where, columns."""
Judge = Callable[[Asked, Sequence[str]], Sequence[float]]
"""Prompts and an answer to each -> gold rewards."""


def evaluate_overoptimisation(
    place: Path, options: SuiteOptions, find_function: Callable[[str, str], Judge]
) -> Curves:
    """Samples, judges, prints the curves, writes RUN/overoptimisation.json and the report.

    Args:
        find_function: from the name of a gold function, and the option or key that names it.

    Raises:
        ValueError: PPO was not evaluated, climbed another reward than the run's reward model, or
            nothing is given that judges.
    """
    run, cfg = find_model(place)
    if not is_run(run):
        raise ValueError(f"{place}: over-optimisation is of a run of PPO, and this is none")
    lines = {line["step"]: line for line in read_lines(run.evaluations)}
    if 0 not in lines:
        raise ValueError(
            f"{run.evaluations} holds no answers of PPO's start: they are written at the end of "
            "PPO, where evaluation.num_prompts is not 0; in a finished run of an older version "
            "`chatllama run CONFIG --from ppo` trains PPO again and keeps them"
        )
    rewards = cfg.ppo.rewards
    if len(rewards) != 1 or rewards[0].adapter != "run":
        raise ValueError(
            "--suite overoptimisation: ppo.rewards is not the run's reward model alone, so "
            "best-of-n cannot be chosen by what PPO climbed"
        )
    judge, name = _find_gold(run, cfg, options.gold, find_function)
    with held_to_be_whole(run.evaluations):
        asked = lines[0]["prompts"][: options.limit]
    if len(asked) < 2:
        raise ValueError("--suite overoptimisation: one prompt has no standard error; give more")
    n = options.n or SAMPLES
    samples = _sample(place, run, cfg, asked, n, options)
    each = [prompt for prompt in asked for _ in range(n)]
    shape = (len(asked), n)
    proxy = np.reshape([line["score"] for line in samples], shape)
    gold = np.reshape(judge(each, [line["response"] for line in samples]), shape)
    counts = [2**k for k in range(n.bit_length()) if 2**k < n] + [n]
    ppo: list[Point] = []
    with held_to_be_whole(run.evaluations):
        for step, line in sorted(lines.items()):
            parts = [line[key][: len(asked)] for key in ("answers", "scores")]
            kl = line["kl"][: len(asked)] if step else [0.0] * len(asked)
            ppo.append(Point(step, kl, judge(asked, parts[0]), parts[1]))
    best = [best_of_n(proxy, gold, n) for n in counts]
    curves = measured_curves(name, n, best, ppo)
    write_json(run.overoptimisation, curves)
    print("\n".join(_table(run)))
    print(f"written: {run.overoptimisation}, {write_report(run)}")
    return curves


def _find_gold(
    run: RunFolder, cfg: Config, given: str | None, find_function: Callable[[str, str], Judge]
) -> tuple[Judge, str]:
    """Who judges, and its name: --gold, the config's gold, or the worst of the run's ensemble."""
    if given is not None and ":" in given:
        return find_function(given, "--gold"), given
    if given is not None:
        return _reward_models(*find_model(given)), f"reward model {given}"
    if cfg.evaluation.gold is not None:
        return find_function(cfg.evaluation.gold, "evaluation.gold"), cfg.evaluation.gold
    if len(run.reward_members()) > 1 and cfg.ppo.reward_ensemble == "mean":
        ppo = cfg.ppo.model_copy(update={"reward_ensemble": "min"})
        members = _reward_models(run, cfg.model_copy(update={"ppo": ppo}))
        return members, "the worst member of the run's own reward ensemble"
    raise ValueError(
        "--suite overoptimisation needs a judge that PPO did not climb: evaluation.gold in the "
        "config, --gold module:function, or --gold FOLDER of another run or reward adapter; or a "
        "run whose reward.ensemble is 2 or more"
    )


def _reward_models(run: RunFolder, cfg: Config) -> Judge:
    """The reward model, or ensemble, of a run or adapter as a judge."""
    from chatllama.inference.answerer import Answerer, with_answer
    from chatllama.inference.load import load_run, reward_role

    members = run.reward_members() if run.reward_adapter.is_dir() else []
    if not members:
        raise ValueError(
            f"--gold {run.root}: no run or reward adapter is there; a function is module:function"
        )
    loaded = load_run(run, cfg, [reward_role(number) for number in range(len(members))])
    answerer, size = Answerer(loaded, "reward"), cfg.generation.batch_size

    def judge(asked: Asked, answers: Sequence[str]) -> list[float]:
        talks = [with_answer(p["messages"], a) for p, a in zip(asked, answers, strict=True)]
        rows = [answerer.render(talk, False) for talk in talks]
        starts = range(0, len(rows), size)
        return [score for i in starts for score in answerer.scores(rows[i : i + size])]

    return judge


def _sample(
    place: Path, run: RunFolder, cfg: Config, asked: Asked, n: int, options: SuiteOptions
) -> list[dict[str, Any]]:
    """`n` answers of PPO's start to each prompt, with scores; what is there is kept."""
    from chatllama.inference.batch import generate_command

    role: GenerationRole = "sft" if "sft" in cfg.stages else "base"
    folder = run.root / "benchmarks" / "overoptimisation"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{role}-{len(asked)}x{n}.jsonl"
    prompts = [Prompt(i, each["messages"], each["where"]) for i, each in enumerate(asked)]
    sampled = GenerateOptions(
        role=role,
        num_samples=n,
        batch_size=options.batch_size,
        dtype=options.dtype,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
    )
    generate_command(place, prompts, sampled, out)
    return read_lines(out)


def _table(run: RunFolder) -> list[str]:
    """The curves for the terminal."""
    found = overoptimisation_section(run)
    assert found is not None
    lines = [f"{found['prompts']} prompts, gold: {found['gold']}"]
    for name, rows in found["tables"].items():
        heads = ["step" if name == "PPO" else "n", "KL", "sqrt(KL)", "gold", "proxy"]
        lines.append(name)
        lines += ["  ".join(f"{cell:>15}" for cell in row) for row in [heads, *rows]]
    return [*lines, *found["fits"], found["words"]]
