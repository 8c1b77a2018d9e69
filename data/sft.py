"""Conversations and plain text as token ids; packing and batching are the trainer's."""

from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.chat_format import Message, render
from chatllama.config import ChatSection
from chatllama.tokenizer import encode
from data.readers import code_digest, num_workers
from data.token_report import TokenReport, tokenize


def tokenize_conversations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> tuple[Dataset, TokenReport]:
    """Columns `input_ids` and `mask` (1: the token is trained on), and what was cut or left out.

    A conversation over `max_length` loses whole exchanges from its end. One whose first exchange
    is already over is cut in the middle of the answer, so that it has no EOS: a cut never teaches
    to stop. What then has no token to train on is left out.

    Args:
        dataset: records of kind `sft`.
        tokenizer: from `load_tokenizer`.
        chat: the layout.
        max_length: tokens of an example.

    Raises:
        ValueError: no record can be used.
    """
    return tokenize(
        dataset,
        _conversation,
        {"input_ids": List(Value("int32")), "mask": List(Value("int8"))},
        {"tokenizer": tokenizer, "chat": chat, "max_length": max_length},
    )


def tokenize_text(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int | None = None
) -> tuple[Dataset, TokenReport]:
    """Column `input_ids`: BOS, the text, EOS, and how many more examples cutting gave.

    Args:
        dataset: records of kind `text`.
        tokenizer: from `load_tokenizer`.
        max_length: longer texts are cut into examples of at most this many tokens, and nothing is
            lost; only the first begins with BOS and only the last ends with EOS. None: no limit.
    """
    examples = dataset.map(
        _texts,
        batched=True,
        features=Features({"input_ids": List(Value("int32"))}),
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "code": code_digest()},
        num_proc=num_workers(len(dataset)),
    )
    extra = len(examples) - len(dataset)
    changed = {"more examples by cutting long texts": extra} if extra else {}
    return examples, TokenReport(len(dataset), len(dataset), changed, {})


def fit(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
) -> tuple[list[int], list[int], str]:
    """Ids and mask of a conversation within `max_length` tokens, and what was cut ("": nothing)."""
    rendered, changed = render(tokenizer, chat, messages), ""
    shortest = 3 if messages[0]["role"] == "system" else 2
    while len(rendered.ids) > max_length and len(messages) > shortest:
        messages = messages[:-2]
        rendered, changed = render(tokenizer, chat, messages), "lost whole exchanges at the end"
    ids, mask = rendered.ids, [int(trained) for trained in rendered.mask]
    if len(ids) > max_length:
        ids, mask, changed = ids[:max_length], mask[:max_length], "cut inside the answer"
    return ids, mask, changed


def nothing_within(max_length: int) -> str:
    """Why a conversation whose mask `fit` leaves empty is left out."""
    return f"no answer within {max_length} tokens"


def _conversation(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
    code: str,
) -> dict[str, Any]:
    """One example; `code` only names the cache entry."""
    ids, mask, changed = fit(record["messages"], tokenizer, chat, max_length)
    left_out = "" if any(mask) else nothing_within(max_length)
    return {"input_ids": ids, "mask": mask, "changed": changed, "left_out": left_out}


def _texts(
    records: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    code: str,
) -> dict[str, list[list[int]]]:
    """Examples of a batch of texts; `code` only names the cache entry."""
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces: list[list[int]] = []
    for text in records["text"]:
        ids = [*opening, *encode(tokenizer, text), tokenizer.eos_token_id]
        size = max_length or len(ids)
        pieces += [ids[i : i + size] for i in range(0, len(ids), size)]
    return {"input_ids": pieces}
