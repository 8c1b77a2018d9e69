"""Several runs beside each other: keys that differ, results with errors, paired tests, curves.

Everything is read from the run folders; runs may be unfinished. The HTML is `compare.html.jinja`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from chatllama.config.loader import load_config
from chatllama.reporting.page import environment
from chatllama.reporting.plots import Panel, draw_runs
from chatllama.reporting.statistics import mean_and_error, wilson_interval
from chatllama.reporting.summary import number
from chatllama.runs.folder import RunFolder
from chatllama.runtime.files import replace_text
from chatllama.runtime.json_files import held_to_be_whole, read_json
from chatllama.runtime.jsonl import read_lines

INTERVAL = "interval"
ROWS = (
    ("SFT: held-out loss, nats a token", "sft.eval_loss", None),
    ("reward model: accuracy", "reward.accuracy", INTERVAL),
    ("base: gold score", "base.gold_mean", "base.gold_se"),
    ("SFT: gold score", "sft.gold_mean", "sft.gold_se"),
    ("PPO: gold score", "ppo.gold_mean", "ppo.gold_se"),
    ("base: reward score (raw)", "base.score_mean", "base.score_se"),
    ("SFT: reward score (raw)", "sft.score_mean", "sft.score_se"),
    ("PPO: reward score (raw)", "ppo.score_mean", "ppo.score_se"),
    ("PPO: KL to its start, nats an answer", "ppo.kl", "ppo.kl_se"),
    ("PPO: win rate against its start", "ppo.win_rate", INTERVAL),
    ("PPO: tokens an answer", "ppo.response_length", None),
    ("PPO: answers that end", "ppo.eos_rate", None),
    ("hours", "hours", None),
)
"""Label, name of the value, name of its standard error or that it has a 95 % interval. Scores of
reward models are each its own: between runs only gold can be compared, or scores of the same reward
model."""
CURVES = (
    Panel("Reward score (normalised)", "Training answers; each run by its own reward model.",
          {"": "ppo/score_mean"}),
    Panel("Gold score", "Held-out answers.", {"": "ppo/eval_gold_mean"}),
    Panel("KL to the start", "Nats per training answer.", {"": "ppo/kl_sequence"}),
    Panel("Answer length", "Tokens per training answer.", {"": "ppo/response_length"}),
)  # fmt: skip


@dataclass(frozen=True)
class Paired:
    """PPO's answers of two runs to the same prompts."""

    first: str
    second: str
    judge: str
    """`gold`, or `score` where both were scored by the same reward model."""
    prompts: int
    difference: float
    """Mean of second less first."""
    error: float
    """Standard error of that mean."""
    wins: tuple[float, float, float]
    """Share of prompts on which the second is better, ties one half, with its 95 % interval."""

    @property
    def text(self) -> str:
        """One sentence."""
        low, high = self.difference - 1.96 * self.error, self.difference + 1.96 * self.error
        verdict = "no measurable difference"
        if low > 0 or high < 0:
            verdict = f"{self.second} is {'better' if low > 0 else 'worse'}"
        return (
            f"{self.second} less {self.first} by {self.judge} on {self.prompts} prompts: "
            f"{self.difference:+.3f} (95 % {low:+.3f} to {high:+.3f}), better on "
            f"{100 * self.wins[0]:.0f} % ({100 * self.wins[1]:.0f} to {100 * self.wins[2]:.0f}): "
            f"{verdict}"
        )


@dataclass(frozen=True)
class Untested:
    """Two runs whose answers cannot be compared one by one."""

    first: str
    second: str
    reason: str

    @property
    def text(self) -> str:
        """One sentence."""
        return f"no paired test of {self.second} and {self.first}: {self.reason}"


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Prints the comparison and writes it as a page, `compare.html` beside the first run.

    Raises:
        ValueError: fewer than two runs, one that is none, or two of one name and place.
    """
    runs = {name: RunFolder(folder) for name, folder in _named(folders).items()}
    configs = {name: load_config(run.existing_config()) for name, run in runs.items()}
    values = {name: _values(run) for name, run in runs.items()}
    differing = list(differences({n: c.model_dump() for n, c in configs.items()}))
    rows = [(label, cells) for label, cells in _rows(values) if any(cells)]
    tests = list(paired_tests(runs))
    content = {
        "names": list(runs), "differing": differing, "rows": rows, "tests": tests,
        "plots": list(_plots(runs)),
    }  # fmt: skip
    page = environment().get_template("compare.html.jinja").render(content)
    path = out or runs[next(iter(runs))].root.parent / "compare.html"
    replace_text(path, page)
    print("\n".join(_text(list(runs), differing, rows, tests)))
    print(f"written: {path}")
    return path


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """The runs by the shortest ends of their paths that tell them apart."""
    places = {folder.resolve(): folder for folder in folders}
    if len(places) < 2:
        raise ValueError(f"compare needs at least two runs, not {len(places)}")
    for parts in range(1, 99):
        names = {"/".join(place.parts[-parts:]): folder for place, folder in places.items()}
        if len(names) == len(places):
            return names
    raise AssertionError("paths that are equal in every part")


def _values(run: RunFolder) -> dict[str, Any]:
    """The run's figures by section."""
    found: dict[str, Any] = {}
    if run.evaluation.is_file():
        found |= read_json(run.evaluation)["roles"]
    seconds = 0.0
    for stage in ("sft", "reward", "ppo"):
        if run.result(stage).is_file():
            result = run.read_result(stage)
            seconds += result.get("wall_seconds", 0.0)
            if stage != "ppo":
                found[stage] = found.get(stage, {}) | result
    if seconds:
        found["hours"] = seconds / 3600
    return found


def differences(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Dotted key and its value in each config, where they differ; `run_dir` does not count."""
    flat = {name: dict(_flat(config, "")) for name, config in configs.items()}
    for key in dict.fromkeys(key for values in flat.values() for key in values):
        found = [values.get(key) for values in flat.values()]
        if key != "run_dir" and any(value != found[0] for value in found):
            yield key, found


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            value = {str(place): each for place, each in enumerate(value)}  # data sources, rewards
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rows(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Label and one cell a run."""
    for label, name, error in ROWS:
        cells = []
        for own in values.values():
            value, low, high, spread = (
                number(dict(own), each)
                for each in (name, f"{name}_low", f"{name}_high", error or "")
            )
            cell = "" if value is None else f"{value:.3f}"
            if error == INTERVAL and None not in (value, low, high):
                cell += f" ({low:.3f} to {high:.3f})"
            cells.append(cell if spread is None else f"{cell} \N{PLUS-MINUS SIGN} {spread:.3f}")
        yield label, cells


def paired_tests(runs: Mapping[str, RunFolder]) -> Iterator[Paired | Untested]:
    """Each pair of evaluated runs, where they answered the same prompts and were judged alike."""
    evaluated = {name: run for name, run in runs.items() if run.evaluation.is_file()}
    found = {name: read_json(run.evaluation) for name, run in evaluated.items()}
    for (first, one), (second, other) in combinations(found.items(), 2):
        judged = one.get("judged"), other.get("judged")
        if None in judged:
            reason = "an evaluation.json is of an older version, without each answer's value"
            yield Untested(first, second, reason)
            continue
        names = {"by": "they were judged by different ones", "prompts": "their prompts differ"}
        differing = [words for key, words in names.items() if judged[0][key] != judged[1][key]]
        if differing:
            yield Untested(first, second, " and ".join(differing))
            continue
        pairs = list(zip(*(each["values"]["ppo"] for each in judged), strict=True))
        answers = [_last_answers(runs[name], len(pairs)) for name in (first, second)]
        # Equal answers tie; in another batch their scores round otherwise.
        same = [a is not None and a == b for a, b in zip(*answers, strict=True)]
        difference, error = mean_and_error([theirs - ours for ours, theirs in pairs])
        share = sum(
            0.5 if tie or a == b else float(b > a) for (a, b), tie in zip(pairs, same, strict=True)
        )
        wins = (share / len(pairs), *wilson_interval(share, len(pairs)))
        judge = judged[0]["by"].split()[0]
        yield Paired(first, second, judge, len(pairs), difference, error, wins)


def _last_answers(run: RunFolder, count: int) -> Sequence[str | None]:
    """PPO's answers of the last evaluation; of older versions None each."""
    with held_to_be_whole(run.evaluations):
        kept = read_lines(run.evaluations)[-1]["answers"] if run.evaluations.is_file() else []
    return kept if len(kept) == count else [None] * count


def _plots(runs: Mapping[str, RunFolder]) -> Iterator[tuple[str, str, str]]:
    lines = {}
    for name, run in runs.items():
        with held_to_be_whole(run.metrics("ppo")):
            lines[name] = read_lines(run.metrics("ppo"))
    for panel in CURVES:
        svg = draw_runs(panel, lines)
        if svg is not None:
            yield panel.title, panel.explanation, svg


def _text(
    names: Sequence[str],
    differing: Sequence[tuple[str, list[Any]]],
    rows: Sequence[tuple[str, list[str]]],
    tests: Sequence[Paired | Untested],
) -> Iterator[str]:
    """The comparison as lines of a terminal."""
    table = [("", list(names)), *((key, list(map(str, found))) for key, found in differing), *rows]
    label = max(len(row[0]) for row in table)
    width = [max(len(cells[i]) for _, cells in table) for i in range(len(names))]
    for head, cells in table:
        shown = (f"{cell:>{w}}" for cell, w in zip(cells, width, strict=True))
        yield f"{head:<{label}}  {'  '.join(shown)}"
    yield from (test.text for test in tests)
    if not rows:
        yield "no run has results yet"
