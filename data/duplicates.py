"""Texts that are nearly the same: MinHash finds candidates, exact Jaccard similarity decides."""

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from data.words import words

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


def near_duplicates(num_texts: int, text: Callable[[int], str]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of texts that are nearly the same; each later one once.

    Case, punctuation and spacing do not count. Texts that are equal but for those are pairs too.

    Args:
        num_texts: how many there are.
        text: gives the one of a number; asked again for candidates, so that not all texts need be
            in memory.
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
