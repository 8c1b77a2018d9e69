"""The results of `benchmarks/real.py` as a page of Markdown and a picture.

    python benchmarks/real_table.py PAGE FOLDER ...

reads what the steps left in the folder of each seed and beside it in `done`, and writes PAGE and a
picture of the same name.
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
BEST_OF_KL = log(16) - 15 / 16
"""Nats, an upper bound (arXiv 2401.01879)."""


def main() -> int:
    """Writes the page; the exit code."""
    page, *folders = map(Path, sys.argv[1:])
    judged = {folder: json.loads((folder / "judged.json").read_text()) for folder in folders}
    picture = page.with_suffix(".png")
    draw([found["sentiment"] for found in judged.values()]).savefig(picture, dpi=150)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    parts = [
        "# RLHF on SmolLM2-135M-Instruct",
        f"{hardware(torch.get_num_threads())}, {versions}. {', '.join(map(title, folders))}.",
        "## Sentiment with a learned reward model",
        f"![Judges over KL]({picture.name})",
    ]
    for folder, found in judged.items():
        parts += [f"### {title(folder)}", *sentiment(found["sentiment"], folder / "sentiment")]
    parts += ["## Sums with a program as the reward", programs(judged, "sums")]
    parts += ["## Instructions with constraints", programs(judged, "constraints")]
    parts += ["## Human preferences (HH-harmless)", preferences(folders)]
    parts += ["## Answers", *samples(judged[folders[0]]["sentiment"])]
    parts += ["## What it took", costs(folders[0]), "## Adapters of each seed"]
    parts += map(hashes, folders)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return 0


def title(folder: Path) -> str:
    """Of a seed, as its folder names it."""
    return folder.name.replace("-", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sentiment(found: dict[str, Any], folder: Path) -> list[str]:
    """Paragraphs about one seed."""
    result = json.loads((folder / "ppo" / "reward" / "result.json").read_text())
    accuracy, low, high = (result[f"accuracy{end}"] for end in ("", "_low", "_high"))
    pairs = f"of {result['num_eval_pairs']:,} held-out pairs; words alone"
    doctor = json.loads((folder / "ppo" / "reward" / "doctor.json").read_text())
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
        f"{doctor['data']['word_accuracy']['value']:.3f}.",
        table(head, rows),
    ]


def above(values: Sequence[float], others: Sequence[float]) -> str:
    """Mean difference on equal prompts, and how many standard errors it is."""
    mean, error = mean_and_error([a - b for a, b in zip(values, others, strict=True)])
    return f"{mean:+.2f} ({mean / error:.1f} s.e.)" if error else f"{mean:+.2f}"


def programs(judged: dict[Path, Any], task: str) -> str:
    """Each role's mean reward in each seed."""
    head = ["", *map(title, judged)]
    rows = []
    start = "sft" if all("sft" in found[task] for found in judged.values()) else "base"
    for name in ("base", "sft", "ppo", "grpo", "policy"):
        if not all(name in found[task] for found in judged.values()):
            continue
        cells = ["grpo" if name == "policy" else name]
        for found in judged.values():
            values = found[task][name]["reward"]
            more = f", {above(values, found[task][start]['reward'])}" if name != start else ""
            cells.append("{:.3f} ± {:.3f}".format(*mean_and_error(values)) + more)
        rows.append(cells)
    return table(head, rows)


def preferences(folders: Sequence[Path]) -> str:
    """The reward model's accuracy beside what needs no model."""
    rows = []
    for seed in folders:
        folder = seed / "harmless" / "reward"
        result, doctor = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("result", "doctor")
        )
        data = doctor["data"]
        shares = [[result[f"accuracy{end}"] for end in ("", "_low", "_high")]]
        shares += [
            [share[key] for key in ("value", "low", "high")]
            for share in (data["held_out"]["longer_preferred"], data["word_accuracy"])
        ]
        cells = ["{:.3f} ({:.3f}-{:.3f})".format(*share) for share in shares]
        refused = "no" if (folder.parent / "ppo" / "result.json").is_file() else "yes"
        rows.append([title(seed), str(result["num_eval_pairs"]), *cells, refused])
    head = ["seed", "pairs", "reward model", "the longer answer", "words alone", "PPO refused"]
    return table(head, rows)


def samples(found: dict[str, Any]) -> list[str]:
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
    return [table(["", "opening", *(who for who in SHOWN if who in methods)], rows)]


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


def costs(folder: Path) -> str:
    """Steps, seconds and memory of a seed."""
    rows, files = [], folder.parent.joinpath("done").glob("*.json")
    for file in sorted(files, key=lambda path: path.stat().st_mtime):
        row = json.loads(file.read_text())
        if "seed-" in file.stem and not file.stem.startswith(f"{folder.name}-"):
            continue
        rows.append(
            [
                file.stem.removeprefix(f"{folder.name}-"),
                f"{row['wall_seconds'] / 60:.1f}",
                f"{row['cpu_seconds']:.0f}",
                f"{row['largest_process_mib']}",
            ]
        )
    total = sum(float(row[1]) for row in rows)
    rows.append(["all", f"{total:.0f}", f"{sum(int(row[2]) for row in rows)}", ""])
    return table(["step", "minutes", "CPU seconds", "largest process, MiB"], rows)


def hashes(folder: Path) -> str:
    """Of the adapters that were trained: equal on the same kind of CPU."""
    files = sorted(folder.glob("**/adapter_model.safetensors"))
    names = [f"{file.parent.relative_to(folder)} {file_hash(file)[:16]}" for file in files
             if "previous" not in file.parts]  # fmt: skip
    return f"{title(folder)} (sha256): " + ", ".join(names)


if __name__ == "__main__":
    sys.exit(main())
