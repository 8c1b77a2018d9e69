"""The data check: every source of a config, examined before a GPU is rented.

Reads what the stages will read, in the same way, but continues behind bad records. Checks of single
sources are in `records.py` and `tokens.py`; here are those between sources: the mixture, and what
training and evaluation have in common.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.config.stages import StageSection
from chatllama.text.chat_format import template_line
from data.checking.records import check_records, iterate, question
from data.checking.report import DataReport, Findings, StageSource
from data.checking.tokens import check_tokens
from data.decontaminate import build_index, contamination
from data.mixture import all_begin_alike, is_held_out, source_counts
from data.reading.records import Kind
from data.reading.source import read_rows


@dataclass
class CheckedSource:
    """A source that could be read."""

    part: StageSource
    rows: Dataset
    """All records, from `read_rows`."""
    usable: list[int]
    """Rows that can serve."""
    failed: dict[int, str] = field(default_factory=dict)
    """Of those, the ones whose tokens are wrong, and why."""

    @property
    def good(self) -> Dataset:
        """The usable rows."""
        return self.rows.select(self.usable)

    def questions(self) -> Iterator[tuple[str, str]]:
        """Place and question of every usable record."""
        return ((row["where"], question(row)) for row in iterate(self.good))


@dataclass(frozen=True)
class Examination:
    """The report, and the rows that it was made from, which `clean.py` copies."""

    report: DataReport
    checked: list[CheckedSource]


def stage_section(cfg: Config, stage: str) -> StageSection:
    """The section of sft, reward or ppo."""
    sections: dict[str, StageSection] = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}
    return sections[stage]


def stage_sources(cfg: Config) -> list[StageSource]:
    """Every source that the config's stages train on or evaluate with."""
    found: list[StageSource] = []
    if cfg.backbone.from_scratch is not None:
        text = cfg.backbone.from_scratch.data
        found += [StageSource("pretraining", "data", each, "text", None) for each in text]
    stages: list[tuple[str, Kind, int]] = [
        ("sft", "sft", cfg.sft.max_length),
        ("reward", "preferences", cfg.reward.max_length),
        ("ppo", "prompts", cfg.ppo.max_prompt_length),
    ]
    for stage, kind, limit in stages:
        section = stage_section(cfg, stage)
        for role, sources in (("data", section.data), ("eval_data", section.eval_data)):
            found += [StageSource(stage, role, source, kind, limit) for source in sources]
    ptx = cfg.ppo.ptx_data
    if any(each.format in ("text", "lines") for each in ptx):  # text is cut, not shortened
        found += [StageSource("ppo", "ptx_data", each, "text", None) for each in ptx]
    else:
        limit = cfg.ppo.ptx_max_length
        found += [StageSource("ppo", "ptx_data", each, "sft", limit) for each in ptx]
    return found


def examine(
    cfg: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    stages: tuple[str, ...] = ("pretraining", "sft", "reward", "ppo"),
) -> Examination:
    """Everything that is wrong with the data of some stages of a config.

    Without a tokenizer, what needs tokens is not checked, and a note says so.
    """
    parts = [part for part in stage_sources(cfg) if part.stage in stages]
    findings = Findings()
    checked: list[CheckedSource] = []
    lengths: dict[str, list[int]] = {}
    for part in parts:
        one = _check_source(part, findings)
        if one is None:
            continue
        checked.append(one)
        if tokenizer is not None and one.usable:
            found = check_tokens(one.good, tokenizer, cfg.chat, one.part, findings)
            lengths[one.part.name], problems = found
            one.failed = {i: why for i, why in zip(one.usable, problems, strict=True) if why}
    for stage in stages:
        if stage != "pretraining":
            own = [one for one in checked if one.part.stage == stage]
            _check_stage(stage_section(cfg, stage), stage, own, cfg.seed, findings)
    _check_between_stages(checked, findings)
    notes = [] if tokenizer is None else [template_line(tokenizer, cfg.chat)]
    if tokenizer is None:
        notes.append("there is no tokenizer yet, so nothing that needs tokens was checked")
    if not parts:
        notes.append(f"the config names no data for {', '.join(stages)}")
    report = DataReport([one.part for one in checked], findings.all(), lengths, notes)
    return Examination(report, checked)


def _check_source(part: StageSource, findings: Findings) -> CheckedSource | None:
    """The source and its records' defects; None where it cannot be read at all."""
    try:
        rows = read_rows(part.source, part.kind)
    except ValueError as error:
        findings.add("unreadable", part.name, str(error))
        return None
    usable = check_records(rows, part, findings)
    if not usable:
        findings.add("nothing_usable", part.name)
    return CheckedSource(part, rows, usable)


def _check_stage(
    section: StageSection, stage: str, own: list[CheckedSource], seed: int, findings: Findings
) -> None:
    """The mixture's proportions, and leaks from what evaluates the stage into its training."""
    train = [one for one in own if one.part.role == "data"]
    held = [one for one in own if one.part.role == "eval_data"]
    if not train:
        return
    places = _places(held)
    sizes, sources = [len(one.usable) for one in train], [one.part.source for one in train]
    try:
        counts = source_counts(sizes, sources)
    except ValueError as error:
        findings.add("mixture", f"{stage}.data", str(error))
        counts = [0] * len(train)
    for one, count in zip(train, counts, strict=True):
        one.part.share = count / sum(counts) if sum(counts) else None
        _check_leaks(one, places, "leak", findings)
    if not held:
        _check_split(train, seed, section.eval_fraction, findings)
        _check_sides(train, stage, seed, section.eval_fraction, findings)
    if section.decontaminate:
        try:
            index = build_index(section.decontaminate)
        except ValueError as error:
            findings.add("unreadable", f"{stage}.decontaminate", str(error))
            return
        for one in train:
            good = one.good
            for where, path in zip(good["where"][:], contamination(good, index), strict=True):
                if path:
                    message = f"gives away {path}; training leaves it out"
                    findings.add("contamination", one.part.name, where, message)


def _places(held: list[CheckedSource]) -> dict[str, str]:
    """Place by question; questions without words are left out."""
    return {words: where for one in held for where, words in one.questions() if words}


def _check_leaks(
    one: CheckedSource, places: dict[str, str], check: str, findings: Findings
) -> None:
    """Records with the question of a held-out one."""
    for where, words in one.questions():
        if other := places.get(words):
            findings.add(check, one.part.name, f"{where} is {other}")


def _check_split(
    train: list[CheckedSource], seed: int, fraction: float, findings: Findings
) -> None:
    """Questions on both sides of the split that differ in case, spacing or punctuation alone."""
    sides: dict[str, dict[bool, str]] = {}
    for one in train:
        keys: list[str] = one.good["key"][:]
        for key, (where, words) in zip(keys, one.questions(), strict=True):
            side = sides.setdefault(words, {})
            out = is_held_out(key, seed, fraction)
            side.setdefault(out, where)
            if len(side) == 2 and side[out] == where:
                findings.add("split_leak", one.part.name, f"{where} is like {side[not out]}")


def _check_sides(
    train: list[CheckedSource], stage: str, seed: int, fraction: float, findings: Findings
) -> None:
    """What a stage refuses: nothing to train on, or for the reward model nothing held out."""
    held = [is_held_out(key, seed, fraction) for one in train for key in one.good["key"][:]]
    alike = all_begin_alike(one.good for one in train)
    if held and all(held):
        findings.add("mixture", f"{stage}.data", f"every record is held out{alike}")
    elif held and not any(held) and stage == "reward":
        advice = alike or "; set reward.eval_data or a larger reward.eval_fraction"
        findings.add("mixture", f"{stage}.data", f"no pair is held out{advice}")


def _check_between_stages(checked: list[CheckedSource], findings: Findings) -> None:
    """What one stage is evaluated with and another trains on."""
    held = [one for one in checked if one.part.role == "eval_data"]
    for one in checked:
        if one.part.role != "eval_data" and one.part.kind != "text":
            others = [each for each in held if each.part.stage != one.part.stage]
            _check_leaks(one, _places(others), "leak_between_stages", findings)
