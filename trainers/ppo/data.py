"""Other text that the policy goes on predicting during PPO (ptx): which rows, at which step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.runtime.distributed import rank
from chatllama.text.chat_format import end_of_turn_ids
from chatllama.text.encoding import decode
from chatllama.text.padding import pad_right
from data.batches import batch_indices
from data.mixture import load_mixture
from data.tokenize import tokenize_conversations, tokenize_prompts, tokenize_text
from trainers.engine.microbatches import groups_of_like_totals


@dataclass(frozen=True)
class StopTokens:
    """How answers end and are read."""

    tokenizer: PreTrainedTokenizerFast
    stop_ids: list[int]
    """Ids that end a response."""
    pad_id: int
    """Fills; any id, since masks go by position."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without its stop token."""
        return decode(self.tokenizer, ids).strip()


@dataclass(frozen=True)
class PtxMicrobatch:
    """The text beside one microbatch of responses, on the CPU."""

    tokens: torch.Tensor
    """(N, L) int64, padded on the right."""
    mask: torch.Tensor
    """(N, L) bool, real tokens."""
    trains: torch.Tensor
    """(N, L) bool, tokens that count as predictions."""
    num_tokens: int
    """Predictions of the whole optimizer step, over all ranks."""


@dataclass(frozen=True)
class PtxBatch:
    """The text of one optimizer step."""

    rows: list[dict]
    groups: list[list[int]]
    """Of the rows, one for each microbatch, with about equally many tokens."""
    pad_id: int

    def share(self, place: int) -> PtxMicrobatch:
        """The text beside the minibatch's microbatch number `place`."""
        own = [self.rows[row] for row in self.groups[place]]
        tokens, mask = pad_right([row["input_ids"] for row in own], self.pad_id)
        trains, _ = pad_right([row["mask"] for row in own], 0)
        total = sum(sum(row["mask"][1:]) for row in self.rows)
        return PtxMicrobatch(tokens, mask, trains.bool(), max(total, 1))


@dataclass(frozen=True)
class PtxLoader:
    """Rows of text in an order that depends on the seed and the optimizer step alone."""

    rows: Dataset
    per_microbatch: int
    pad_id: int
    seed: int

    def batch(self, position: int, num_microbatches: int) -> PtxBatch:
        """The text of the optimizer step number `position`."""
        count = self.per_microbatch * num_microbatches
        chosen = batch_indices(len(self.rows), count, position, self.seed)
        rows = [self.rows[i] for i in chosen]
        lengths = [len(row["input_ids"]) for row in rows]
        return PtxBatch(rows, groups_of_like_totals(lengths, num_microbatches), self.pad_id)


def load_text(cfg: Config, tokenizer: PreTrainedTokenizerFast, pad_id: int) -> PtxLoader | None:
    """The ptx text of the config, tokenised; None without.

    Raises:
        ValueError: bad records, or plain text and conversations are mixed.
    """
    section = cfg.ppo
    if not section.ptx_data:
        return None
    plain = [source.format in ("text", "lines") for source in section.ptx_data]
    if any(plain) and not all(plain):
        raise ValueError("ppo.ptx_data: either all sources have format text or lines, or none")
    kind = "text" if all(plain) else "sft"
    mixture = load_mixture(section.ptx_data, [], 0.0, cfg.seed, kind, section.decontaminate)
    if kind == "text":
        rows, report = tokenize_text(mixture.train, tokenizer, section.ptx_max_length)
        rows = rows.filter(lambda row: len(row["input_ids"]) > 1)  # the first is never predicted
        rows = rows.map(lambda row: {"mask": [1] * len(row["input_ids"])})
    else:
        rows, report = tokenize_conversations(
            mixture.train, tokenizer, cfg.chat, section.ptx_max_length
        )
    if rank() == 0:
        print(mixture.summary())
        print(f"ptx: {report.summary()}")
    return PtxLoader(rows, section.ptx_microbatch_size, pad_id, cfg.seed)


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts: `input_ids` and `text`."""

    train: Dataset
    held_out: Dataset


def stop_tokens(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> StopTokens:
    """The stop and pad ids of the chat contract."""
    assert isinstance(tokenizer.pad_token_id, int)
    return StopTokens(tokenizer, end_of_turn_ids(tokenizer, cfg.chat), tokenizer.pad_token_id)


def load_prompts(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """Training and held-out prompts, read, split and tokenised as the config says.

    Raises:
        ValueError: bad records, or nothing is left to train on.
    """
    section = cfg.ppo
    mixture = load_mixture(
        section.data,
        section.eval_data,
        section.eval_fraction,
        cfg.seed,
        "prompts",
        section.decontaminate,
    )
    if rank() == 0:
        print(mixture.summary())
    parts = []
    for name, records in (("training", mixture.train), ("held-out", mixture.held_out)):
        if not len(records):
            parts.append(records)
            continue
        tokens, report = tokenize_prompts(records, tokenizer, cfg.chat, section.max_prompt_length)
        if rank() == 0:
            print(f"{name} prompts: {report.summary()}")
        parts.append(tokens)
    return Prompts(parts[0], parts[1])
