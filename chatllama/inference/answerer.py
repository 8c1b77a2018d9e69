"""Answers of one role to batches of prompts, with log-probabilities and reward scores.

Loading the model is in `loading.py`, files and printing are in `generation_command.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.inference.load import LoadedRun
from chatllama.model.roles import (
    Role,
    RoleModel,
    acting_as,
    autocast,
)
from chatllama.model.scoring import response_logprobs, score_sequences
from chatllama.text.chat_format import Message, end_of_turn_ids, render
from chatllama.text.detokenizing import AnswerText
from chatllama.text.encoding import decode
from chatllama.text.padding import pad_left, pad_right


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    text: str
    """Without stop token or stop string, and without blanks around it."""
    ids: list[int]
    """Every sampled token, those that end it included."""
    finished: bool
    """It ended by itself or at a stop string, not because it grew too long."""
    logprobs: list[float] | None
    """Of `ids`, at the sampling temperature (at 1 where that is 0), without top-k and top-p."""
    score: float | None
    """Of the reward model."""


@dataclass(frozen=True)
class Answerer:
    """A role ready to answer, and the reward model where there is one."""

    model: RoleModel
    acting: Role
    tokenizer: PreTrainedTokenizerFast
    chat: ChatSection
    reward_roles: list[Role]
    combine: Literal["mean", "min"]
    """How the members of a reward ensemble make one score."""
    compiled: StaticKVCache | None = None
    """Of the model: its decode step is compiled."""

    @classmethod
    def of(cls, loaded: LoadedRun, acting: Role, compiled: bool = False) -> "Answerer":
        """A role of an opened run."""
        combine = loaded.config.ppo.reward_ensemble
        roles, model = loaded.reward_roles, loaded.model
        slots = StaticKVCache(model.llama) if compiled else None
        return cls(model, acting, loaded.tokenizer, loaded.chat, roles, combine, slots)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's first token."""
        return render(self.tokenizer, self.chat, messages, add_generation_prompt=True).ids

    @torch.no_grad()
    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        uniforms: torch.Tensor,
        sampling: Sampling,
        stops: Sequence[str],
        batch_size: int,
        with_logprobs: bool,
    ) -> list[Answer]:
        """One answer to each conversation.

        Args:
            conversations: N, ending with the user.
            uniforms: (N, max_new_tokens) float32 in [0, 1).
            sampling: how to choose tokens.
            stops: strings that end an answer.
            batch_size: rows at a time, in sampling and in scoring.
            with_logprobs: whether to take log-probabilities.
        """
        prompts = [self.render(messages) for messages in conversations]
        stop_ids = end_of_turn_ids(self.tokenizer, self.chat)
        llama = self.model.llama
        with acting_as(self.model, self.acting), autocast(self.model):
            watch = _StopStrings(self.tokenizer, stops, len(prompts)) if stops else None
            sampled = generate(
                llama,
                prompts,
                sampling,
                stop_ids,
                uniforms,
                batch_size,
                ends_with=watch,
                compiled=self.compiled,
            )
        cuts = [watch and watch.cut(number) for number in range(len(prompts))]
        ended = [self._end(*each, stop_ids) for each in zip(sampled, cuts, strict=True)]
        temperature = (sampling.temperature or 1.0) if with_logprobs else None
        answers: list[Answer] = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            answers += self._examined(conversations[rows], prompts[rows], ended[rows], temperature)
        return answers

    def _end(self, ids: list[int], cut: str | None, stop_ids: Sequence[int]) -> "_Ended":
        if cut is not None:
            return _Ended(cut.strip(), ids, finished=True, by_string=True)
        by_token = ids[-1] in stop_ids
        body = ids[:-1] if by_token else ids
        return _Ended(decode(self.tokenizer, body).strip(), ids, by_token, by_string=False)

    def _examined(
        self,
        conversations: Sequence[Sequence[Message]],
        prompts: Sequence[list[int]],
        ended: Sequence["_Ended"],
        temperature: float | None,
    ) -> list[Answer]:
        """Answers with their numbers, from one forward pass for each kind of number."""
        logprobs: list[list[float]] | None = None
        if temperature is not None:
            logprobs = self.logprobs(prompts, [end.ids for end in ended], temperature)
        scores: list[float] | None = None
        if self.reward_roles:
            # An answer cut at a string is scored as the finished turn that the user gets.
            whole = [
                self._with_answer(messages, end.text) if end.by_string else [*prompt, *end.ids]
                for messages, prompt, end in zip(conversations, prompts, ended, strict=True)
            ]
            scores = self.scores(whole)
        return [
            Answer(
                end.text,
                end.ids,
                end.finished,
                logprobs[row] if logprobs is not None else None,
                scores[row] if scores is not None else None,
            )
            for row, end in enumerate(ended)
        ]

    def _with_answer(self, messages: Sequence[Message], text: str) -> list[int]:
        answered: list[Message] = [*messages, {"role": "assistant", "content": text}]
        return render(self.tokenizer, self.chat, answered).ids

    @torch.no_grad()
    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        temperature: float,
    ) -> list[list[float]]:
        """Log-probabilities of the responses' tokens by the acting role, in one forward pass."""
        prompt_ids, prompt_mask = pad_left(prompts, 0)
        response_ids, response_mask = pad_right(responses, 0)
        tokens = torch.cat([prompt_ids, response_ids], dim=1)
        mask = torch.cat([prompt_mask, response_mask], dim=1)
        scores = response_logprobs(
            self.model, self.acting, tokens, mask, response_mask, temperature
        )
        return [
            row[: len(response)].tolist()
            for row, response in zip(scores.logprobs, responses, strict=True)
        ]

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The reward model's scores of whole conversations as token ids, in one forward pass."""
        tokens, mask = pad_right(sequences, 0)
        members = torch.stack(
            [score_sequences(self.model, tokens, mask, role) for role in self.reward_roles]
        )
        return (members.amin(0) if self.combine == "min" else members.mean(0)).tolist()


@dataclass(frozen=True)
class _Ended:
    """A sampled answer up to its end."""

    text: str
    ids: list[int]
    finished: bool
    by_string: bool


class _StopStrings:
    """Answers in the making, each ended by the first token that completes a stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str], count: int
    ) -> None:
        self._texts = [AnswerText(tokenizer, stops) for _ in range(count)]
        self._told = [""] * count

    def __call__(self, number: int, token: int) -> bool:
        """Whether this token ends answer `number`."""
        text = self._texts[number]
        self._told[number] += text.push(token)
        return text.stopped

    def cut(self, number: int) -> str | None:
        """The text before the stop string that ended an answer. None: no string did."""
        rest = self._texts[number].finish()
        return self._told[number] + rest if self._texts[number].stopped else None


def random_numbers(seed: int, prompt: int, sample: int, count: int) -> torch.Tensor:
    """`count` float32 numbers in [0, 1) that belong to one sample of one prompt."""
    numbers = np.random.default_rng([seed, prompt, sample]).random(count, dtype=np.float32)
    return torch.from_numpy(numbers)
