"""Judges of answers that no training stage of `benchmarks/real.py` sees.

    python benchmarks/real_judges.py FOLDER MODEL DATA

reads the answers of a seed's tasks and writes FOLDER/judged.json. Sums and constraints are checked
by their programs. Film reviews have two judges of sentiment, which share nothing: a lexicon with
rules (VADER, Hutto and Gilbert 2014) and a linear classifier fitted on labels of other sentences.
Beside them what an answer may lose: the base model's perplexity and the share of distinct pairs of
words (distinct-2, Li 2016, arXiv 1510.03055).
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from real_data import Review
from real_rewards import followed, right

from chatllama.runtime.jsonl import read_lines

Answer = tuple[str, str]
"""Prompt and answer."""


@cache
def _lexicon() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]

    return SentimentIntensityAnalyzer()


def lexicon(texts: Sequence[str]) -> list[float]:
    """Between -1 (negative) and 1 (positive) for each text."""
    return [_lexicon().polarity_scores(text)["compound"] for text in texts]


class Classifier:
    """Logistic regression on words and pairs of words."""

    def __init__(self, reviews: Sequence[Review]):
        """Fits it.

        Args:
            reviews: sentences with labels.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        self._pipeline = make_pipeline(words, LogisticRegression(C=20.0, max_iter=1000))
        self._pipeline.fit([r.text for r in reviews], [r.positive for r in reviews])

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Probability that each text is positive, less that it is negative: -1 to 1."""
        return [2.0 * float(p) - 1.0 for p in self._pipeline.predict_proba(texts)[:, 1]]


@torch.no_grad()
def perplexity(model_folder: Path, answers: Sequence[Answer], rows: int = 16) -> float:
    """Of the answers' tokens given their prompts, by plain transformers.

    Args:
        model_folder: of a causal language model with a chat template.
        answers: prompts and answers; an empty answer has no tokens.
        rows: at a time.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    encoded = []
    for prompt, answer in answers:
        messages = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        encoded.append((start, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    encoded.sort(key=lambda pair: sum(map(len, pair)))
    total, count = 0.0, 0
    for begin in range(0, len(encoded), rows):
        batch = encoded[begin : begin + rows]
        width = max(len(start) + len(end) for start, end in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (start, end) in enumerate(batch):
            ids[row, : len(start) + len(end)] = torch.tensor(start + end)
            labels[row, len(start) : len(start) + len(end)] = torch.tensor(end, dtype=torch.long)
        logits = model(ids).logits[:, :-1].float()  # padding on the right is seen by nobody
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + float(losses), count + int((labels[:, 1:] != -100).sum())
    return math.exp(total / count)


def judge_sentiment(folder: Path, model: Path, data: Path) -> dict[str, Any]:
    """Of each method: each judge's values, what answers lose, and the judges along the training.

    `curves` holds, of each evaluation of a training run, on other prompts than the final ones:
    step, the judges' values, the reward model's scores and the KL (nats) to SFT of each answer.
    """
    labels = [
        Review(row["text"], row["label"] == 1) for row in read_lines(data / "judge_labels.jsonl")
    ]
    judges = {"lexicon": lexicon, "classifier": Classifier(labels)}
    found: dict[str, Any] = {"methods": {}, "curves": {}}
    for file in sorted((folder / "answers").glob("*.jsonl")):
        rows = read_lines(file)
        texts = [row["response"] for row in rows]
        found["methods"][file.stem] = {
            **{name: judge(texts) for name, judge in judges.items()},
            "perplexity": perplexity(model, [(row["prompt"], row["response"]) for row in rows]),
            "distinct_2": distinct_pairs(texts),
            "ends": [bool(row["finished"]) for row in rows],
            "words": [len(text.split()) for text in texts],
            "answers": texts,
            "prompts": [row["prompt"] for row in rows],
        }
    for file in sorted(folder.glob("*/ppo/evaluations.jsonl")):
        found["curves"][file.parent.parent.name] = [
            {
                "step": row["step"],
                "score": row["scores"],
                "kl": row.get("kl", [0.0] * len(row["answers"])),
                **{name: judge(row["answers"]) for name, judge in judges.items()},
            }
            for row in sorted(read_lines(file), key=lambda row: row["step"])
        ]
    return found


def check(folder: Path, final: Path, reward: Callable[..., float]) -> dict[str, Any]:
    """Of each role: a program's reward of its answers to each record, their mean.

    Args:
        folder: of the task, with answers/*.jsonl, which number the records from 0 as `id`.
        final: the records with what the program needs.
        reward: (prompt, response, **columns) to a number.
    """
    records, found = read_lines(final), {}
    for file in sorted((folder / "answers").glob("*.jsonl")):
        values: list[list[float]] = [[] for _ in records]
        for row in read_lines(file):
            columns = {k: value for k, value in records[row["id"]].items() if k != "prompt"}
            values[row["id"]].append(reward(row["prompt"], row["response"], **columns))
        found[file.stem] = {"reward": [statistics.mean(some) for some in values]}
    return found


def distinct_pairs(texts: Sequence[str]) -> float:
    """Distinct pairs of neighbouring words over all such pairs (distinct-2)."""
    found = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(found)) / max(len(found), 1)


def main() -> int:
    """Writes judged.json; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("folder", "model", "data"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    folder, data = arguments.folder, arguments.data
    found = {
        "sentiment": judge_sentiment(folder / "sentiment", arguments.model, data),
        "sums": check(folder / "sums", data / "final_sums.jsonl", right),
        "constraints": check(folder / "constraints", data / "final_constraints.jsonl", followed),
    }
    (folder / "judged.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
