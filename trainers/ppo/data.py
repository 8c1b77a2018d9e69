"""What PPO reads: prompts, the tokens that end an answer, and other text for the ptx loss."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.runtime.distributed import rank
from chatllama.text.chat_format import end_of_turn_ids
from chatllama.text.encoding import decode
from chatllama.text.padding import pad_right
from chatllama.text.tokenizer import within_positions
from data.batches import batch_indices
from data.mixture import load_examples, load_mixture
from data.tokenize import tokenize, tokenize_text
from trainers.engine.microbatches import balanced_groups
from trainers.stages.forecast import announce

SAMPLED = 1000
"""Prompts whose lengths are measured for the tokens of the stage."""


@dataclass(frozen=True)
class StopTokens:
    """How answers end and are decoded."""

    tokenizer: PreTrainedTokenizerFast
    stop_ids: list[int]
    """Ids that end a response."""
    pad_id: int
    """Any id: masks are made from positions."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without its stop token."""
        return decode(self.tokenizer, ids).strip()


def stop_tokens(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> StopTokens:
    """The stop and pad ids of the chat contract."""
    assert isinstance(tokenizer.pad_token_id, int)
    return StopTokens(tokenizer, end_of_turn_ids(tokenizer, cfg.chat), tokenizer.pad_token_id)


@dataclass(frozen=True)
class PtxMicrobatch:
    """The texts beside one microbatch of responses, on the CPU."""

    tokens: Tensor
    """(N, L) int64, padded on the right."""
    mask: Tensor
    """(N, L) bool, real tokens."""
    loss_mask: Tensor
    """(N, L) bool, tokens whose likelihood counts."""
    num_tokens: int
    """Such tokens in the whole optimizer step, over all ranks."""


@dataclass(frozen=True)
class PtxLoader:
    """Texts in an order that depends on the seed and the optimizer step alone."""

    rows: Dataset
    per_microbatch: int
    pad_id: int
    seed: int

    def step_rows(self, position: int, num_microbatches: int) -> list[dict]:
        """The texts of optimizer step `position`."""
        count = self.per_microbatch * num_microbatches
        return [self.rows[i] for i in batch_indices(len(self.rows), count, position, self.seed)]

    def microbatches(self, position: int, num_microbatches: int) -> list[PtxMicrobatch]:
        """The same in microbatches of about equally many tokens."""
        rows, found = self.step_rows(position, num_microbatches), []
        num_tokens = max(sum(sum(row["mask"][1:]) for row in rows), 1)
        for group in balanced_groups([len(r["input_ids"]) for r in rows], num_microbatches):
            tokens, mask = pad_right([rows[i]["input_ids"] for i in group], self.pad_id)
            loss_mask, _ = pad_right([rows[i]["mask"] for i in group], 0)
            found.append(PtxMicrobatch(tokens, mask, loss_mask.bool(), num_tokens))
        return found


def load_ptx(cfg: Config, tokenizer: PreTrainedTokenizerFast, pad_id: int) -> PtxLoader | None:
    """The texts of `ppo.ptx_data`, tokenised; None without.

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
    length = section.ptx_max_length
    if kind == "text":
        rows, report = tokenize_text(mixture.train, tokenizer, length)
        rows = rows.filter(lambda row: len(row["input_ids"]) > 1)  # the first is never predicted
        rows = rows.map(lambda row: {"mask": [1] * len(row["input_ids"])})
    else:
        key = "ppo.ptx_max_length"
        rows, report = tokenize(mixture.train, "sft", tokenizer, cfg.chat, length, key)
    if rank() == 0:
        print(mixture.summary())
        print(f"ptx: {report.summary()}")
    return PtxLoader(rows, section.ptx_microbatch_size, pad_id, cfg.seed)


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts: `input_ids`, and for reward functions what `Sample.of` reads."""

    train: Dataset
    held_out: Dataset


def prompt_row(
    input_ids: Sequence[int], text: str, where: str = "made here", **columns: object
) -> dict[str, object]:
    """A row of `Prompts` for a prompt of one message that comes from no file."""
    messages = [{"role": "user", "content": text}]
    own = {"messages": messages, "where": where, "columns": json.dumps(columns)}
    return {"input_ids": list(input_ids), "text": text, **own}


def load_prompts(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """Training and held-out prompts, read, split and tokenised as the config says.

    Raises:
        ValueError: bad records, or nothing is left to train on.
    """
    new = cfg.generation.max_new_tokens
    limit = within_positions(tokenizer, cfg.ppo.max_prompt_length + new) - new
    if limit < cfg.ppo.max_prompt_length and rank() == 0:
        print(f"prompts of {limit} tokens at most: with {new} new ones the model reads no more")
    examples = load_examples(cfg.ppo, "prompts", limit, cfg, tokenizer)
    section, lengths = cfg.ppo, [len(ids) for ids in examples.train["input_ids"][:SAMPLED]]
    longest = sum(lengths) / len(lengths) + cfg.generation.max_new_tokens
    announce(
        cfg,
        "ppo",
        **examples.reports[0].lengths("ppo.max_prompt_length", new),
        examples=len(examples.train),
        steps=section.steps,
        tokens=longest * section.steps * section.rollout_batch_size,
    )
    return Prompts(examples.train, examples.held_out)
