"""Decontamination: finds training records that give away an evaluation set, by n-grams.

Runs of 13 words, as for GPT-3 (Brown 2020, arXiv 2005.14165, appendix C): lower case, without
punctuation. Departures from it: a prompt of 8 to 12 words counts as a whole (GPT-3's N goes down to
8 for sets of short examples), one of fewer only where a whole turn equals it; a record is left out
rather than cut around the match.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Value

from chatllama.config.sources import DataSource
from data.caching import cached_map
from data.reading.records import record_texts
from data.reading.source import read_source
from data.similarity import words

NGRAM, SHORTEST = 13, 8
BOILERPLATE = 10
"""A run of words in more prompts of one evaluation set than this is its form, not its content."""


@dataclass(frozen=True)
class EvaluationIndex:
    """What training records must not contain, and which evaluation set it comes from."""

    runs: dict[str, str]
    """Runs of 8 to 13 words, joined by blanks."""
    whole: dict[str, str]
    """Prompts of fewer words."""
    sizes: list[int]
    """Lengths of the runs, in words."""

    def source_of(self, texts: Sequence[str]) -> str:
        """The evaluation set that one of the texts gives away, or ""."""
        for text in texts:
            own = words(text)
            if found := self.whole.get(" ".join(own)):
                return found
            for size in self.sizes:
                for run in _runs(own, size):
                    if found := self.runs.get(run):
                        return found
        return ""


def build_index(sources: Sequence[DataSource]) -> EvaluationIndex:
    """The index of all prompts (or texts) of the evaluation sets.

    Raises:
        ValueError: a source cannot be read as prompts.
    """
    runs: dict[str, str] = {}
    whole: dict[str, str] = {}
    for source in sources:
        data, _ = read_source(source, "prompts")
        counts: Counter[str] = Counter()
        for messages in data["messages"]:
            own = words(messages[-1]["content"])
            if len(own) < SHORTEST:
                whole[" ".join(own)] = source.path
            else:
                counts.update(set(_runs(own, min(NGRAM, len(own)))))
        runs.update({run: source.path for run, n in counts.items() if n <= BOILERPLATE})
    whole.pop("", None)
    return EvaluationIndex(runs, whole, sorted({run.count(" ") + 1 for run in runs}))


def contamination(data: Dataset, index: EvaluationIndex) -> list[str]:
    """For each record, the evaluation set that it gives away, or ""."""
    if not index.runs and not index.whole:
        return [""] * len(data)
    return cached_map(data, _mark, {"set": Value("string")}, index)["set"][:]


def _mark(record: dict[str, Any], index: EvaluationIndex) -> dict[str, str]:
    return {"set": index.source_of(record_texts(record))}


def _runs(own: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(own[i : i + size]) for i in range(len(own) - size + 1))
