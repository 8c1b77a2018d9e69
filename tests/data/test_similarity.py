"""Near duplicates against Jaccard similarities by hand, and on real text."""

import json
import random
from pathlib import Path

from data.similarity import near_duplicates, script, words


def pairs(*texts: str) -> list[tuple[int, int]]:
    return near_duplicates(len(texts), lambda i: texts[i])


BASE = "The lighthouse keeper counted the ships every evening before the long winter began."


def test_equal_but_for_case_and_punctuation() -> None:
    assert pairs(BASE, "Something else entirely, about rivers.", BASE.upper() + "!!") == [(0, 2)]


def test_one_word_in_many_is_near_and_half_is_not() -> None:
    long = " ".join([BASE, "Then he wrote their names into a heavy book, one by one."])
    # 7 of the 130-odd shingles go through any one letter: (N - 7) / (N + 7) = .89.
    assert pairs(long, long.replace("heavy", "hezvy")) == [(0, 1)]
    assert pairs(long, BASE) == []
    part = long[: int(len(long) * 0.74)]  # .72 of the shingles
    assert pairs(long, part) == []
    assert pairs(long, long[: int(len(long) * 0.9)]) == [(0, 1)]
    assert pairs("", " ", "...") == []


def test_later_copies_come_once() -> None:
    assert pairs(BASE, BASE, BASE) == [(0, 1), (0, 2)]


def test_planted_pairs_among_real_texts(testdata: Path) -> None:
    rows = json.loads((testdata / "llama_factory/alpaca_en_demo.json").read_text())
    texts = [row["output"] for row in rows if len(row["output"]) > 200][:300]
    rng = random.Random(0)
    planted = rng.sample(range(300), 40)
    for number in planted:  # one word of each copy is another
        copy = texts[number].split()
        copy[rng.randrange(len(copy))] = "zebra"
        texts.append(" ".join(copy))
    found = near_duplicates(len(texts), lambda i: texts[i])
    by_copy = {later: earlier for earlier, later in found if later >= 300}
    assert [by_copy.get(300 + i) for i in range(40)] == planted
    assert len(found) <= 42


def test_words() -> None:
    assert words("Don't STOP: 3.5 über_alles") == ["don", "t", "stop", "3", "5", "über", "alles"]
    assert words("我是AI, ok") == ["我", "是", "ai", "ok"]


def test_scripts() -> None:
    texts = {
        "Hello 123": "Latin",
        "123 !?": "none",
        "Привет world": "Cyrillic",
        "안녕하세요": "Hangul",
        "你好世界": "Han",
        "漢字とかなを読む": "Japanese",
        "مرحبا": "Arabic",
    }
    assert {text: script(text) for text in texts} == texts
