"""The data doctor: every source of a config, checked before a GPU is rented.

Reads what the stages will read, in the same way, but goes on behind bad records. Checks of single
sources are in `doctor_records.py` and `doctor_tokens.py`; here are those between sources: the
mixture, and what training and evaluation have in common.
"""

from dataclasses import dataclass, field
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.config.sources import DataSource
from data.checking.records import check_records, question
from data.checking.report import DoctorReport, Findings, SourceHealth
from data.checking.tokens import check_tokens
from data.decontaminate import EvaluationIndex, build_index, contamination
from data.mixture import is_held_out, source_counts
from data.reading.records import Kind
from data.reading.source import read_rows


@dataclass(frozen=True)
class StageSource:
    """A source, and what a stage reads it for."""

    stage: str
    role: str
    """Its key in the stage's section: `data`, `eval_data` or `ptx_data`."""
    source: DataSource
    kind: Kind
    max_length: int | None
    """Tokens of a record that the stage takes."""


@dataclass
class Checked:
    """A source that could be read."""

    part: StageSource
    health: SourceHealth
    rows: Dataset
    """All records, from `read_rows`."""
    usable: list[int]
    """Rows that can serve."""
    failed: dict[int, str] = field(default_factory=dict)
    """Of those, the ones whose tokens are wrong, and why."""


@dataclass(frozen=True)
class Examination:
    """The report, and the rows it was made from, which `cleaning.py` copies."""

    report: DoctorReport
    checked: list[Checked]


def stage_sources(cfg: Config) -> list[StageSource]:
    """Every source that the config's stages train on or evaluate with."""
    found: list[StageSource] = []
    if cfg.backbone.from_scratch is not None:
        text = cfg.backbone.from_scratch.data
        found += [StageSource("pretraining", "data", each, "text", None) for each in text]
    ptx = cfg.ppo.ptx_data
    ptx_kind: Kind = "text" if any(each.format in ("text", "lines") for each in ptx) else "sft"
    ptx_limit = cfg.ppo.ptx_max_length if ptx_kind == "sft" else None  # text is cut, not shortened
    stages: list[tuple[str, str, list[DataSource], Kind, int | None]] = [
        ("sft", "data", cfg.sft.data, "sft", cfg.sft.max_length),
        ("sft", "eval_data", cfg.sft.eval_data, "sft", cfg.sft.max_length),
        ("reward", "data", cfg.reward.data, "preferences", cfg.reward.max_length),
        ("reward", "eval_data", cfg.reward.eval_data, "preferences", cfg.reward.max_length),
        ("ppo", "data", cfg.ppo.data, "prompts", cfg.ppo.max_prompt_length),
        ("ppo", "eval_data", cfg.ppo.eval_data, "prompts", cfg.ppo.max_prompt_length),
        ("ppo", "ptx_data", ptx, ptx_kind, ptx_limit),
    ]
    for stage, role, sources, kind, limit in stages:
        found += [StageSource(stage, role, source, kind, limit) for source in sources]
    return found


def examine(
    cfg: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    stages: tuple[str, ...] = ("pretraining", "sft", "reward", "ppo"),
) -> Examination:
    """Everything that is wrong with a config's data.

    Args:
        cfg: the run's.
        tokenizer: the run's. None: what needs tokens is not checked, and a note says so.
        stages: those whose sources are looked at.
    """
    parts = [part for part in stage_sources(cfg) if part.stage in stages]
    findings = Findings()
    checked: list[Checked] = []
    lengths: dict[str, list[int]] = {}
    for part in parts:
        one = _check_source(part, findings)
        if one is None:
            continue
        checked.append(one)
        if tokenizer is not None:
            lengths[one.health.name] = _check_tokens(one, tokenizer, cfg, findings)
    for stage in stages:
        if stage != "pretraining":
            own = [one for one in checked if one.part.stage == stage]
            _check_stage(cfg, stage, own, findings)
    _check_between_stages(checked, findings)
    notes = []
    if tokenizer is None:
        notes.append("there is no tokenizer yet, so nothing that needs tokens was checked")
    if not parts:
        notes.append(f"the config names no data for {', '.join(stages)}")
    report = DoctorReport([one.health for one in checked], findings.all(), lengths, notes)
    return Examination(report, checked)


def _check_source(part: StageSource, findings: Findings) -> Checked | None:
    """The source and its records' defects; None where it cannot be read at all."""
    health = SourceHealth(
        part.stage, part.role, part.source.path, part.kind, max_length=part.max_length
    )
    try:
        rows = read_rows(part.source, part.kind)
    except ValueError as error:
        findings.add("error", "unreadable", health.name, "cannot be read", str(error))
        return None
    usable = check_records(rows, health, findings)
    if not usable:
        findings.add("error", "nothing_usable", health.name, "no record can serve")
    return Checked(part, health, rows, usable)


def _check_tokens(
    one: Checked, tokenizer: PreTrainedTokenizerFast, cfg: Config, findings: Findings
) -> list[int]:
    """Tokens of every usable record; what is wrong with them goes into `one` and `findings`."""
    if not one.usable:
        return []
    good = one.rows.select(one.usable)
    found = check_tokens(good, tokenizer, cfg.chat, one.health, findings)
    one.failed = {i: why for i, why in zip(one.usable, found.problems, strict=True) if why}
    return found.lengths


def _check_stage(cfg: Config, stage: str, own: list[Checked], findings: Findings) -> None:
    """The mixture's proportions, and leaks from what evaluates the stage into its training."""
    section = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}[stage]
    train = [one for one in own if one.part.role == "data"]
    held = [one for one in own if one.part.role == "eval_data"]
    if not train:
        return
    try:
        counts = source_counts(
            [len(one.usable) for one in train], [one.part.source for one in train]
        )
    except ValueError as error:
        findings.add("error", "mixture", f"{stage}.data", "no mixture", str(error))
        counts = [0] * len(train)
    for one, count in zip(train, counts, strict=True):
        one.health.share = count / sum(counts) if sum(counts) else None
    asked_there = _questions(held)
    for one in train:
        for where, asked in _asked(one):
            if other := asked_there.get(asked):
                findings.add(
                    "error", "leak", one.health.name, "asks what eval_data asks",
                    f"{where} is {other}",
                )  # fmt: skip
    if not held:
        _check_split(train, cfg.seed, section.eval_fraction, findings)
    if section.decontaminate:
        try:
            index = build_index(section.decontaminate)
        except ValueError as error:
            findings.add(
                "error", "unreadable", f"{stage}.decontaminate", "cannot be read", str(error)
            )
            return
        for one in train:
            _check_contamination(one, index, findings)


def _check_split(train: list[Checked], seed: int, share: float, findings: Findings) -> None:
    """Questions on both sides of the split that differ in case, spacing or punctuation alone."""
    sides: dict[str, dict[bool, str]] = {}
    for one in train:
        good = one.rows.select(one.usable)
        keys: list[str] = good["key"][:]
        for key, (where, asked) in zip(keys, _asked(one), strict=True):
            side = sides.setdefault(asked, {})
            out = is_held_out(key, seed, share)
            side.setdefault(out, where)
            if len(side) == 2 and side[out] == where:
                findings.add(
                    "warning", "split_leak", one.health.name,
                    "held-out and training questions that differ in form alone",
                    f"{where} is like {side[not out]}",
                )  # fmt: skip


def _check_contamination(one: Checked, index: EvaluationIndex, findings: Findings) -> None:
    good = one.rows.select(one.usable)
    for where, path in zip(good["where"][:], contamination(good, index), strict=True):
        if path:
            findings.add(
                "warning", "contamination", one.health.name,
                f"gives away {path}; training leaves it out", where,
            )  # fmt: skip


def _check_between_stages(checked: list[Checked], findings: Findings) -> None:
    """What one stage is evaluated with and another trains on."""
    held = [one for one in checked if one.part.role == "eval_data"]
    for one in checked:
        if one.part.role == "eval_data" or one.part.kind == "text":
            continue
        others = _questions([each for each in held if each.part.stage != one.part.stage])
        for where, asked in _asked(one):
            if other := others.get(asked):
                findings.add(
                    "warning", "leak_between_stages", one.health.name,
                    "asks what another stage's eval_data asks", f"{where} is {other}",
                )  # fmt: skip


def _asked(one: Checked) -> list[tuple[str, str]]:
    """Place and question of every usable record."""
    good = one.rows.select(one.usable)
    rows = (cast(dict[str, Any], row) for row in good)
    return [(row["where"], question(row)) for row in rows]


def _questions(held: list[Checked]) -> dict[str, str]:
    """Place by question; questions without words are left out."""
    return {asked: where for one in held for where, asked in _asked(one) if asked}
