"""Llama 3's folders by Meta's own files: tiktoken's ranks, scaled rotations, tied weights."""

import base64
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_meta_checkpoint import GROUPED, meta_weights, write_meta
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from chatllama import cli
from chatllama.config.model import BackboneSection, ChatSection
from chatllama.importing.meta_checkpoint import import_meta
from chatllama.importing.meta_params import read_params
from chatllama.importing.tiktoken_vocabulary import read_ranks
from chatllama.model.backbone import load_backbone
from chatllama.text.byte_level import SPLITS
from chatllama.text.chat_format import Message, end_of_turn_ids, render
from chatllama.text.encoding import encode
from chatllama.text.sentencepiece_bpe import TEXTS
from chatllama.text.tokenizer import load_tokenizer

# Ranks 256 and on. "abc" is a union in two ways, "xyz" of no two tokens: only a whole word is it.
WORDS = [b"ab", b"bc", b" t", b"he", b"abc", b"aa", b"aaa", b" the", b"\n\n", b"12", b"123",
         "é".encode(), "日".encode()[:2], "日".encode(), b"xyz", b"  "]  # fmt: skip
TOKENS = [bytes([byte]) for byte in range(256)] + WORDS
VOCABULARY = len(TOKENS) + 256
LATER = {**GROUPED, "vocab_size": VOCABULARY, "rope_theta": 500000.0, "use_scaled_rope": True}


def lines(tokens: list[bytes]) -> str:
    found = enumerate(tokens)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in found)


def write_llama3(folder: Path, params: dict[str, Any], tied: bool = False, shards: int = 1) -> Path:
    """As Meta publishes Llama 3: the embedding split by rows, no rope.freqs."""
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "tokenizer.model").write_text(lines(TOKENS))
    weights = meta_weights(params, VOCABULARY, torch.bfloat16)
    left = {"output.weight"} if tied else set[str]()
    kept = {n: w for n, w in weights.items() if n not in left and not n.endswith("rope.freqs")}
    return write_meta(folder / "meta", folder / "words", params, kept, shards, embedding_axis=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_metas_becomes_the_published_one(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_llama3(tmp_path, LATER, tied, shards=2), tmp_path / "out"
    assert cli.main(["import", str(source), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"factor {32 if tied else 8}" in said and "131072 tokens assumed" in said
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0 if tied else 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert (config["max_position_embeddings"], config["tie_word_embeddings"]) == (131072, tied)
    base = len(TOKENS)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [base + 1, base + 8, base + 9]
    llama = load_backbone(BackboneSection(path=str(out), dtype="float32"), str(out))
    speeds = read_params(source / "params.json").shape(tied).speeds
    torch.testing.assert_close(LlamaRotaryEmbedding(llama.config).inv_freq, speeds)
    one = import_meta(write_llama3(tmp_path / "1", LATER, tied), tmp_path / "one")
    for file in ("model.safetensors", "tokenizer.json"):
        assert (one / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.parametrize("scaled", [False, True])
def test_control_tokens_and_template(scaled: bool, tmp_path: Path) -> None:
    params = {**LATER, "use_scaled_rope": scaled}
    out = import_meta(write_llama3(tmp_path, params), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == (
        131072 if scaled else 8192
    )
    tokenizer, base = load_tokenizer(out), len(TOKENS)
    names = {index - base: t.content for index, t in tokenizer.added_tokens_decoder.items()}
    assert sorted(names) == list(range(256))
    assert [names[place] for place in (0, 1, 6, 7, 9)] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>",
    ]  # fmt: skip
    reserved = "<|reserved_special_token_{}|>"
    if scaled:  # Llama-3.1-8B's tokenizer_config.json has these at 128004, 128005, ...
        wanted = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
        wanted |= {2: reserved.format(0), 5: reserved.format(2), 11: reserved.format(3)}
        wanted[255] = reserved.format(247)
    else:
        wanted = {place: reserved.format(n) for place, n in ((2, 0), (5, 3), (8, 4), (255, 250))}
    assert {place: names[place] for place in wanted} == wanted
    assert tokenizer.pad_token == ("<|finetune_right_pad_id|>" if scaled else reserved.format(0))
    messages: list[Message] = [
        {"role": "user", "content": " abc "},
        {"role": "assistant", "content": "12"},
    ]
    own, ours = ChatSection(template="tokenizer"), ChatSection(template="llama3")
    ids = render(tokenizer, own, messages).ids
    newlines = 256 + WORDS.index(b"\n\n")
    role = [*b"user", base + 7, newlines, 256 + WORDS.index(b"abc"), base + 9]
    answer = [*b"assistant", base + 7, newlines, 256 + WORDS.index(b"12"), base + 9]
    assert ids == [base, base + 6, *role, base + 6, *answer]
    assert render(tokenizer, ours, messages).ids == ids
    assert end_of_turn_ids(tokenizer, own) == [base + 9, base + 1]
    plain: Any = AutoTokenizer.from_pretrained(out)
    assert plain.apply_chat_template(messages, return_dict=False) == ids
    assert plain("abc").input_ids == [base, 256 + WORDS.index(b"abc")]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    return import_meta(write_llama3(folder, LATER), folder / "out")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", [b"abc"]),
        ("abcd", [b"abc", b"d"]),
        ("bcab", [b"bc", b"ab"]),
        ("abbc", [b"ab", b"bc"]),
        ("the", [b"t", b"he"]),
        ("xyz", [b"xyz"]),
        ("xyza", [b"x", b"y", b"z", b"a"]),
        (" the aaab", [b" the", b" ", b"aa", b"ab"]),
        ("1234", [b"123", b"4"]),
        ("é日", ["é".encode(), "日".encode()]),
    ],
)
def test_ids_by_hand(text: str, pieces: list[bytes], imported: Path) -> None:
    assert encode(load_tokenizer(imported), text) == [TOKENS.index(piece) for piece in pieces]


@pytest.mark.skipif(find_spec("tiktoken") is None, reason="the package tiktoken is not installed")
def test_ids_are_tiktokens(imported: Path) -> None:
    import tiktoken  # pyright: ignore[reportMissingImports]

    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    (split,) = SPLITS["llama-bpe"]
    theirs = tiktoken.Encoding("ours", pat_str=split, mergeable_ranks=ranks, special_tokens={})
    ours, luck = load_tokenizer(imported), random.Random(3)
    parts = ["ab", "c", "a", "t", "he", " ", "\n", "1", "23", "é", "日", "'ll", "x", "🙂"]
    made = ["".join(luck.choices(parts, k=luck.randint(1, 20))) for _ in range(2000)]
    for text in (*TEXTS, *made):
        assert encode(ours, text) == theirs.encode_ordinary(text), text


DAMAGES = {
    "cut off": (lines(TOKENS)[:-4] + "?", f"tokenizer.model:{len(TOKENS)}: expected a token in"),
    "a line lost": (lines(TOKENS).replace("Yg== 98\n", ""), ":99: the token of rank 99 is out of"),
    "twice": (lines([*TOKENS, b"ab"]), f":{len(TOKENS) + 1}: .* has rank 256, too"),
    "few": (lines(TOKENS[:250]), "6 single bytes are no token, such as 250"),
    "too many": (lines([*TOKENS, b"zz"]), f"the tokenizer has {VOCABULARY + 1} tokens, the model"),
    "other": ("IQ== zero\n", "neither a SentencePiece model nor tiktoken's lines"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_leaves_nothing(damage: str, tmp_path: Path) -> None:
    source = write_llama3(tmp_path, LATER)
    content, message = DAMAGES[damage]
    (source / "tokenizer.model").write_text(content)
    with pytest.raises(ValueError, match=message):
        import_meta(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "words"]


def test_a_sentencepiece_model_holds_no_ranks(tiny_tokenizer_dir: Path) -> None:
    assert read_ranks(tiny_tokenizer_dir / "tokenizer.model") is None
