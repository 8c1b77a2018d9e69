"""Cleaned copies of a config's sources, and a log of every record that is not in them.

What is dropped: records that cannot be decoded or cannot serve, those whose tokens break a rule,
later exact copies, training records with a question of the stage's eval_data, and those that give
away an evaluation set. So no error is left but those that are not in a record. Near duplicates and
long records stay: they need a judgement.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chatllama.config.schema import Config
from chatllama.runtime.jsonl import json_line
from data.checking.check import CheckedSource, Examination, stage_section
from data.checking.records import identity, iterate, question
from data.checking.report import MESSAGES
from data.decontaminate import build_index, contamination
from data.reading.source import GOOD


@dataclass(frozen=True)
class Cleaned:
    """What `write_cleaned` wrote."""

    config: Path
    """The config with the cleaned sources in place of the others."""
    log: Path
    """`dropped.jsonl`: a line `{source, where, reason}` for every record left out."""
    num_kept: int
    num_dropped: int


def write_cleaned(
    cfg: Config, config_file: Path, examination: Examination, folder: Path
) -> Cleaned:
    """Writes one jsonl file for every source that could be read, the log, and a config.

    Records keep their order and name their place under `source`. The new config extends
    the old one and replaces its lists of sources.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, config = folder / "dropped.jsonl", folder / "config.yaml"
    num_kept, num_dropped = 0, 0
    lists: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with log.open("w", encoding="utf-8") as dropped:
        for number, one in enumerate(examination.checked):
            part, source = one.part, one.part.source
            file = folder / f"{number:02}_{part.stage}_{part.role}_{_stem(source.path)}.jsonl"
            reasons = drop_reasons(cfg, one, examination.checked)
            pairs = all(
                len(row["answers"] or [0, 0]) == 2 for row in iterate(one.rows) if "answers" in row
            )
            with file.open("w", encoding="utf-8") as kept:
                for row, reason in zip(iterate(one.rows), reasons, strict=True):
                    place = {"source": part.name, "where": row["where"], "reason": reason}
                    line = place if reason else _record(row, one, pairs)
                    to = dropped if reason else kept
                    to.write(json_line(line))
            num_dropped += sum(map(bool, reasons))
            num_kept += sum(not reason for reason in reasons)
            entry = {"path": str(file.resolve()), "weight": source.weight, "epochs": source.epochs}
            if part.kind == "text":
                entry["format"] = "text"
            lists.setdefault((part.stage, part.role), []).append(entry)
    config.write_text(_config(config_file, lists), encoding="utf-8")
    return Cleaned(config, log, num_kept, num_dropped)


def drop_reasons(cfg: Config, one: CheckedSource, checked: list[CheckedSource]) -> list[str]:
    """For every row of a source, why it is dropped, or ""."""
    leaks: set[str] = set()
    marks = [""] * len(one.rows)
    if one.part.role == "data" and one.part.stage != "pretraining":
        section = stage_section(cfg, one.part.stage)
        same_stage = [each for each in checked if each.part.stage == one.part.stage]
        held = [each for each in same_stage if each.part.role == "eval_data"]
        leaks = {question(each.rows[i]) for each in held for i in each.usable} - {""}
        if section.decontaminate and one.usable:
            found = contamination(one.good, build_index(section.decontaminate))
            for i, path in zip(one.usable, found, strict=True):
                marks[i] = f"gives away {path}" if path else ""
    seen: dict[str, str] = {}
    reasons: list[str] = []
    for i, row in enumerate(iterate(one.rows)):
        if row["severity"] != GOOD or i in one.failed:
            reasons.append(one.failed.get(i) or row["problem"])
            continue
        before = seen.setdefault(identity(row), row["where"])
        if before != row["where"]:
            reasons.append(f"exact copy of {before}")
        elif leaks and question(row) in leaks:
            reasons.append(MESSAGES["leak"])
        else:
            reasons.append(marks[i])
    return reasons


def _record(row: dict[str, Any], one: CheckedSource, pairs: bool) -> dict[str, Any]:
    """A record in the layout that reads back as the same; pairs where all of the file are."""
    source = {"source": row["where"]}
    match one.part.kind:
        case "text":
            return {"text": row["text"], **source}
        case "preferences" if pairs:
            chosen, rejected = row["answers"]
            margin = row["ratings"][0] - row["ratings"][1]
            answers = {"chosen": chosen, "rejected": rejected, "margin": margin}
            return {"prompt": row["prompt"], **answers, **source}
        case "preferences":
            ratings = [float(rating) for rating in row["ratings"]]
            order = {"scores": ratings} if any(ratings) else {"ranks": row["ranks"]}
            return {"messages": row["prompt"], "answers": row["answers"], **order, **source}
        case _:
            turns = [dict(turn) for turn in row["messages"]]
            for number in row.get("untrained") or []:
                turns[number]["weight"] = 0
            return {"messages": turns, **source}


def _stem(path: str) -> str:
    return re.sub(r"[^\w-]+", "_", Path(path).name.split(".")[0])[:40] or "data"


def _config(old: Path, lists: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    content: dict[str, Any] = {"extends": str(old.resolve())}
    for (stage, role), entries in lists.items():
        if stage == "pretraining":
            content.setdefault("backbone", {})["from_scratch"] = {role: entries}
        else:
            content.setdefault(stage, {})[role] = entries
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
