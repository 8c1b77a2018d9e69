"""`chatllama judge FIRST SECOND`: answers of two sides, a judge, a win rate with its interval."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from chatllama.inference.folders import find_model
from chatllama.runtime.declared_options import check_limits
from chatllama.runtime.files import replace_text, write_json
from chatllama.runtime.jsonl import json_line
from trainers.judging.judges import Judgement, by_gold, by_reward, by_votes, gold_judge
from trainers.judging.llm_judge import by_model, read_template
from trainers.judging.options import JudgeOptions
from trainers.judging.sides import Comparison, compare, find_questions, find_sides, root_of
from trainers.judging.sources import data_source
from trainers.judging.win_rate import summarise

JUDGES = ("reward", "gold", "votes", "judge_url")
OF_MODELS = ("judge_model", "judge_prompt", "per_minute", "price_in", "price_out")
"""Options that only a judge behind an API follows."""
OF_ANSWERS = ("data", "limit", "temperature", "max_new_tokens", "dtype", "quantization")
"""Options that votes, which have their answers, do not follow."""


def judge(first: str, second: str | None, options: JudgeOptions) -> dict[str, Any]:
    """The win rate of the second side, printed and written into a folder with every comparison.

    Raises:
        ValueError: a side, prompts or judge that is not there, or options that do not fit.
    """
    kind = _check(options, second)
    datasets.disable_progress_bars()
    if kind == "votes":
        assert options.votes is not None and second is not None
        names = (first, second)
        folder = options.out or options.votes.parent / "judged" / _versus(names)
        comparisons, judgement = by_votes(options.votes, first, second)
    else:
        sides = find_sides(first, second)
        _find_judge(options)
        if all(side.file is not None for side in sides):
            _refuse(options, ("temperature", "max_new_tokens"), "files of answers")
        names = (sides[0].name, sides[1].name)
        on = f"-on-{Path(data_source(options.data).path).stem}" if options.data else ""
        folder = options.out or root_of(sides) / "judged" / f"{_versus(names)}{on}"
        questions = find_questions(sides, options)
        comparisons = compare(sides, questions, options, folder)
        match kind:
            case "reward":
                place = str(options.reward)
                judgement = by_reward(comparisons, place, options, options.batch_size)
            case "gold":
                judgement = by_gold(comparisons, str(options.gold))
            case _:
                judgement = by_model(comparisons, options, folder)
    result = {"first": names[0], "second": names[1], **measure(comparisons, judgement)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind.removesuffix('_url')}.json"
    write_json(path, result)
    lines = folder / f"{path.stem}-comparisons.jsonl"
    replace_text(lines, "".join(json_line(line) for line in _lines(comparisons, judgement)))
    print("\n".join(report(result)))
    print(f"written: {path}, {lines}")
    return result


def _check(options: JudgeOptions, second: str | None) -> str:
    """The judge; ValueError for an option that does not fit it."""
    check_limits(options)
    given = [name for name in JUDGES if getattr(options, name) is not None]
    if len(given) != 1:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in JUDGES)
        raise ValueError(f"give one judge of {flags}; given: {len(given)}")
    (kind,) = given
    unused = () if kind == "judge_url" else OF_MODELS
    if kind == "votes":
        unused = (*unused, *OF_ANSWERS)
        if second is None:
            raise ValueError("--votes: name both models as the page does, such as: sft policy")
    _refuse(options, unused, f"--{kind.replace('_', '-')}")
    return kind


def _refuse(options: JudgeOptions, names: Sequence[str], what: str) -> None:
    """Raises ValueError for an option that `what` would not follow."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for {what}")


def _find_judge(options: JudgeOptions) -> None:
    """Raises ValueError, before anything is answered, for a judge that is not there."""
    if options.gold is not None:
        gold_judge(options.gold)
    elif options.reward is not None:
        find_model(options.reward)
    elif options.judge_model is None:
        raise ValueError("--judge-url needs --judge-model NAME, the model's name in the API")
    else:
        read_template(options.judge_prompt)


def _versus(names: Sequence[str]) -> str:
    """A folder's name: the second against the first, without what both begin with."""
    first, second = ([*re.split(r"[/:]", name.strip("/"))] for name in names)
    while len(first) > 1 and len(second) > 1 and first[0] == second[0]:
        first, second = first[1:], second[1:]
    return re.sub(r"[^\w.-]+", "-", f"{'-'.join(second)}-vs-{'-'.join(first)}")


def measure(comparisons: Sequence[Comparison], judgement: Judgement) -> dict[str, Any]:
    """The result as JSON values: over all comparisons, by category and by turn.

    Raises:
        ValueError: no comparison has an outcome.
    """
    kept = [i for i, outcome in enumerate(judgement.outcomes) if outcome is not None]
    if not kept:
        raise ValueError(f"{judgement.by} decided none of {len(comparisons)} comparisons")

    def part(rows: Sequence[int]) -> dict[str, Any]:
        some = [comparisons[i] for i in rows]
        orders = judgement.orders and [judgement.orders[i] for i in rows]
        return summarise(
            np.array([judgement.outcomes[i] for i in rows], dtype=float),
            np.array([len(c.second.response) - len(c.first.response) for c in some], dtype=float),
            [c.cluster for c in some],
            np.array(orders, dtype=float) if orders else None,
        )

    found = {"judge": judgement.by, **part(kept), "left_out": len(comparisons) - len(kept)}
    for name, keys in (
        ("categories", [each.category for each in comparisons]),
        ("turns", [f"turn {each.turn}" for each in comparisons]),
    ):
        counts = Counter(keys[i] for i in kept)
        several = len(counts) > 1
        found[name] = {
            str(key): part([i for i in kept if keys[i] == key]) for key in sorted(counts, key=str)
        } if several else {}  # fmt: skip
    return found | judgement.numbers


def _lines(comparisons: Sequence[Comparison], judgement: Judgement) -> Iterator[dict[str, Any]]:
    """A line for each comparison."""
    for number, (each, outcome) in enumerate(zip(comparisons, judgement.outcomes, strict=True)):
        line: dict[str, Any] = {"where": each.first.where, "turn": each.turn}
        line |= {"category": each.category} if each.category else {}
        line |= {"prompt": each.first.prompt, "first": each.first.response}
        line |= {"second": each.second.response, "outcome": outcome}
        yield line | (judgement.details[number] if judgement.details else {})


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines of a terminal, in percent."""
    counts = f"{found['comparisons']} comparisons on {found['prompts']} prompts"
    left_out = f", {found['left_out']} left out" if found["left_out"] else ""
    yield f"{found['second']} against {found['first']}, by {found['judge']}: {counts}{left_out}"
    sums = ", ".join(f"{found[name]} {name}" for name in ("wins", "ties", "losses"))
    yield f"  win rate           {_interval(found['win_rate'])}, {sums}"
    yield f"  length-controlled  {_interval(found['length_controlled']['win_rate'])}"
    if longer := found["longer_preferred"]:
        mean = found["mean_length_difference"]
        yield f"  the longer wins    {_interval(longer)}; {mean:+.1f} characters on average"
    if scores := found.get("scores"):
        first, second, gap = (
            f"{each['mean']:.3f} \N{PLUS-MINUS SIGN} {each['se']:.3f}" for each in scores.values()
        )
        yield f"  score              {second} against {first}; difference {gap}"
    if position := found["position"]:
        if shown := position["first_shown"]:
            decided = position["decided"]
            yield f"  first shown wins   {_interval(shown)} of {decided} decided verdicts"
        yield f"  both orders agree  {_interval(position['consistent'])}"
    if side := found.get("left_side_wins"):
        yield f"  left side wins     {100 * side['value']:.1f} % of {side['decided']} decided votes"
    if found.get("unreadable") or found.get("failed"):
        total = found["verdicts"]
        yield f"  not read           {found['unreadable']} of {total}; {found['failed']} failed"
    parts = {**found["categories"], **found["turns"]}
    for name, own in parts.items():
        yield f"  {name}: {_interval(own['win_rate'])} of {own['comparisons']}"


def _interval(found: Mapping[str, float]) -> str:
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"
