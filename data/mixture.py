"""Mixtures: several sources as one training set and one held-out set, both decided by the seed.

Whether a record is held out depends on the seed and on the record's prompt, and on nothing else:
adding a source, reordering a file or training another stage moves none across.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.config.sources import DataSource
from chatllama.config.stages import StageSection
from chatllama.runtime.distributed import rank
from chatllama.text.tokenizer import within_positions
from data.decontaminate import build_index, contamination
from data.reading.records import Kind
from data.reading.source import ReadReport, read_source
from data.token_report import TokenReport
from data.tokenize import tokenize


@dataclass(frozen=True)
class SourceShare:
    """What one source contributes to the training set."""

    path: str
    num_available: int
    """Training records of the source, after the held-out ones left."""
    num_drawn: int
    """Records of it in the mixture; more than available when it is passed over several times."""


@dataclass(frozen=True)
class Mixture:
    """Training and held-out records, with the columns of `read_source`."""

    train: Dataset
    held_out: Dataset
    """Each held-out record once, in the order of the sources. May be empty."""
    shares: list[SourceShare]
    reports: list[ReadReport]
    """Of every source read, those of eval_data last."""
    contaminated: dict[str, int]
    """Training records left out because they give away an evaluation set, by set."""

    def summary(self) -> str:
        """Lines for the log: what was read, left out, mixed and held out."""
        lines = [report.summary() for report in self.reports]
        for share in self.shares:
            lines.append(
                f"{share.path}: {share.num_drawn} of the {len(self.train)} training records "
                f"({share.num_drawn / len(self.train):.1%}), from {share.num_available}"
            )
        for path, count in self.contaminated.items():
            lines.append(f"left out, with words of {path}: {count} training records")
        lines.append(f"held out: {len(self.held_out)} records")
        return "\n".join(lines)


def load_mixture(
    sources: Sequence[DataSource],
    eval_sources: Sequence[DataSource],
    eval_fraction: float,
    seed: int,
    kind: Kind,
    decontaminate: Sequence[DataSource] = (),
) -> Mixture:
    """The stage's training and held-out records.

    `sources` are mixed in the proportions of `source_counts` and shuffled. Without `eval_sources`,
    `eval_fraction` of their prompts is held out. No training record gives away one of the
    evaluation sets `decontaminate`. The seed decides what is held out, drawn and in which order.

    Raises:
        ValueError: from a source; weights on some sources only; nothing left to train on.
    """
    if not sources:
        raise ValueError(f"no data: give at least one source of {kind}")
    reads = [read_source(source, kind) for source in sources]
    eval_reads = [read_source(source, kind) for source in eval_sources]
    trains, held_outs = [], [data for data, _ in eval_reads]
    for data, _ in reads:
        keys: list[str] = data["key"][:]
        held = [is_held_out(key, seed, 0.0 if eval_sources else eval_fraction) for key in keys]
        trains.append(data.select([i for i, out in enumerate(held) if not out]))
        if not eval_sources:
            held_outs.append(data.select([i for i, out in enumerate(held) if out]))
    contaminated: Counter[str] = Counter()
    if decontaminate:
        index = build_index(decontaminate)
        for number, train in enumerate(trains):
            found = contamination(train, index)
            contaminated.update(filter(None, found))
            trains[number] = train.select([i for i, path in enumerate(found) if not path])
    sizes = [len(train) for train in trains]
    counts = source_counts(sizes, sources)
    if not sum(counts):
        raise ValueError(
            f"nothing to train on: {sizes} records remain after holding out {eval_fraction:.0%} "
            f"and leaving out {sum(contaminated.values())} with words of an evaluation set"
            f"{all_begin_alike(data for data, _ in reads)}"
        )
    return Mixture(
        train=_draw(trains, counts, seed),
        held_out=concatenate_datasets(held_outs),
        shares=list(map(SourceShare, [source.path for source in sources], sizes, counts)),
        reports=[report for _, report in reads + eval_reads],
        contaminated=dict(contaminated.most_common()),
    )


def all_begin_alike(reads: Iterable[Dataset]) -> str:
    """What to do where all records are on one side of the split because they begin alike, or ""."""
    keys = [key for data in reads for key in data["key"][:]]
    if len(keys) < 2 or len(set(keys)) > 1:
        return ""
    return (
        "; all begin with the same user turn, and such records stay together: give `eval_data`, or "
        "put what they share into a system prompt (`eval_fraction: 0` holds nothing out)"
    )


@dataclass(frozen=True)
class Examples:
    """Tokenised training and held-out examples of a stage."""

    train: Dataset
    held_out: Dataset
    """May be empty."""
    mixture: Mixture
    """The records that they were made of."""
    reports: list[TokenReport]
    """Of the training examples, then of the held-out ones if there are any."""


_NOUNS = {"sft": "conversations", "preferences": "pairs", "prompts": "prompts"}


def load_examples(
    section: StageSection,
    kind: Literal["sft", "preferences", "prompts"],
    max_length: int,
    cfg: Config,
    tokenizer: PreTrainedTokenizerFast,
) -> Examples:
    """A stage's examples, read, mixed, split and tokenised; rank 0 prints what was left out.

    The config gives the seed and the layout of a conversation.

    Raises:
        ValueError: a source cannot be read, or nothing is left to train on.
    """
    mixture = load_mixture(
        section.data,
        section.eval_data,
        section.eval_fraction,
        cfg.seed,
        kind,
        section.decontaminate,
    )
    lines, parts, reports = [mixture.summary()], [], []
    if (most := within_positions(tokenizer, max_length)) < max_length:
        lines.append(f"limit {most} tokens, not {max_length}: the model's max_position_embeddings")
    for name, records in (("training", mixture.train), ("held-out", mixture.held_out)):
        if len(records):
            records, report = tokenize(records, kind, tokenizer, cfg.chat, max_length)
            lines.append(f"{name} {_NOUNS[kind]}: {report.summary()}")
            reports.append(report)
        parts.append(records)
    if rank() == 0:
        print("\n".join(lines))
    return Examples(parts[0], parts[1], mixture, reports)


def source_counts(sizes: Sequence[int], sources: Sequence[DataSource]) -> list[int]:
    """How many records each source gives to the mixture.

    Without weights: size * epochs, rounded to the nearest. With weights: shares in proportion to
    the weights, in the longest mixture for which no source is passed over more than its `epochs`;
    remainders go to the largest fractions.

    Raises:
        ValueError: some sources have a weight and some have none.
    """
    passes = [
        size * Fraction(str(source.epochs)) for size, source in zip(sizes, sources, strict=True)
    ]
    weights = [Fraction(str(source.weight)) for source in sources if source.weight is not None]
    if not weights:
        return [math.floor(most + Fraction(1, 2)) for most in passes]
    if len(weights) < len(sources):
        bare = [source.path for source in sources if source.weight is None]
        raise ValueError(f"give `weight` to all sources or to none; without it: {', '.join(bare)}")
    shares = [weight / sum(weights) for weight in weights]
    total = math.floor(min(math.floor(m) / share for m, share in zip(passes, shares, strict=True)))
    exact = [total * share for share in shares]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def is_held_out(key: str, seed: int, fraction: float) -> bool:
    """Whether the records of this key are held out; see `record_key`."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _draw(trains: Sequence[Dataset], counts: Sequence[int], seed: int) -> Dataset:
    """`counts` records of each source: whole passes and a random rest, all shuffled together."""
    indices, begin = [], 0
    for number, (train, count) in enumerate(zip(trains, counts, strict=True)):
        size = len(train)
        if count:
            passes, rest = divmod(count, size)
            chosen = np.random.default_rng([seed, number]).permutation(size)[:rest]
            indices += [np.tile(np.arange(size), passes) + begin, chosen + begin]
        begin += size
    order = np.random.default_rng([seed, len(trains)]).permutation(np.concatenate(indices))
    return concatenate_datasets(list(trains)).select(order)
