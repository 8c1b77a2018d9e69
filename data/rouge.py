"""ROUGE-L: how much of two texts is the same words in the same order, and what is too similar.

F1 over the longest common subsequence of words (Lin 2004, ROUGE, section 3), which Self-Instruct
filters by (Wang 2022, arXiv 2212.10560, section 2.2). Words as in `words.py`, so that languages
without spaces count by character.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from data.words import words


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of the longest common subsequence, 0 to 1; 0 where a side is empty."""
    if not one or not other:
        return 0.0
    return 2 * _common(one, other) / (len(one) + len(other))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of its table at a time as bits.

    (Hyyro 2004, Bit-parallel LCS-length computation revisited.)
    """
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(one) - row.bit_count()


class Pool:
    """Texts of which no two are as similar as the limit.

    Args:
        limit: ROUGE-L from which a text is refused.
        texts: to begin with, whatever they are like.
    """

    def __init__(self, limit: float, texts: Iterable[str] = ()) -> None:
        self.limit = limit
        self._texts: list[tuple[list[str], Counter[str]]] = []
        for text in texts:
            self._take(words(text))

    def add(self, text: str) -> bool:
        """Whether the text is new; if so it is a part of the pool from now on."""
        own = words(text)
        counts = Counter(own)
        for other, their_counts in self._texts:
            # No subsequence is longer than the words in common: most pairs need no more.
            most = min(len(own), len(other))
            if 2 * most < self.limit * (len(own) + len(other)):
                continue
            most = (counts & their_counts).total()
            if 2 * most < self.limit * (len(own) + len(other)):
                continue
            if rouge_l(own, other) >= self.limit:
                return False
        self._take(own)
        return True

    def _take(self, own: list[str]) -> None:
        self._texts.append((own, Counter(own)))
