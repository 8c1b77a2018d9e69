"""Texts compared: their words and script, ROUGE-L, and pairs that are nearly the same.

ROUGE-L is F1 over the longest common subsequence of words (Lin 2004, ROUGE, section 3), which
Self-Instruct filters by (Wang 2022, arXiv 2212.10560, section 2.2). For near duplicates MinHash
finds candidates, and exact Jaccard similarity decides.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

# Scripts that are written without spaces: every character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\uac00-\ud7af\u1100-\u11ff\u3130-\u318f",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_PATTERNS = {name: re.compile(f"[{block}]") for name, block in _SCRIPTS.items()}
_SEEN = 2000  # characters of a text that decide its script
THRESHOLD = 0.8
"""Jaccard similarity of the 7-character shingles from which two texts are near duplicates."""
_SHINGLE = 7
_MAX_CHARACTERS = 20_000
_BANDS, _ROWS = 16, 4  # a pair at .8 is missed with probability (1 - .8^4)^16 = 2e-4
_BUCKET = 8  # earlier texts of a bucket that a text is compared with
_CANDIDATES = 4  # of those, the ones with most bands in common are compared exactly
_POWERS = np.array([1_000_003**i % 2**64 for i in range(_SHINGLE)], dtype=np.uint64)
_RNG = np.random.default_rng(20240229)
_SCALES = _RNG.integers(1, 2**63, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _RNG.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each character of an unspaced script is one."""
    return _WORD.findall(text.casefold())


def script(text: str) -> str:
    """The script that most of a text is in, by Unicode block: a plain guess at its language.

    `Japanese` is Han with at least a tenth of Kana; `none` has no letters of a known script.
    """
    begin = text[:_SEEN]
    if begin.isascii():
        return "Latin" if any(map(str.isalpha, begin)) else "none"
    counts = Counter({name: len(each.findall(begin)) for name, each in _PATTERNS.items()})
    if counts["Kana"] and counts["Kana"] >= 0.1 * (counts["Han"] + counts["Kana"]):
        counts["Japanese"] = counts.pop("Kana") + counts.pop("Han")
    name, count = counts.most_common(1)[0]
    return name if count else "none"


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, 0 to 1; 0 where a side is empty."""
    if not one or not other:
        return 0.0
    return 2 * LCSseq.similarity(one, other) / (len(one) + len(other))


class Pool:
    """Texts, of which those that were added have a ROUGE-L below the limit to every other."""

    def __init__(self, limit: float, texts: Iterable[str] = ()) -> None:
        self.limit = limit
        self._texts = [words(text) for text in texts]

    def add(self, text: str) -> bool:
        """Whether the text is new; if so it is a part of the pool from now on."""
        own = words(text)
        if any(rouge_l(own, other) >= self.limit for other in self._texts):
            return False
        self._texts.append(own)
        return True


def near_duplicates(num_texts: int, text: Callable[[int], str]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of texts that are nearly the same; each later one once.

    Case, punctuation and spacing do not count. Texts that are equal but for those are pairs too.
    `text` gives the one of a number; it is called again for candidates, so that not all texts need
    be in memory.
    """
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    pairs: list[tuple[int, int]] = []
    for later in range(num_texts):
        own = _shingles(text(later))
        if not len(own):
            continue
        shared: Counter[int] = Counter()
        for band, part in enumerate(_signature(own).reshape(_BANDS, _ROWS)):
            bucket = buckets[band, part.tobytes()]
            shared.update(bucket)
            if len(bucket) < _BUCKET:
                bucket.append(later)
        for earlier, _ in shared.most_common(_CANDIDATES):
            if _jaccard(own, _shingles(text(earlier))) >= THRESHOLD:
                pairs.append((earlier, later))
                break
    return pairs


def _shingles(text: str) -> np.ndarray:
    """Distinct hashes (N,) uint64 of all runs of 7 characters."""
    plain = " ".join(words(text[:_MAX_CHARACTERS]))
    if not plain:
        return np.empty(0, dtype=np.uint64)
    plain = plain.ljust(_SHINGLE)
    codes = np.frombuffer(plain.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, _SHINGLE)
    hashes = (windows * _POWERS).sum(axis=1, dtype=np.uint64)
    hashes ^= hashes >> np.uint64(31)
    return np.unique(hashes * np.uint64(0x9E3779B97F4A7C15))


def _signature(shingles: np.ndarray) -> np.ndarray:
    """(64,) uint64: the smallest value of each hash function."""
    values = shingles[:, None] * _SCALES + _SHIFTS
    return (values ^ (values >> np.uint64(29))).min(axis=0)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
