"""Meta's tokenizer.model of Llama 3 and later: tiktoken's lines of a token in base64 and its rank.

tiktoken joins the neighbours whose union has the lowest rank. So every way to cut a token into two
tokens is a merge of a byte-level BPE, in the order of the whole tokens' ranks.
"""

import base64
import binascii
import re
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from chatllama.text.byte_level import byte_letters, byte_level_pipeline
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

SPLIT = "llama-bpe"
NUM_CONTROLS = 256
# Ids behind the ranks, by the names of Meta's Hugging Face folders; the others are reserved.
_LLAMA3 = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>",
           7: "<|end_header_id|>", 9: "<|eot_id|>"}  # fmt: skip
_LLAMA31 = _LLAMA3 | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
_TURN_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3's layout (`ChatFormat` in llama/tokenizer.py of meta-llama/llama3): no default system
prompt, no date."""


def read_ranks(file: Path) -> list[bytes] | None:
    """The tokens in the order of their ranks; None where the file is in another format.

    Raises:
        ValueError: a line that is none, ranks that are not 0, 1, ... in order, a token that occurs
            twice, or a single byte that is no token.
    """
    lines = file.read_bytes().splitlines()
    if not lines or not re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", lines[0]):
        return None
    found: dict[bytes, int] = {}
    for number, line in enumerate(lines):
        place = f"{file}:{number + 1}"
        try:
            text, rank = line.split()
            token, index = base64.b64decode(text, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{place}: expected a token in base64 and its rank: {error}") from None
        if index != number or not token or token in found:
            reason = f"has rank {found[token]}, too" if token in found else "is out of order"
            raise ValueError(f"{place}: the token of rank {index} {reason}; is the file whole?")
        found[token] = index
    if missing := [byte for byte in range(256) if bytes([byte]) not in found]:
        raise ValueError(f"{file}: {len(missing)} single bytes are no token, such as {missing[0]}")
    return list(found)


def write_tokenizer(
    tokens: list[bytes], is_llama31: bool, folder: Path
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Writes the tokenizer and its chat template, and loads it; also the ids that end an answer.

    Args:
        is_llama31: names the control tokens as Llama 3.1 and later do.
    """
    letters = {byte: letter for letter, byte in byte_letters().items()}
    ranks = {token: index for index, token in enumerate(tokens)}
    texts = ["".join(map(letters.__getitem__, token)) for token in tokens]
    merges = [
        (texts[left], texts[right])
        for token in tokens
        for left, right in sorted(
            (ranks[token[:cut]], ranks[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        )
    ]
    names, controls = _LLAMA31 if is_llama31 else _LLAMA3, list[str]()
    for place in range(NUM_CONTROLS):
        reserved = place - sum(named < place for named in names)
        controls.append(names.get(place, f"<|reserved_special_token_{reserved}|>"))
    vocabulary = {text: index for index, text in enumerate([*texts, *controls])}
    added = dict.fromkeys(range(len(texts), len(vocabulary)), True)
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_pipeline(SPLIT, vocabulary, merges, added),
        bos_token=names[0], eos_token=names[1], add_bos_token=True, chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, folder)
    return tokenizer, [vocabulary[name] for name in _TURN_ENDS if name in vocabulary]
