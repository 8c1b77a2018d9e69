"""How PPO's health alarms do in small worlds: failures planted in them, and clean runs.

    nice -n 19 python benchmarks/alarms.py runs/alarms.jsonl            # goes on where it ended
    python benchmarks/alarms.py runs/alarms.jsonl --table docs/health.md

21 failures in 20 worlds each, 200 clean runs and 20 with a learned reward that is held back by
its KL penalty, of 40 steps: about 45 CPU minutes on one core.
Each run is a line of the file with its steps' metrics; alarms are computed from them, so that
thresholds can be tried without training again. The worlds are in `alarm_worlds.py`.
"""

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple, get_args

import torch
from alarm_worlds import FAULTS, NOW, STEPS, Half, World, gold, ids, learned

from chatllama.config.ppo import DiagnosisName, HealthSection
from trainers.ppo.health.monitor import HealthMonitor
from trainers.ppo.health.rules import RULES

NEEDED = frozenset(name for rule in RULES for name in rule.needs)
WORLDS, CLEAN_A_WORLD = 10, 10
"""Worlds of each half; clean runs for each of them (of as many worlds of their own)."""
MOST_FALSE = 1.0
"""False alarms of a threshold per 1,000 clean steps."""
BEGIN, END = "<!-- alarms: written by benchmarks/alarms.py -->", "<!-- end of alarms -->"
GRID: dict[str, tuple[DiagnosisName, tuple[float, ...]]] = {
    "max_ratio": ("ratio_explosion", (10, 30, 100, 300)),
    "max_approx_kl": ("ratio_explosion", (0.05, 0.1, 0.2, 0.4)),
    "max_grad_norm_factor": ("grad_norm_explosion", (3, 5, 10, 20)),
    "max_kl_token": ("kl_explosion", (0.25, 0.5, 1, 2)),
    "max_surprise_errors": ("sampling_mismatch", (3, 4, 5, 6, 8)),
    "min_kl_errors": ("negative_kl", (2, 3, 4, 6)),
    "max_clip_fraction": ("clip_fraction_high", (0.2, 0.3, 0.4, 0.5)),
    "max_rescore_gap": ("scores_not_repeatable", (0.1, 0.25, 0.5, 0.75)),
    "score_drop_errors": ("score_falling", (2, 3, 4, 5)),
    "gold_drop_errors": ("reward_hacking", (2, 3, 4, 6)),
    "max_eos_drop": ("eos_rate_falling", (0.1, 0.2, 0.3, 0.4)),
    "max_length_factor": ("length_drift", (1.5, 2, 3, 4)),
    "min_entropy_fraction": ("entropy_collapse", (0.4, 0.3, 0.2, 0.1)),
    "min_explained_variance": ("critic_explained_variance_negative", (0, -0.05, -0.2, -0.5)),
}
"""Thresholds that are tried, the strictest first."""


class Run(NamedTuple):
    """A run as the table counts it."""

    fault: str
    half: Half
    steps: list[dict[str, float]]
    fell: int | None
    """First step at which gold had fallen."""


def planned() -> Iterator[tuple[str, Half, int]]:
    """Every run, in an order in which any beginning is a fair sample."""
    for number in range(WORLDS):
        for half in get_args(Half):
            clean = range(number * CLEAN_A_WORLD, (number + 1) * CLEAN_A_WORLD)
            yield from (("clean", half, seed) for seed in clean)
            yield from ((name, half, number) for name in FAULTS if name != "clean")


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that were made."""
    return [json.loads(line) for line in file.open()] if file.is_file() else []


def run(name: str, half: Half, seed: int) -> dict[str, Any]:
    """One run: the metrics that the rules need and gold of every step, up to the first NaN.

    `gold` is the mean of the step's own answers, `gold_se` its standard error.
    """
    started, fault, world = time.process_time(), FAULTS[name], World(half, seed)
    NOW.gold = world.gold()
    steps: list[dict[str, float]] = []
    marks: list[tuple[float, float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextmanager(fault.patches)())
        NOW.score = fault.score(NOW.gold, 0)
        trainer = world.trainer(folder, fault)
        members = learned(trainer, world, NOW.gold) if fault.learned else []
        proxy = (lambda *pair: fmean(each(*pair) for each in members)) if members else NOW.gold
        NOW.score = fault.score(proxy, 0)
        state = trainer.start()
        while state.step < STEPS and (not marks or all(map(math.isfinite, steps[-1].values()))):
            NOW.score = fault.score(proxy, state.step + 1)
            fault.before_step(trainer, state.step + 1)
            asked = trainer._prompts(state.step)
            state, _, texts, metrics = trainer.advance(state)
            given = [record["text"] for record in asked for _ in range(len(texts) // len(asked))]
            pairs = list(zip(given, texts, strict=True))
            if members:
                spread = [stdev(each(ids(p), ids(t)) for each in members) for p, t in pairs]
                metrics["ppo/ensemble_disagreement"] = fmean(spread)
                metrics = {k: v for k, v in metrics.items() if "eval_gold" not in k}
            kept = NEEDED | {key for key, value in metrics.items() if not math.isfinite(value)}
            steps.append({key: metrics[key] for key in kept & metrics.keys()})
            values = [gold(*pair) for pair in pairs]
            marks.append((fmean(values), stdev(values) / math.sqrt(len(values))))
    return {
        "fault": name, "half": half, "seed": seed, "steps": steps,
        "gold": [mean for mean, _ in marks], "gold_se": [error for _, error in marks],
        "cpu_seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


def make(file: Path) -> None:
    """Makes the runs that the file lacks."""
    torch.set_num_threads(1)
    done = {(each["fault"], each["half"], each["seed"]) for each in read(file)}
    file.parent.mkdir(parents=True, exist_ok=True)
    for key in planned():
        if key not in done:
            line = json.dumps(run(*key))
            with file.open("a") as out:
                out.write(line + "\n")


def gold_fell(gold: Sequence[float], errors: Sequence[float]) -> int | None:
    """The first of two steps in which gold, mean of three, is 3 standard errors below its best."""
    best, before = (-math.inf, 0.0), False
    for step in range(3, len(gold) + 1):
        mean = fmean(gold[step - 3 : step])
        error = math.sqrt(sum(each**2 for each in errors[step - 3 : step])) / 3
        low = mean < best[0] - 3 * math.hypot(error, best[1])
        if low and before:
            return step - 1
        best, before = max(best, (mean, error)), low
    return None


def alarms(one: Run, section: HealthSection) -> list[tuple[str, int]]:
    """Name and step of every diagnosis that the monitor makes."""
    monitor = HealthMonitor(section)
    steps = enumerate(one.steps, start=1)
    return [(each.name, step) for step, metrics in steps for each in monitor.observe(step, metrics)]


def false_rate(runs: Sequence[Run], section: HealthSection, name: str | None = None) -> float:
    """Alarms per 1,000 steps of clean runs: of one diagnosis, or the sum over all.

    A run counts for a diagnosis where it has the metrics that one of its rules needs.
    """
    told = [Counter(found for found, _ in alarms(each, section)) for each in runs]
    metrics, rate = [set().union(*each.steps) for each in runs], 0.0
    for diagnosis in [name] if name else get_args(DiagnosisName):
        needs = [set(rule.needs) for rule in RULES if rule.name == diagnosis]
        judged = [i for i, has in enumerate(metrics) if any(need <= has for need in needs)]
        steps = sum(len(runs[i].steps) for i in judged)
        rate += 1000 * sum(told[i][diagnosis] for i in judged) / max(steps, 1)
    return rate


def calibrated(clean: Sequence[Run]) -> dict[str, float]:
    """Of each threshold the strictest with few false alarms; the laxest where none has."""
    chosen: dict[str, float] = {}
    for key, (name, values) in GRID.items():
        fits = (v for v in values if false_rate(clean, _section({key: v}), name) <= MOST_FALSE)
        chosen[key] = next(fits, values[-1])
    return chosen


def _section(values: dict[str, float]) -> HealthSection:
    return HealthSection.model_validate(HealthSection().model_dump() | values)


def _named(runs: Sequence[Run], section: HealthSection) -> list[tuple[Run, int | None, int | None]]:
    """Each run with the step of the first diagnosis that names its fault, and of any."""
    found = []
    for each in runs:
        told = alarms(each, section)
        own = [step for name, step in told if name in FAULTS[each.fault].told_by]
        found.append((each, min(own, default=None), min((s for _, s in told), default=None)))
    return found


def faults_table(runs: Sequence[Run], section: HealthSection) -> Iterator[str]:
    """How each failure is told, and how long before gold falls."""
    yield "| planted failure | named | told at all | median step | gold fell | median lead, steps |"
    yield "|---|---|---|---|---|---|"
    for fault in FAULTS:
        of = _named([each for each in runs if each.fault == fault], section)
        if fault == "clean" or not of:
            continue
        steps = [own for _, own, _ in of if own is not None]
        told = [step for *_, step in of if step is not None]
        fell = [each for each in of if each[0].fell is not None]
        leads = [each.fell - step for each, _, step in fell if each.fell and step is not None]
        named = f"{len(steps)} of {len(of)}" if FAULTS[fault].told_by else "none is due"
        yield (
            f"| {fault} | {named} | {len(told)} of {len(of)} | {_middle(steps or told)} | "
            f"{len(fell)} of {len(of)} | {_middle(leads)} |"
        )


def _middle(numbers: Sequence[float]) -> str:
    return f"{median(numbers):g}" if numbers else ""


def thresholds_table(runs: Sequence[Run], chosen: dict[str, float]) -> Iterator[str]:
    """False alarms and named failures with each threshold as it is and as it was calibrated."""
    own = HealthSection()
    halves = {half: [each for each in runs if each.half == half] for half in get_args(Half)}
    clean = {half: [each for each in of if each.fault == "clean"] for half, of in halves.items()}
    yield "| key | default | false alarms | calibrated | false alarms | failures named |"
    yield "|---|---|---|---|---|---|"
    for key, (name, _) in GRID.items():
        named, rates = list[str](), list[str]()
        for section in (own, _section({key: chosen[key]})):
            rates.append(" / ".join(f"{false_rate(clean[h], section, name):.1f}" for h in clean))
            faulty = [f for f in halves["held-out"] if name in FAULTS[f.fault].told_by]
            hits = sum(any(told == name for told, _ in alarms(f, section)) for f in faulty)
            named.append(f"{hits}")
        cells = f"{vars(own)[key]:g} | {rates[0]} | {chosen[key]:g} | {rates[1]}"
        yield f"| `{key}` | {cells} | {named[0]} -> {named[1]} of {len(faulty)} |"


def table(file: Path) -> str:
    """Both tables with what they were made from, as Markdown."""
    runs = [
        Run(r["fault"], r["half"], r["steps"], gold_fell(r["gold"], r["gold_se"]))
        for r in read(file)
    ]
    clean = [each for each in runs if each.fault == "clean"]
    fell = sum(each.fell is not None for each in clean)
    chosen = calibrated([each for each in clean if each.half == "calibration"])
    faulty, rest = (
        sum(bool(FAULTS[each.fault].told_by) for each in runs),
        [each for each in clean if each.half == "held-out"],
    )
    return "\n".join(
        [
            BEGIN,
            f"{faulty} runs with a planted failure, {len(clean)} clean ones ({len(rest)} of them "
            f"held out, in worlds with gold of another kind), of {STEPS} steps, by "
            f"`benchmarks/alarms.py`. Gold fell in {fell} clean runs. With the defaults it makes "
            f"{false_rate(rest, HealthSection()):.1f} false alarms in 1,000 clean held-out steps, "
            f"with the calibrated thresholds {false_rate(rest, _section(chosen)):.1f}.",
            "With the defaults, of both halves:",
            "",
            *faults_table(runs, HealthSection()),
            "",
            "False alarms are of the one diagnosis, per 1,000 clean steps that it can judge, "
            "calibration / held-out half. Calibrated is the strictest value tried with at most "
            f"{MOST_FALSE:g} in the calibration half. Failures named: of the held-out runs whose "
            "failure the diagnosis is for, default -> calibrated.",
            "",
            *thresholds_table(runs, chosen),
            END,
        ]
    )


def main() -> None:
    """Makes the runs, or writes the table."""
    parser = argparse.ArgumentParser(description="how PPO's health alarms do in small worlds")
    parser.add_argument("runs", type=Path, help="JSONL file of the runs")
    parser.add_argument("--table", type=Path, help="Markdown file that gets the table")
    arguments = parser.parse_args()
    if arguments.table is None:
        make(arguments.runs)
        return
    text = arguments.table.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    new = f"{before}{table(arguments.runs)}{rest.partition(END)[2]}"
    arguments.table.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
