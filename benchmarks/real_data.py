"""The data files of `benchmarks/real.py`: film reviews, sums, instructions that a program checks.

    python benchmarks/real_data.py FOLDER --reviews PLACE --instructions PLACE --harmless PLACE
        [--shrunk]

Reviews are those of Pang and Lee 2005 (arXiv cs/0506075): 10,662 sentences, half of them positive.
Every sentence belongs to one part, by its hash: `train` (demonstrations and preference pairs),
`judge` (the classifier that judges, and nothing else) or `held` (pairs and openings that no stage
sees).
"""

import argparse
import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_rewards import constraints, sums

PARTS = {"train": 30, "judge": 30, "held": 40}
"""Percent of the sentences."""
FEWEST, MOST = 6, 32
"""Words of a sentence that is used."""


@dataclass(frozen=True)
class Review:
    """A sentence of a film review."""

    text: str
    positive: bool

    @property
    def part(self) -> str:
        """Where it is used, a key of PARTS."""
        place = int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:4], "big") % 100
        for name, percent in PARTS.items():
            if place < percent:
                return name
            place -= percent
        raise AssertionError(place)


def read_reviews(source: str) -> list[Review]:
    """All sentences once, in an order that does not depend on the source.

    Args:
        source: a folder with rt-polarity.pos and rt-polarity.neg as they were published (Latin-1,
            a sentence a line), a file with columns `text` and `label` (1: positive), or a data
            set's id on the hub.
    """
    folder = Path(source)
    if (folder / "rt-polarity.pos").is_file():
        pairs = [
            (line, name == "pos")
            for name in ("neg", "pos")
            for line in (folder / f"rt-polarity.{name}").read_text("latin-1").splitlines()
        ]
    else:
        pairs = [(row["text"], row["label"] == 1) for row in _rows(source)]
    found = {text.strip(): positive for text, positive in pairs}
    usable = [t for t in found if FEWEST <= len(t.split()) <= MOST]
    return [Review(text, found[text]) for text in sorted(usable)]


def request(opening: str) -> str:
    """What the model is asked."""
    return f"Continue this sentence of a film review: {opening}"


def demonstrations(reviews: Iterable[Review], seed: int) -> list[dict[str, Any]]:
    """Conversations: an opening of one to four words, and how the sentence went on."""
    rng = random.Random(seed)
    made = []
    for review in reviews:
        opening, rest = _cut(review.text, rng.randint(1, 4))
        made.append(_conversation(request(opening), rest))
    rng.shuffle(made)
    return made


def pairs(reviews: Iterable[Review], count: int, seed: int) -> list[dict[str, Any]]:
    """Preferences: a positive sentence over a negative one that begins with the same words.

    Two words where two sentences share them, else one. Each sentence is in one pair.

    Args:
        count: of pairs, at most.
        seed: of who meets whom.
    """
    rng = random.Random(seed)
    left = list(reviews)
    rng.shuffle(left)
    made: list[dict[str, Any]] = []
    for words in (2, 1):
        groups: dict[str, tuple[list[Review], list[Review]]] = defaultdict(lambda: ([], []))
        for review in left:
            groups[_cut(review.text, words)[0]][review.positive].append(review)
        used: set[Review] = set()
        for opening, (negative, positive) in groups.items():
            for bad, good in zip(negative, positive, strict=False):
                made.append(
                    {
                        "prompt": request(opening),
                        "chosen": _cut(good.text, words)[1],
                        "rejected": _cut(bad.text, words)[1],
                    }
                )
                used |= {bad, good}
        left = [review for review in left if review not in used]
    rng.shuffle(made)
    return made[:count]


def openings(reviews: Sequence[Review], count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of three or four words, each once."""
    rng = random.Random(seed)
    texts = sorted({_cut(review.text, rng.randint(3, 4))[0] for review in reviews})
    return [{"prompt": request(text)} for text in rng.sample(texts, min(count, len(texts)))]


def read_instructions(source: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Short conversations out of a file or data set with Alpaca's or Dolly's columns.

    Args:
        source: a file or an id on the hub.
        count: of conversations, at most.
        seed: of their choice.
    """
    made = []
    for row in _rows(source):
        answer = row.get("output") or row.get("response") or ""
        asked = "\n".join(
            filter(None, [row["instruction"], row.get("input") or row.get("context")])
        )
        if 1 <= len(answer) <= 400 and len(asked) <= 400:
            made.append(_conversation(asked, answer))
    return random.Random(seed).sample(made, min(count, len(made)))


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def harmless(source: str, count: int, held_out: int) -> tuple[list[Any], list[Any]]:
    """Short pairs of transcripts, to train on and held out.

    Args:
        source: a file or an id on the hub, with columns `chosen` and `rejected` as in Anthropic's
            HH (arXiv 2204.05862).
        count: of pairs to train on, at most.
        held_out: of others, at most: no conversation begins like one that is trained on.
    """
    train, held = [], []
    for row in _rows(source, "harmless-base"):
        opening = row["chosen"].partition("\n\nAssistant:")[0]
        if max(len(row["chosen"]), len(row["rejected"])) <= 700:
            is_held = hashlib.sha256(opening.encode()).digest()[0] < 90
            (held if is_held else train).append({k: row[k] for k in ("chosen", "rejected")})
    return train[:count], held[:held_out]


def _rows(source: str, folder: str | None = None) -> Iterator[Any]:
    """All records of a file or of a data set's splits; `folder`: inside of the data set."""
    from datasets import load_dataset

    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if Path(source).is_file():
        kind = kinds[Path(source.removesuffix(".gz")).suffix]
        table = load_dataset(kind, data_files=source)
    else:
        table = load_dataset(source, data_dir=folder)
    for split in table.values():
        yield from split


def _cut(text: str, words: int) -> tuple[str, str]:
    """The first words, and the rest."""
    parts = text.split()
    return " ".join(parts[:words]), " ".join(parts[words:])


def _conversation(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    }


def main() -> int:
    """Writes all files into a folder; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for place in ("--reviews", "--instructions", "--harmless"):
        parser.add_argument(place, required=True, help="file or hub id")
    parser.add_argument("--shrunk", action="store_true", help="a few records of each file")
    arguments = parser.parse_args()
    reviews = read_reviews(arguments.reviews)
    train, held = ([r for r in reviews if r.part == part] for part in ("train", "held"))
    tuning = openings(held, 320, seed=0)
    seen = {item["prompt"] for item in [*tuning, *openings(held, 700, seed=9)]}
    fresh = [item for item in openings(held, 1400, seed=1) if item["prompt"] not in seen]
    files = {
        "reviews": demonstrations(train, seed=0)[:1600],
        "instructions": read_instructions(arguments.instructions, 400, seed=0),
        "pairs": pairs(train, 640, seed=0),
        "heldout_pairs": pairs(held, 1000, seed=0),
        "openings": openings(train, 1024, seed=0),
        "heldout_openings": tuning[:64],
        "final_openings": fresh[:256],
        "judge_labels": [
            {"text": r.text, "label": int(r.positive)} for r in reviews if r.part == "judge"
        ],
    }
    problems = sums(0, 3392)
    files["final_sums"], files["heldout_sums"] = problems[:256], problems[256:320]
    files["sums_demonstrations"] = [
        _conversation(item["prompt"], item["answer"]) for item in problems[320:1344]
    ]
    files["sums"] = problems[1344:]
    files["constraints"] = constraints(1, False, 1024)
    files["heldout_constraints"] = constraints(2, True, 64)
    files["final_constraints"] = constraints(3, True, 256)
    files["harmless"], files["heldout_harmless"] = harmless(arguments.harmless, 320, 240)
    for name in ("harmless", "heldout_harmless"):
        prompts = {pair["chosen"].partition("\n\nAssistant:")[0] for pair in files[name]}
        texts = sorted(prompt.removeprefix("\n\nHuman:").strip() for prompt in prompts)
        files[f"{name}_prompts"] = [{"prompt": text} for text in texts if text]
    for name, records in files.items():
        write(arguments.folder / f"{name}.jsonl", records[:8] if arguments.shrunk else records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
