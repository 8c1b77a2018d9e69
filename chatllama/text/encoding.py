"""Text to token ids and back through private `tokenizers` pipelines: no special token from text.

transformers' own pipeline is not used for text: it turns `</s>` written by a user into the EOS id,
and carries padding state between calls. Loading and saving tokenizers is in `tokenizer.py`.
"""

import json
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from chatllama.text.tokenizer_files import pipeline_errors

# Published tokenizers sometimes forget to flag these as special.
TURN_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)


@dataclass(frozen=True)
class TextEncoders:
    """Private copies of a tokenizer's pipeline, safe under threads."""

    start: Tokenizer
    continuing: Tokenizer
    controls: dict[str, int]
    control_ids: frozenset[int]
    opening: tuple[int, ...]
    """Put before a text by the tokenizer's own post-processor: its BOS, or nothing."""
    prefixes_every_segment: bool
    """Text after a control token gets the dummy prefix, as text at the start does."""


_Cache = weakref.WeakKeyDictionary[PreTrainedTokenizerFast, TextEncoders]
_cache: _Cache = weakref.WeakKeyDictionary()
_cache_lock = threading.Lock()


def text_encoders(tokenizer: PreTrainedTokenizerFast) -> TextEncoders:
    """The tokenizer's private pipelines, built at its first use."""
    with _cache_lock:
        if tokenizer not in _cache:
            _cache[tokenizer] = _build_encoders(tokenizer)
        return _cache[tokenizer]


def _build_encoders(tokenizer: PreTrainedTokenizerFast) -> TextEncoders:
    controls = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in TURN_MARKERS
    }
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline |= {"padding": None, "truncation": None, "post_processor": None}
    for token in pipeline["added_tokens"]:
        token["special"] = token["content"] in controls
    steps = {key: _without_prefix(pipeline[key]) for key in ("normalizer", "pre_tokenizer")}
    parts = (pipeline, pipeline | steps)
    start, continuing = (Tokenizer.from_str(json.dumps(part)) for part in parts)
    start.encode_special_tokens = continuing.encode_special_tokens = True
    first_only = '"prepend_scheme": "first"' in json.dumps(pipeline["pre_tokenizer"])
    ids = frozenset(controls.values())
    opening = _opening(tokenizer, start)
    return TextEncoders(
        start, continuing, controls, ids, opening, prefixes_every_segment=not first_only
    )


def _opening(tokenizer: PreTrainedTokenizerFast, pipeline: Tokenizer) -> tuple[int, ...]:
    if (post_processor := tokenizer.backend_tokenizer.post_processor) is None:
        return ()
    text = post_processor.process(pipeline.encode("a", add_special_tokens=False))
    marked = zip(text.ids, text.special_tokens_mask, strict=True)
    return tuple(index for index, _ in takewhile(lambda token: token[1], marked))


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """The normalizer or pre-tokenizer without whatever treats the start of a text specially."""
    if step is None:
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [_without_prefix(inner) for inner in step[key]]
        return step | {key: [inner for inner in kept if inner is not None]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return step | {"add_prefix_space": False}
    starts = step["type"] == "Prepend" or step.get("pattern") == {"Regex": r"\A +"}
    return None if starts else step


def encode(tokenizer: PreTrainedTokenizerFast, text: str, *, continues: bool = False) -> list[int]:
    """Ids of plain text: no BOS or EOS, and `</s>` written in it stays text.

    With `continues` the text follows other text, so no space is put before it: equal to encoding
    both together where the boundary is not inside a token.

    Raises:
        ValueError: the text holds half a surrogate pair, or the pipeline fails on it.
    """
    encoders = text_encoders(tokenizer)
    pipeline = encoders.continuing if continues else encoders.start
    try:
        with pipeline_errors():
            return pipeline.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError) as error:
        raise ValueError(f"not valid Unicode text: {text[:80]!r}") from error


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a raw text that stands alone, as the model's publisher has it: with BOS or without."""
    return [*text_encoders(tokenizer).opening, *encode(tokenizer, text)]


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself puts its BOS before a text."""
    return tokenizer.bos_token_id in text_encoders(tokenizer).opening


def decode(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    """Text of ids, without special tokens and without SentencePiece's leading space."""
    special = text_encoders(tokenizer).control_ids
    kept = [index for index in ids if index not in special]
    with pipeline_errors():
        return tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False)


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Tokens that structure conversations and that text never becomes: content to id."""
    return text_encoders(tokenizer).controls
