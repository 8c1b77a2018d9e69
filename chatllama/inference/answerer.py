"""Answers of one role to batches of prompts, with log-probabilities and reward scores.

Loading the model is in `load.py`, files and printing are in `batch.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.inference.load import LoadedRun
from chatllama.model.roles import Role, sampling_as
from chatllama.model.scoring import response_logprobs, score_sequences
from chatllama.text.chat_format import Message, end_of_turn_ids, render
from chatllama.text.detokenizing import AnswerText
from chatllama.text.encoding import decode, encode
from chatllama.text.padding import pad_left, pad_right


@dataclass
class Answer:
    """One sampled answer."""

    text: str
    """Without stop token or stop string, and without blanks around it."""
    ids: list[int]
    """Every sampled token, those that end it included."""
    finished: bool
    """It ended at a stop token or stop string, not at the length limit."""
    logprobs: list[float] | None = None
    """Of `ids`, at the sampling temperature (at 1 where that is 0), without top-k and top-p."""
    score: float | None = None
    """Of the reward model."""


class Answerer:
    """The role `acting` of an opened run, which answers, and the reward model where there is one.

    With `compiled` the decode step is compiled.
    """

    def __init__(self, loaded: LoadedRun, acting: Role, compiled: bool = False) -> None:
        self.loaded, self.model, self.acting = loaded, loaded.model, acting
        self.compiled = StaticKVCache(loaded.model.llama) if compiled else None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, ready for the assistant's next token.

        That is its first after a message of the user, else one that goes on with its own message.
        """
        layout = (self.loaded.tokenizer, self.loaded.chat)
        continues = add_generation_prompt and is_continued(messages)
        opens = add_generation_prompt and not continues
        return render(
            *layout,
            messages,
            add_generation_prompt=opens,
            continue_final_message=continues,
            last_answer_only=True,
        ).ids

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
            conversations: N, ending with the user, or with an answer of the assistant that is
                continued: then the text is what follows it, with its first space.
            uniforms: (N, max_new_tokens) float32 in [0, 1).
            sampling: also bounds the answer's length.
            stops: strings that end an answer.
            batch_size: rows at a time, in sampling and in scoring.
        """
        prompts = [self.render(messages) for messages in conversations]
        stop_ids = end_of_turn_ids(self.loaded.tokenizer, self.loaded.chat)
        continued = [is_continued(messages) for messages in conversations]
        streams = [_StopStrings(self.loaded.tokenizer, stops, c) for c in continued if stops]

        with sampling_as(self.model, self.acting):
            sampled = generate(
                self.model.llama,
                prompts,
                sampling,
                stop_ids,
                uniforms,
                batch_size,
                ends_with=(lambda n, token: streams[n].ends_with(token)) if streams else None,
                compiled=self.compiled,
            )
        answers: list[Answer] = []
        sequences: list[list[int]] = []
        for number, (prompt, ids) in enumerate(zip(prompts, sampled, strict=True)):
            cut = streams[number].cut() if streams else None
            sequence, by_token = [*prompt, *ids], ids[-1] in stop_ids
            if cut is not None:
                text = cut if continued[number] else cut.strip()
                if self.loaded.reward_roles:  # scores the finished turn that the user gets
                    sequence = self.render(with_answer(conversations[number], text), False)
            else:
                text = self._decode(ids[:-1] if by_token else ids, continued[number])
            answers.append(Answer(text, ids, by_token or cut is not None))
            sequences.append(sequence)
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            if with_logprobs:
                found = self.logprobs(prompts[rows], sampled[rows], sampling.temperature or 1.0)
                for answer, logprobs in zip(answers[rows], found, strict=True):
                    answer.logprobs = logprobs
            if self.loaded.reward_roles:
                for answer, score in zip(answers[rows], self.scores(sequences[rows]), strict=True):
                    answer.score = score
        return answers

    def _decode(self, ids: Sequence[int], continues: bool) -> str:
        """The text of an answer; behind other text its first space is kept."""
        tokenizer = self.loaded.tokenizer
        before = encode(tokenizer, "a") if continues else []
        text = decode(tokenizer, [*before, *ids])[len(decode(tokenizer, before)) :]
        return text if continues else text.strip()

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
        model, role = self.model, self.acting
        scores = response_logprobs(model, role, tokens, mask, response_mask, temperature)
        rows = zip(scores.logprobs, responses, strict=True)
        return [row[: len(response)].tolist() for row, response in rows]

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The reward model's scores of whole conversations as token ids, in one forward pass."""
        tokens, mask = pad_right(sequences, 0)
        roles, combine = self.loaded.reward_roles, self.loaded.config.ppo.reward_ensemble
        members = torch.stack([score_sequences(self.model, tokens, mask, role) for role in roles])
        return (members.amin(0) if combine == "min" else members.mean(0)).tolist()


class _StopStrings:
    """The text of an answer while it is sampled, up to a stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str], continues: bool
    ) -> None:
        self._stream = AnswerText(tokenizer, stops, continues)
        self._text = ""

    def ends_with(self, token: int) -> bool:
        """Whether this token completes a stop string."""
        self._text += self._stream.push(token)
        return self._stream.stopped

    def cut(self) -> str | None:
        """The text before the stop string that ended the answer. None: no string did."""
        rest = self._stream.finish()
        return self._text + rest if self._stream.stopped else None


def is_continued(messages: Sequence[Message]) -> bool:
    """Whether a conversation ends with the assistant, whose message is to be gone on with."""
    return bool(messages) and messages[-1]["role"] == "assistant"


def with_answer(messages: Sequence[Message], text: str) -> list[Message]:
    """The conversation with an answer, or with more of the one that it ends with."""
    if is_continued(messages):
        text = messages[-1]["content"].rstrip() + text
        messages = messages[:-1]
    return [*messages, {"role": "assistant", "content": text}]


def random_numbers(seed: int, prompt: int, sample: int, count: int) -> torch.Tensor:
    """`count` float32 numbers in [0, 1) that belong to one sample of one prompt."""
    numbers = np.random.default_rng([seed, prompt, sample]).random(count, dtype=np.float32)
    return torch.from_numpy(numbers)
