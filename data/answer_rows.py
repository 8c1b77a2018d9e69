"""Ranked answers as rows in which a prompt stands once, followed by all of its answers.

Rows hold several prompts where there is room, so little is padding. What may see what, and how
the answers are scored, is in `chatllama/shared_prompts.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from data.collate import AnswerPairs, answer_pairs

PROMPT = -1
PADDING = -1


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
    """Examples of `tokenize_preferences` as one batch: every prompt and answer once, their pairs.

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
