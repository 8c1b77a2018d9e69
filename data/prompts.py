"""Prompts as token ids, ready for the assistant's first token."""

from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.chat_format import Message, render
from chatllama.config import ChatSection
from data.token_report import TokenReport, tokenize


def tokenize_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_prompt_length: int
) -> tuple[Dataset, TokenReport]:
    """Columns `input_ids` and `text` (the last user message), and what was left out.

    Args:
        dataset: records of kind `prompts`.
        tokenizer: from `load_tokenizer`.
        chat: the layout.
        max_prompt_length: tokens; a longer prompt is left out.

    Raises:
        ValueError: no prompt can be used.
    """
    return tokenize(
        dataset,
        _prompt,
        {"input_ids": List(Value("int32")), "text": Value("string")},
        {"tokenizer": tokenizer, "chat": chat, "max_prompt_length": max_prompt_length},
    )


def _prompt(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_prompt_length: int,
    code: str,
) -> dict[str, Any]:
    """One example; `code` only names the cache entry."""
    messages: list[Message] = record["messages"]
    ids = render(tokenizer, chat, messages, add_generation_prompt=True).ids
    left_out = f"over {max_prompt_length} tokens" if len(ids) > max_prompt_length else ""
    text = messages[-1]["content"]
    return {"input_ids": ids, "text": text, "changed": "", "left_out": left_out}
