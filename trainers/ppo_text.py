"""Other text that the policy goes on predicting during PPO (ptx): which rows, at which step."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.config import Config
from chatllama.distributed import rank
from data.collate import batch_indices, pad_right
from data.mixture import load_mixture
from data.sft import tokenize_conversations, tokenize_text
from trainers.dealing import groups_of_like_totals


@dataclass(frozen=True)
class TextShare:
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
class TextBatch:
    """The text of one optimizer step."""

    rows: list[dict]
    groups: list[list[int]]
    """Of the rows, one for each microbatch, with about equally many tokens."""
    pad_id: int

    def share(self, place: int) -> TextShare:
        """The text beside the minibatch's microbatch number `place`."""
        own = [self.rows[row] for row in self.groups[place]]
        tokens, mask = pad_right([row["input_ids"] for row in own], self.pad_id)
        trains, _ = pad_right([row["mask"] for row in own], 0)
        total = sum(sum(row["mask"][1:]) for row in self.rows)
        return TextShare(tokens, mask, trains.bool(), max(total, 1))


@dataclass(frozen=True)
class TextStream:
    """Rows of text in an order that depends on the seed and the optimizer step alone."""

    rows: Dataset
    per_microbatch: int
    pad_id: int
    seed: int

    def batch(self, position: int, num_microbatches: int) -> TextBatch:
        """The text of the optimizer step number `position`."""
        count = self.per_microbatch * num_microbatches
        chosen = batch_indices(len(self.rows), count, position, self.seed)
        rows = [self.rows[i] for i in chosen]
        lengths = [len(row["input_ids"]) for row in rows]
        return TextBatch(rows, groups_of_like_totals(lengths, num_microbatches), self.pad_id)


def load_text(cfg: Config, tokenizer: PreTrainedTokenizerFast, pad_id: int) -> TextStream | None:
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
    return TextStream(rows, section.ptx_microbatch_size, pad_id, cfg.seed)
