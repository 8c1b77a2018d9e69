"""Preference pairs as two token sequences with a common beginning."""

from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.chat_format import Message, render
from chatllama.config import ChatSection
from data.token_report import TokenReport, tokenize


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> tuple[Dataset, TokenReport]:
    """Columns `chosen_ids`, `rejected_ids`, `prompt_length`, `margin`, and what was left out.

    Both sequences are whole: prompt, answer and end of turn, the same `prompt_length` tokens
    first. A pair with a side over `max_length` is left out, since a reward model must see how an
    answer ends; so is a pair whose sides are the same tokens, which says nothing.

    Args:
        dataset: records of kind `preferences`.
        tokenizer: from `load_tokenizer`.
        chat: the layout.
        max_length: tokens of prompt and answer.

    Raises:
        ValueError: no pair can be used.
    """
    return tokenize(
        dataset,
        _pair,
        {
            "chosen_ids": List(Value("int32")),
            "rejected_ids": List(Value("int32")),
            "prompt_length": Value("int32"),
            "margin": Value("float32"),
        },
        {"tokenizer": tokenizer, "chat": chat, "max_length": max_length},
    )


def _pair(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
    code: str,
) -> dict[str, Any]:
    """One example; `code` only names the cache entry."""
    prompt: list[Message] = record["prompt"]
    begin = render(tokenizer, chat, prompt, add_generation_prompt=True).ids
    sides: list[list[int]] = []
    for key in ("chosen", "rejected"):
        ids = render(tokenizer, chat, [*prompt, {"role": "assistant", "content": record[key]}]).ids
        assert ids[: len(begin)] == begin, f"the answer changed its prompt's tokens: {prompt}"
        sides.append(ids)
    left_out = ""
    if max(map(len, sides)) > max_length:
        left_out = f"a side is over {max_length} tokens"
    elif sides[0] == sides[1]:
        left_out = "both sides are the same tokens"
    return {
        "chosen_ids": sides[0],
        "rejected_ids": sides[1],
        "prompt_length": len(begin),
        "margin": record["margin"],
        "changed": "",
        "left_out": left_out,
    }
