"""`chatllama eval RUN --suite instructions`: answers to held-out instructions beside references.

Loss and token accuracy are those of SFT's own evaluation: of every answer of a conversation, given
what stands before it. Exact match, ROUGE-L, BLEU and chrF compare the last answer with what the
model writes greedily.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatllama.config.schema import with_weights
from chatllama.generation.sampling import Sampling
from chatllama.inference.answerer import Answer, Answerer
from chatllama.inference.evaluation.cli import SuiteOptions
from chatllama.inference.evaluation.command import acting_as_role, kept, place_of, roles_of
from chatllama.inference.evaluation.command import settings as settings_of
from chatllama.inference.evaluation.translation import translation_scores
from chatllama.inference.folders import find_model
from chatllama.inference.load import load_run
from chatllama.inference.options import digest, find_role
from chatllama.model.lm_head import token_loss
from chatllama.model.scoring import hidden_states
from chatllama.reporting.display import answer_progress
from chatllama.reporting.statistics import NORMAL, mean_and_error
from chatllama.runtime.command_line import tell
from chatllama.runtime.distributed import to_device
from chatllama.runtime.files import replace_text, write_json
from chatllama.runtime.jsonl import json_line
from chatllama.text.padding import pad_right

TASK = "instructions"
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
"""What ROUGE-L compares: words, or single characters where Chinese and Japanese have no blanks."""
SHOWN = {
    "loss": "loss, nats a token",
    "accuracy": "token accuracy",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
}
Fit = Callable[..., tuple[list[int], list[int], str]]
"""Messages, tokenizer, layout, longest length and untrained turns -> ids, mask, what was cut."""


@dataclass(frozen=True)
class Held:
    """A held-out conversation, which ends with the assistant's answer."""

    messages: list[dict[str, Any]]
    untrained: list[int]
    """Numbers of turns whose tokens do not count."""
    where: str


def evaluate_instructions(
    place: Path, options: SuiteOptions, conversations: Sequence[Held], fit: Fit
) -> dict[str, dict[str, float]]:
    """Measures the roles, prints a table and writes RUN/benchmarks/instructions/ROLE.json, .jsonl.

    Returns:
        Role -> metrics with their standard errors, and counts.

    Raises:
        ValueError: the run has no such role.
    """
    run, cfg = find_model(place)
    cfg = with_weights(cfg, options.dtype, options.quantization)
    adapters = dict(find_role(run, cfg, role) for role in roles_of(run, cfg, options.role))
    folder = place_of(run, TASK)
    conversations = conversations[: options.limit]
    new = options.max_new_tokens or cfg.generation.max_new_tokens
    found: dict[str, dict[str, float]] = {}
    answerer: Answerer | None = None
    for role, adapter in adapters.items():
        settings = settings_of(options, cfg, adapter) | {
            "max_new_tokens": new,
            "records": digest([held.messages for held in conversations]),
        }
        path = folder / f"{role}.json"
        results = kept(path, settings)
        if TASK not in results:
            acting: Any = acting_as_role(role)
            if answerer is None:
                names = [acting_as_role(each) for each in adapters]
                answerer = Answerer(load_run(run, cfg, names, options.trust_remote_code), acting)
            answerer.acting = acting
            size = options.batch_size or cfg.generation.batch_size
            lines = list(_measure(answerer, conversations, fit, new, size))
            results[TASK] = summary(lines)
            replace_text(path.with_suffix(".jsonl"), "".join(map(json_line, lines)))
            write_json(path, {"settings": settings, "tasks": results})
            tell(f"{role}: {results[TASK]['items']:.0f} conversations")
        found[role] = results[TASK]
    print("\n".join(_table(found)))
    print(f"written: {folder}")
    return found


def _measure(
    answerer: Answerer, conversations: Sequence[Held], fit: Fit, new: int, size: int
) -> Iterator[dict[str, Any]]:
    """What is found of each conversation, `size` at a time."""
    loaded = answerer.loaded
    positions: int = answerer.model.llama.config.max_position_embeddings
    longest = min(loaded.config.sft.max_length, positions)
    with answer_progress(len(conversations), 0, True) as advance:
        for start in range(0, len(conversations), size):
            batch = conversations[start : start + size]
            layout = (loaded.tokenizer, loaded.chat, longest)
            rows = [fit(held.messages, *layout, held.untrained)[:2] for held in batch]
            answers = _answers(answerer, batch, new, positions)
            for held, numbers, answer in zip(batch, _losses(answerer, rows), answers, strict=True):
                line = {"where": held.where, "prompt": held.messages[:-1]}
                yield line | numbers | compared(held.messages[-1]["content"], answer)
            advance(len(batch))


@torch.no_grad()
def _losses(
    answerer: Answerer, rows: Sequence[tuple[list[int], list[int]]]
) -> Iterator[dict[str, float]]:
    """Loss and right guesses, summed over the answers' tokens, of each conversation."""
    tokens, real = pad_right([ids for ids, _ in rows], 0)
    counted, _ = pad_right([mask for _, mask in rows], 0)
    wanted = counted[:, 1:].bool()
    inputs = (tokens[:, :-1], real[:, :-1] & real[:, 1:], wanted)
    states = hidden_states(answerer.model, answerer.acting, *inputs)
    targets = to_device(tokens[:, 1:][wanted])
    counts = wanted.sum(1).tolist()
    weight = answerer.model.llama.lm_head.weight
    for own, target in zip(states.split(counts), targets.split(counts), strict=True):
        loss, correct = token_loss(own, weight, target)
        yield {"loss": float(loss), "correct": int(correct), "tokens": len(target)}


def _answers(
    answerer: Answerer, batch: Sequence[Held], new: int, positions: int
) -> list[Answer | None]:
    """A greedy answer to each; None where question and answer do not fit the model's positions."""
    talks: list[Any] = [held.messages[:-1] for held in batch]
    fits = [i for i, talk in enumerate(talks) if len(answerer.render(talk)) + new <= positions]
    found: list[Answer | None] = [None] * len(talks)
    if fits:
        asked, greedy = [talks[i] for i in fits], Sampling(new, temperature=0.0)
        unused = torch.zeros(len(asked), new)
        answers = answerer.answer(asked, unused, greedy, (), len(asked), False)
        for i, answer in zip(fits, answers, strict=True):
            found[i] = answer
    return found


def compared(reference: str, answer: Answer | None) -> dict[str, Any]:
    """A generated answer beside the reference."""
    reference = reference.strip()
    if answer is None:
        return {"reference": reference, "answer": None}
    return {
        "reference": reference,
        "answer": answer.text,
        "finished": answer.finished,
        "exact_match": float(answer.text == reference),
        "rouge_l": rouge_l(reference, answer.text),
    }


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence of lower-case words (Lin 2004, ROUGE-L)."""
    ours, theirs = (WORD.findall(text.lower()) for text in (reference, answer))
    row = [0] * (len(theirs) + 1)
    for word in ours:
        above = row[:]
        for i, other in enumerate(theirs, 1):
            row[i] = above[i - 1] + 1 if word == other else max(above[i], row[i - 1])
    return 2 * row[-1] / max(len(ours) + len(theirs), 1)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over conversations, or over tokens, with standard errors; counts.

    Errors of BLEU and chrF, which are of the whole set, are from sacrebleu's bootstrap.
    """
    found: dict[str, float] = {}
    tokens = [line["tokens"] for line in lines]
    for name, total in (("loss", "loss"), ("accuracy", "correct")):
        found[name], found[f"{name}_stderr"] = ratio([line[total] for line in lines], tokens)
    answered = [line for line in lines if line["answer"] is not None]
    if answered:
        for name in ("exact_match", "rouge_l"):
            values = [line[name] for line in answered]
            found[name], found[f"{name}_stderr"] = mean_and_error(values)
        answers, references = ([x[name] for x in answered] for name in ("answer", "reference"))
        for name, score in translation_scores(answers, references, "en").items():
            half = score["plus_minus"]
            found[name] = score["score"]
            found[f"{name}_stderr"] = math.nan if half is None else half / NORMAL
    cut = sum(not line["finished"] for line in answered)
    return found | {
        "items": len(lines), "too_long": len(lines) - len(answered), "unfinished": cut
    }  # fmt: skip


def ratio(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean over all tokens and its standard error, clustered by conversation.

    The error is that of a ratio of means (Cochran 1977, Sampling Techniques, section 6.3).
    """
    mean, size = sum(totals) / sum(counts), len(totals)
    if size == 1:
        return mean, math.nan
    squares = sum((t - mean * n) ** 2 for t, n in zip(totals, counts, strict=True))
    return mean, math.sqrt(squares * size / (size - 1)) / sum(counts)


def _table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """A row for each metric, a column for each role."""
    width = max(map(len, SHOWN.values()))
    yield f"{'':<{width}}  " + "  ".join(f"{role:>15}" for role in found)
    for name, label in SHOWN.items():
        cells = [_cell(metrics, name) for metrics in found.values()]
        yield f"{label:<{width}}  " + "  ".join(f"{cell:>15}" for cell in cells)
    for role, metrics in found.items():
        counts = f"{role}: {metrics['items']:.0f} conversations"
        if metrics["too_long"]:
            counts += f", {metrics['too_long']:.0f} of them too long to be answered"
        yield f"{counts}; {metrics['unfinished']:.0f} answers cut by max_new_tokens"


def _cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    digits = 1 if name in ("bleu", "chrf") else 3
    return f"{metrics[name]:.{digits}f} ± {metrics[f'{name}_stderr']:.{digits}f}"
