"""Rows of token ids as rectangular tensors, and which rows belong to which step.

Masks come from positions, never from ids: a pad id may also be a real token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from chatllama.text.padding import pad_right


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Every pair (better, worse) of answers with these ranks, 0 for the best; ties make none."""
    numbers = range(len(ranks))
    return [(i, j) for i in numbers for j in numbers if ranks[i] < ranks[j]]


@dataclass(frozen=True)
class AnswerPairs:
    """The pairs among the answers of several prompts; answers are numbered one after another."""

    better: torch.Tensor
    """(P,) int64, answer that is preferred."""
    worse: torch.Tensor
    """(P,) int64, answer that it is preferred to."""
    margin: torch.Tensor
    """(P,) float32, difference of their ratings."""
    weight: torch.Tensor
    """(P,) float32, 1 / number of the prompt's pairs: all prompts weigh the same."""
    prompt: torch.Tensor
    """(P,) int64, whose answers these are."""


def answer_pairs(examples: Iterable[Mapping[str, Any]]) -> AnswerPairs:
    """All pairs among the answers of examples of `_preference`, prompt by prompt."""
    rows: list[tuple[int, int, float, float, int]] = []
    first = 0
    for number, example in enumerate(examples):
        pairs, ratings = ordered_pairs(example["ranks"]), example["ratings"]
        for i, j in pairs:
            margin = ratings[i] - ratings[j]
            rows.append((first + i, first + j, margin, 1 / len(pairs), number))
        first += len(ratings)
    better, worse, margin, weight, prompt = zip(*rows, strict=True)
    return AnswerPairs(
        torch.tensor(better),
        torch.tensor(worse),
        torch.tensor(margin, dtype=torch.float32),
        torch.tensor(weight, dtype=torch.float32),
        torch.tensor(prompt),
    )


@dataclass(frozen=True)
class PreferenceCollator:
    """Preference examples as one batch: every answer with its prompt; their pairs.

    For attention that takes whole sequences only; else `SharedPromptCollator` spares repetition.
    """

    pad_id: int

    def __call__(
        self, examples: Sequence[dict[str, Any]]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], AnswerPairs]:
        """Ids (N, T) int64 of all answers, padded on the right, and mask (N, T) bool; the pairs."""
        rows = [ids for example in examples for ids in example["answer_ids"]]
        return pad_right(rows, self.pad_id), answer_pairs(examples)

    def num_tokens(self, example: Mapping[str, Any]) -> int:
        """Tokens that the model computes for an example."""
        return sum(map(len, example["answer_ids"]))


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The `batch_size` examples of step `step` (from 0), over all ranks; rank r takes its slice.

    Epochs follow each other without a gap, each in its own random order, so that every batch is
    full and every example comes up once before any comes up twice. Depends on the arguments
    alone: a run resumed at any step, on any number of ranks, has the same batches.

    Raises:
        ValueError: there are no examples.
    """
    if num_examples < 1:
        raise ValueError(f"no examples to train on (num_examples = {num_examples})")
    begin = step * batch_size
    places = [divmod(place, num_examples) for place in range(begin, begin + batch_size)]
    return [int(_epoch_order(num_examples, epoch, seed)[offset]) for epoch, offset in places]


def bucket_by_length(lengths: Sequence[int], group: int) -> list[int]:
    """An order in which every `group` rows go from short to long; groups keep their place.

    With an optimizer step's batch as the group, its microbatches hold rows of like length and need
    less padding, while the step has the same rows: its gradient stays what it was.
    """
    groups = (range(i, min(i + group, len(lengths))) for i in range(0, len(lengths), group))
    return [i for rows in groups for i in sorted(rows, key=lambda i: lengths[i])]


def fill_rate(lengths: Sequence[int], microbatch_size: int) -> float:
    """Fraction of computed positions that hold tokens, with rows of `lengths` in training order."""
    starts = range(0, len(lengths), microbatch_size)
    batches = [lengths[start : start + microbatch_size] for start in starts]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


@lru_cache(maxsize=4)
def _epoch_order(num_examples: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def passes(num_rows: int, num_examples: int, seed: int) -> list[int]:
    """`num_examples` of the rows in training order: one permutation after another, by the seed.

    Read in order by any number of ranks it gives every optimizer step the same batch. SFT's order;
    that of the other stages, `batch_indices`, draws other permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    count = -(-num_examples // num_rows)
    order = torch.cat([torch.randperm(num_rows, generator=generator) for _ in range(count)])
    return order[:num_examples].tolist()


PROMPT = PADDING = -1


class AnswerRows(NamedTuple):
    """What `score_shared` reads."""

    tokens: torch.Tensor
    """(B, T) int64."""
    positions: torch.Tensor
    """(B, T) int64, of each token in its own sequence of prompt and answer."""
    prompts: torch.Tensor
    """(B, T) int64, number of the prompt that a token belongs to; -1 on padding."""
    answers: torch.Tensor
    """(B, T) int64, number of the token's answer; -1 in prompts."""
    ends: torch.Tensor
    """(N,) int64, where each answer ends in the rows laid end to end."""


@dataclass(frozen=True)
class _Tree:
    """A prompt and some of its answers."""

    prompt: Sequence[int]
    answers: dict[int, Sequence[int]]
    """Number in the batch -> tokens after the prompt."""

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers.values()))


@dataclass(frozen=True)
class SharedPromptCollator:
    """Preference examples as one batch: every prompt and answer once; their pairs.

    An example that would make a row longer than `max_length` is split: each of its answers gets a
    copy of the prompt.
    """

    pad_id: int
    max_length: int
    """Tokens of prompt and answer; no row is longer."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> tuple[AnswerRows, AnswerPairs]:
        """The rows, and the pairs among the answers, which are numbered one after another."""
        trees: list[_Tree] = []
        number = 0
        for example in examples:
            trees += self._trees(example, number)
            number += len(example["answer_ids"])
        return self._lay_out(_fill_rows(trees), number), answer_pairs(examples)

    def num_tokens(self, example: Mapping[str, Any]) -> int:
        """Tokens that the model computes for an example, without padding."""
        return sum(map(len, self._trees(example, 0)))

    def _trees(self, example: Mapping[str, Any], first: int) -> list[_Tree]:
        """The prompt with its answers, which are numbered from `first` on."""
        split, answers = example["prompt_length"], example["answer_ids"]
        numbered = {first + i: ids[split:] for i, ids in enumerate(answers)}
        tree = _Tree(answers[0][:split], numbered)
        if len(tree) <= self.max_length:
            return [tree]
        return [_Tree(tree.prompt, {number: ids}) for number, ids in numbered.items()]

    def _lay_out(self, rows: list[list[_Tree]], num_answers: int) -> AnswerRows:
        shape = (len(rows), max(sum(map(len, row)) for row in rows))
        tokens, positions = torch.full(shape, self.pad_id), torch.zeros(shape, dtype=torch.long)
        prompts, answers = torch.full(shape, PADDING), torch.full(shape, PROMPT)
        ends = torch.zeros(num_answers, dtype=torch.long)
        prompt_number = 0
        for row_number, row in enumerate(rows):
            column = 0
            for tree in row:
                prompt_length = len(tree.prompt)
                prompts[row_number, column : column + len(tree)] = prompt_number
                for number, ids in ((PROMPT, tree.prompt), *tree.answers.items()):
                    place = (row_number, slice(column, column + len(ids)))
                    first = 0 if number == PROMPT else prompt_length
                    tokens[place] = torch.tensor(ids, dtype=torch.long)
                    positions[place] = torch.arange(first, first + len(ids))
                    answers[place] = number
                    column += len(ids)
                    if number != PROMPT:
                        ends[number] = row_number * shape[1] + column - 1
                prompt_number += 1
        return AnswerRows(tokens, positions, prompts, answers, ends)


def _fill_rows(trees: list[_Tree]) -> list[list[_Tree]]:
    """Rows no longer than the longest tree: longest trees first, each where it fits best."""
    limit = max(map(len, trees))
    rows: list[list[_Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=len, reverse=True):
        fitting = [n for n, free in enumerate(room) if free >= len(tree)]
        if fitting:
            best = min(fitting, key=lambda n: room[n])
            rows[best].append(tree)
            room[best] -= len(tree)
        else:
            rows.append([tree])
            room.append(limit - len(tree))
    return rows
