"""The results of `benchmarks/real.py` as a page of Markdown and a picture.

    python benchmarks/real_table.py PAGE PLACE ...

PLACE is the folder of a seed, or a file SEED.json that a former call wrote beside the folder: all
that the page says of a seed, so that seeds of several machines make one page.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measuring import hardware

from chatllama.reporting.statistics import mean_and_error
from chatllama.runtime.files import file_hash

METHODS = ("base", "sft", "best-of-16", "grpo", "rloo", "ppo", "ppo-little-sft")
JUDGES = ("lexicon", "classifier")
PACKAGES = ("deepspeed", "scikit-learn", "vaderSentiment")
SHOWN = ("sft", "ppo", "ppo-little-sft")
SAID = {
    *("accuracy", "accuracy_low", "accuracy_high", "num_eval_pairs"),
    *("wall_seconds", "cpu_seconds", "largest_process_mib"),
}
"""Keys that the page needs of results and of steps."""
BEST_OF_KL = log(16) - 15 / 16
"""Nats, an upper bound (arXiv 2401.01879)."""


def main() -> int:
    """Writes the page; the exit code."""
    page, *places = map(Path, sys.argv[1:])
    seeds = [collect(place) if place.is_dir() else read(place) for place in places]
    picture = page.with_suffix(".png")
    draw([seed["sentiment"] for seed in seeds]).savefig(picture, dpi=150)
    parts = [
        "# RLHF on SmolLM2-135M-Instruct",
        *dict.fromkeys(f"{seed['machine']}." for seed in seeds),
        "## Sentiment with a learned reward model",
        f"![Judges over KL]({picture.name})",
    ]
    parts += ["### All seeds", overview(seeds)] if len(seeds) > 1 else []
    for seed in seeds:
        parts += [f"### {seed['name']}", *sentiment(seed)]
    parts += ["## Sums with a program as the reward", programs(seeds, "sums")]
    parts += ["## Instructions with constraints", programs(seeds, "constraints")]
    parts += ["## Human preferences (HH-harmless)", preferences(seeds)]
    parts += ["## Answers", seeds[0]["samples"]]
    parts += ["## What it took", f"{seeds[0]['name']}:", costs(seeds[0])]
    parts += ["## Adapters of each seed, sha256", *map(hashes, seeds)]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return 0


def read(file: Path) -> dict[str, Any]:
    """A file of JSON; four digits behind the point are kept."""
    text = file.read_text(encoding="utf-8")
    return json.loads(text, parse_float=lambda digits: round(float(digits), 4))


def collect(folder: Path) -> dict[str, Any]:
    """All that the page says of a seed; it is written beside its folder, too."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    results: dict[str, Any] = {}
    for task in ("sentiment/ppo", "harmless"):
        reward = folder / task / "reward"
        doctor = read(reward / "doctor.json")["data"]
        results[task] = {
            **{key: value for key, value in read(reward / "result.json").items() if key in SAID},
            "word_accuracy": doctor["word_accuracy"],
            "longer_preferred": doctor["held_out"]["longer_preferred"],
            "ppo_refused": not (folder / task / "ppo" / "result.json").is_file(),
        }
    done = sorted((folder.parent / "done").glob("*.json"), key=lambda file: file.stat().st_mtime)
    own = {
        file.stem.removeprefix(f"{folder.name}-"): read(file)
        for file in done
        if file.stem.startswith(f"{folder.name}-")
        or not ("seed-" in file.stem or file.stem.startswith("real"))  # of all seeds, but no page
    }
    adapters = sorted(folder.glob("**/adapter_model.safetensors"))
    judged = read(folder / "judged.json")
    shown = samples(judged["sentiment"])
    for method in judged["sentiment"]["methods"].values():
        del method["answers"], method["prompts"]
    seed = judged | {
        "samples": shown,
        "name": folder.name.replace("-", " "),
        "machine": f"{hardware(torch.get_num_threads())}, {versions}",
        "rewards": results,
        "steps": {
            name: {key: value for key, value in record.items() if key in SAID}
            for name, record in own.items()
        },
        "adapters": {
            str(file.parent.relative_to(folder)): file_hash(file)
            for file in adapters
            if "previous" not in file.parts
        },
    }
    out = folder.parent / f"{folder.name}.json"
    out.write_text(json.dumps(seed) + "\n", encoding="utf-8")
    return seed


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview(seeds: Sequence[dict[str, Any]]) -> str:
    """What each method gains over SFT: means of all seeds, and each seed's in standard errors."""
    found = [seed["sentiment"]["methods"] for seed in seeds]
    rows = []
    for name in (name for name in METHODS if name != "sft" and all(name in own for own in found)):
        cells = [name]
        for judge in JUDGES:
            values = [value for own in found for value in own[name][judge]]
            gains = [gain(own[name][judge], own["sft"][judge]) for own in found]
            each = ", ".join(f"{mean / error:.1f}" if error else "-" for mean, error in gains)
            cells.append("{:.2f} ± {:.2f}".format(*mean_and_error(values)))
            cells.append(f"{statistics.mean(mean for mean, _ in gains):+.2f} ({each})")
        shares = (own[name]["perplexity"] / own["sft"]["perplexity"] for own in found)
        rows.append([*cells, ", ".join(f"{share:.2f}" for share in shares)])
    head = ["", "lexicon", "over SFT (s.e. of each seed)", "classifier"]
    return table([*head, head[2], "perplexity over SFT's, each seed"], rows)


def sentiment(seed: dict[str, Any]) -> list[str]:
    """Paragraphs about one seed."""
    result, found = seed["rewards"]["sentiment/ppo"], seed["sentiment"]
    accuracy, low, high = (result[f"accuracy{end}"] for end in ("", "_low", "_high"))
    pairs = f"of {result['num_eval_pairs']:,} held-out pairs; words alone"
    methods: dict[str, dict[str, Any]] = found["methods"]
    rows = []
    for name in (name for name in METHODS if name in methods):
        method, cells = methods[name], [name]
        for judge in JUDGES:
            cells.append("{:.2f} ± {:.2f}".format(*mean_and_error(method[judge])))
            cells.append(above(method[judge], methods["sft"][judge]) if name != "sft" else "")
        last = found["curves"].get(name, [])[-1:]
        kl = "{:.1f} ± {:.1f}".format(*mean_and_error(last[0]["kl"])) if last else ""
        kl = f"≤ {BEST_OF_KL:.1f}" if name == "best-of-16" else kl
        cells += [kl, f"{method['perplexity']:.0f}", f"{method['distinct_2']:.2f}"]
        cells += [f"{statistics.mean(method['words']):.1f}"]
        rows.append([*cells, f"{statistics.mean(method['ends']):.2f}"])
    head = ["", "lexicon", "over SFT", "classifier", "over SFT", "KL, nats", "perplexity"]
    head += ["distinct-2", "words", "ends"]
    return [
        f"Reward model: {accuracy:.3f} ({low:.3f}-{high:.3f}) {pairs} "
        f"{result['word_accuracy']['value']:.3f}.",
        table(head, rows),
    ]


def above(values: Sequence[float], others: Sequence[float]) -> str:
    """Mean difference on equal prompts, and how many standard errors it is."""
    mean, error = gain(values, others)
    return f"{mean:+.2f} ({mean / error:.1f} s.e.)" if error else f"{mean:+.2f}"


def gain(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean difference on equal prompts, and its standard error."""
    return mean_and_error([a - b for a, b in zip(values, others, strict=True)])


def programs(seeds: Sequence[dict[str, Any]], task: str) -> str:
    """Each role's mean reward in each seed."""
    head = ["", *(seed["name"] for seed in seeds)]
    rows = []
    start = "sft" if all("sft" in found[task] for found in seeds) else "base"
    for name in ("base", "sft", "ppo", "grpo", "policy"):
        if not all(name in found[task] for found in seeds):
            continue
        cells = ["grpo" if name == "policy" else name]
        for found in seeds:
            values = found[task][name]["reward"]
            more = f", {above(values, found[task][start]['reward'])}" if name != start else ""
            cells.append("{:.3f} ± {:.3f}".format(*mean_and_error(values)) + more)
        rows.append(cells)
    return table(head, rows)


def preferences(seeds: Sequence[dict[str, Any]]) -> str:
    """The reward model's accuracy beside what needs no model."""
    rows = []
    for seed in seeds:
        result = seed["rewards"]["harmless"]
        shares = [[result[f"accuracy{end}"] for end in ("", "_low", "_high")]]
        shares += [
            [result[name][key] for key in ("value", "low", "high")]
            for name in ("longer_preferred", "word_accuracy")
        ]
        cells = ["{:.3f} ({:.3f}-{:.3f})".format(*share) for share in shares]
        refused = "yes" if result["ppo_refused"] else "no"
        rows.append([seed["name"], str(result["num_eval_pairs"]), *cells, refused])
    head = ["", "pairs", "reward model", "the longer answer", "words alone", "PPO refused"]
    return table(head, rows)


def samples(found: dict[str, Any]) -> str:
    """Best, median and worst answer of PPO by the mean of both judges, beside SFT's."""
    methods = found["methods"]
    policy = methods["ppo"]
    means = [sum(both) for both in zip(*(policy[judge] for judge in JUDGES), strict=True)]
    order = sorted(range(len(means)), key=lambda i: means[i])
    rows = []
    for name, row in (("best", order[-1]), ("median", order[len(order) // 2]), ("worst", order[0])):
        texts = [methods[who]["answers"][row] for who in SHOWN if who in methods]
        prompt = policy["prompts"][row].partition(": ")[2]
        rows.append(
            [name, *(text.replace("|", "/").replace("\n", " ") for text in (prompt, *texts))]
        )
    return table(["", "opening", *(who for who in SHOWN if who in methods)], rows)


def draw(seeds: Sequence[dict[str, Any]]) -> Figure:
    """Reward model and judges over the KL, means of all seeds with standard errors."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {
        "score": "reward model (what is trained on)",
        "lexicon": "lexicon",
        "classifier": "classifier",
    }
    colours = {"ppo": "C0", "grpo": "C2", "rloo": "C4", "ppo-little-sft": "C3"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for name, colour in colours.items():
            curves = [found["curves"][name] for found in seeds if name in found["curves"]]
            if not curves:
                continue
            x, y, errors = [], [], []
            for points in zip(*curves, strict=True):  # of one step in all seeds
                x.append(statistics.mean(statistics.mean(point["kl"]) for point in points))
                mean, error = mean_and_error([value for point in points for value in point[key]])
                y.append(mean)
                errors.append(error)
            label = {"ppo-little-sft": "PPO after little SFT"}.get(name, name.upper())
            axes.errorbar(x, y, errors, fmt="o-", ms=3.5, capsize=2, color=colour, label=label)
        if key in JUDGES:
            values = [v for found in seeds for v in found["methods"]["best-of-16"][key]]
            mean, error = mean_and_error(values)
            axes.errorbar(
                [BEST_OF_KL], [mean], [error], fmt="*", ms=9, color="black", label="best of 16"
            )
        axes.set(title=title, xlabel="KL to SFT, nats an answer")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize=8)
    return figure


def costs(seed: dict[str, Any]) -> str:
    """Seconds and memory of each step."""
    rows = [
        [
            name,
            f"{record['wall_seconds'] / 60:.1f}",
            f"{record['cpu_seconds']:.0f}",
            f"{record['largest_process_mib']}",
        ]
        for name, record in seed["steps"].items()
    ]
    minutes, used = (sum(float(row[column]) for row in rows) for column in (1, 2))
    rows.append(["all", f"{minutes:.0f} of one core", f"{used:.0f}", ""])
    return table(["step", "minutes", "CPU seconds", "largest process, MiB"], rows)


def hashes(seed: dict[str, Any]) -> str:
    """Of the adapters that were trained: equal on the same kind of CPU."""
    shown = ", ".join(f"{name} {digest[:16]}" for name, digest in seed["adapters"].items())
    return f"{seed['name']}: {shown}"


if __name__ == "__main__":
    sys.exit(main())
