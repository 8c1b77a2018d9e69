"""Ranked answers to one prompt as token sequences with a common beginning; a pair has two."""

from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.chat_format import Message, render
from chatllama.config import ChatSection
from data.token_report import TokenReport, tokenize


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> tuple[Dataset, TokenReport]:
    """Columns `answer_ids`, `ranks`, `ratings`, `prompt_length`, `where`, and what was left out.

    Every sequence is whole: prompt, answer and end of turn, the same `prompt_length` tokens first,
    the best answer first. An answer over `max_length` is left out, since a reward model must see
    how an answer ends; so is one that has the tokens of a better one. Where no two answers of
    different rank remain, the whole example is left out.

    Args:
        dataset: records of kind `preferences`.
        tokenizer: from `load_tokenizer`.
        chat: the layout.
        max_length: tokens of prompt and answer.

    Raises:
        ValueError: no example can be used.
    """
    return tokenize(
        dataset,
        _example,
        {
            "answer_ids": List(List(Value("int32"))),
            "ranks": List(Value("int32")),
            "ratings": List(Value("float32")),
            "prompt_length": Value("int32"),
            "where": Value("string"),
        },
        {"tokenizer": tokenizer, "chat": chat, "max_length": max_length},
    )


def _example(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
    code: str,
) -> dict[str, Any]:
    """One example; `code` only names the cache entry."""
    prompt: list[Message] = record["prompt"]
    begin = render(tokenizer, chat, prompt, add_generation_prompt=True).ids
    kept: list[tuple[list[int], int, float]] = []
    too_long, repeated = False, False
    for answer, rank, rating in zip(
        record["answers"], record["ranks"], record["ratings"], strict=True
    ):
        ids = render(tokenizer, chat, [*prompt, {"role": "assistant", "content": answer}]).ids
        assert ids[: len(begin)] == begin, f"the answer changed its prompt's tokens: {prompt}"
        too_long = too_long or len(ids) > max_length
        again = any(ids == other for other, _, _ in kept)
        repeated = repeated or again
        if len(ids) <= max_length and not again:
            kept.append((ids, rank, rating))
    usable = len({rank for _, rank, _ in kept}) > 1
    problem = f"an answer is over {max_length} tokens" if too_long else ""
    if not problem and repeated:
        problem = "answers are the same tokens"
    return {
        "answer_ids": [ids for ids, _, _ in kept],
        "ranks": [rank for _, rank, _ in kept],
        "ratings": [rating for _, _, rating in kept],
        "prompt_length": len(begin),
        "where": record["where"],
        "changed": f"shortened: {problem}" if usable and problem else "",
        "left_out": "" if usable else problem,
    }
