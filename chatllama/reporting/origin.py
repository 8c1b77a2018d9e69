"""What a run was made from, on which machines and in what time: the end of its page."""

from collections.abc import Sequence
from typing import Any

from chatllama.reporting.summary import number
from chatllama.runs.folder import Machine, RunFolder, read_lineage
from chatllama.runtime.json_files import held_to_be_whole

WALL_ROWS = {
    "backbone": "backbone",
    "sft": "SFT",
    "reward": "reward model",
    "ppo": "PPO",
    "evaluation": "evaluation",
}
UNKNOWN = "unknown: an older version did not record it"


def origin(run: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    """Times, versions, data and machines of the stages, for the template."""
    lineage = read_lineage(run)
    wall = {label: number(summary, f"wall_seconds.{key}") for key, label in WALL_ROWS.items()}
    with held_to_be_whole(run.lineage):
        versions = {
            stage: {"chatllama": made["code"]["version"], **made["packages"]}
            for stage, made in lineage.items()
        }
        data = [
            (stage, path, file.get("bytes"), file["sha256"])
            for stage, made in lineage.items()
            for path, file in made["data"].items()
        ]
        dates = [(stage, made["begun"], made["finished"]) for stage, made in lineage.items()]
        hardware: dict[str, list[str]] = {}
        for stage, made in lineage.items():
            starts = map(machines_line, made.get("hardware", []))
            hardware.setdefault("; then ".join(starts) or UNKNOWN, []).append(stage)
    names = dict.fromkeys(name for found in versions.values() for name in found)
    return {
        "wall_seconds": {label: value for label, value in wall.items() if value is not None},
        "total_seconds": number(summary, "wall_seconds.total"),
        "made_by": list(versions),
        "versions": [
            (name, [found.get(name, "") for found in versions.values()]) for name in names
        ],
        "data": data,
        "dates": dates,
        "hardware": hardware,
    }


def machines_line(machines: Sequence[Machine]) -> str:
    """The machines of one start of a stage in words; equal ones once."""
    words: dict[str, int] = {}
    for each in machines:
        gpus = [f"{count} x {name}" for name, count in each["gpus"].items()]
        ranks = each["ranks"]
        text = (
            f"{', '.join(gpus) or 'no GPU'}, {each['cpu']}, {each['cores']} cores, "
            f"{each['memory_gb']:.0f} GB of memory, {ranks} process{'es' * (ranks > 1)}"
        )
        words[text] = words.get(text, 0) + 1
    return "; ".join(f"{n} machines with {text}" if n > 1 else text for text, n in words.items())
