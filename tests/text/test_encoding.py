"""Raw text opens as the tokenizer's publisher has it: with BOS, without, or without having one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny_gguf import byte_level_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.serving.service import Service
from chatllama.text.encoding import adds_bos, encode, encode_text
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer
from data.checking.show import _sequences
from data.checking.tokens import _measure
from data.tokenize import _texts

OPENINGS: dict[str, list[int]] = {
    "BOS": [1],
    "BOS and EOS": [1],
    "a BOS that is not added": [],
    "no BOS": [],
    "SentencePiece": [1],
    "SentencePiece without": [],
}


@pytest.fixture(scope="module")
def tokenizers(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path
) -> dict[str, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizers")
    both = byte_level_tokenizer(folder / "both")
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    save_tokenizer(both, folder / "both")
    without = folder / "without"
    without.mkdir()
    shutil.copy(tiny_tokenizer_dir / "tokenizer.model", without)
    (without / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    return {
        "BOS": byte_level_tokenizer(folder / "bos", adds_bos=True),
        "BOS and EOS": load_tokenizer(folder / "both"),
        "a BOS that is not added": byte_level_tokenizer(folder / "not"),
        "no BOS": byte_level_tokenizer(folder / "none", bos=None),
        "SentencePiece": load_tokenizer(tiny_tokenizer_dir),
        "SentencePiece without": load_tokenizer(without),
    }


@pytest.mark.parametrize("name", OPENINGS)
def test_every_door_opens_a_text_as_the_publisher_does(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer, text = tokenizers[name], "Anna paints"
    ids = OPENINGS[name] + encode(tokenizer, text)
    assert encode_text(tokenizer, text) == ids and adds_bos(tokenizer) == bool(OPENINGS[name])
    trained = [*ids, 2]
    assert _texts({"text": [text]}, tokenizer, None)["input_ids"] == [trained]
    row = {"text": text, "where": "line 1"}
    assert _measure(row, tokenizer, ChatSection(), None)["length"] == len(trained)
    part: Any = SimpleNamespace(stage="sft", role="data", kind="text", max_length=None)
    (shown,) = _sequences(row, part, cast(Any, None), tokenizer)
    assert len(shown.tokens) == len(trained)
    served: Any = SimpleNamespace(
        run=SimpleNamespace(tokenizer=tokenizer), vocabulary=300, _check_length=lambda *_: None
    )
    assert Service._prompt_ids(served, [text]) == [ids]


@pytest.mark.parametrize("name", OPENINGS)
def test_data_check_finds_no_second_bos_in_chatml(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    chat = ChatSection(template="alpaca" if name.startswith("Sentence") else "chatml")
    turns = [{"role": "user", "content": "Anna?"}, {"role": "assistant", "content": "Yes."}]
    row = {"messages": turns, "untrained": [], "where": "line 1"}
    found = _measure(row, tokenizers[name], chat, None)
    assert found["problems"] == [] and 0 < found["trained"] < found["tokens"]


def test_padding_and_truncation_that_were_left_on_are_not_the_opening(
    tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.enable_padding(length=9, direction="left", pad_id=2)
    assert encode_text(tokenizer, "ab") == encode(tokenizer, "ab")
