"""Ids equal to sentencepiece's own, the BOS/EOS/pad policy, training and saving."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatllama.text.encoding import decode, encode, text_encoders
from chatllama.text.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    within_positions,
)

HARD_TEXTS = [
    "", " ", "  ", "a", " a", "   a   b    c  ", "a ", "\n", "\n\n  a\n", "\t\ta", "\r\n", "a\0b",
    "\0", "\ufffd", "\ufeffa", "▁", "▁ a▁", "</s>", "<s>a</s><unk>", "[INST] a [/INST]", "<0x0A>",
    "🙂", "👩\u200d👩\u200d👧 🏳️\u200d🌈", "e\u0301", "日本語", "한국어 문장",
    "\u00a0\u3000\u2028", "123456 3.14", " " * 100, "=" * 99, "ab" * 50, "\u0378", "\U0010ffff",
]  # fmt: skip


def assert_equal_to_sentencepiece(folder: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    wrong = [text for text in texts if encode(tokenizer, text) != reference.encode(text)]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first: {wrong[:3]!r}"
    for text in texts[:2000]:
        ids = reference.encode(text)
        if reference.unk_id() not in ids:  # which we drop, since it pads
            assert decode(tokenizer, ids) == reference.decode(ids)


@pytest.mark.parametrize("folder", ["llama_tokenizer", "stories260k/hf", "stories260k/meta"])
def test_equals_sentencepiece_on_hard_texts(testdata: Path, folder: str) -> None:
    assert_equal_to_sentencepiece(testdata / folder, HARD_TEXTS)


def test_known_llama_ids(testdata: Path) -> None:
    """The ids of Meta's tokenizer for its own test sentence, and what BOS adds."""
    tokenizer = load_tokenizer(testdata / "llama_tokenizer")
    assert encode(tokenizer, "Hello world") == [15043, 3186]
    assert encode(tokenizer, "  two") == [259, 1023]
    assert tokenizer("Hello world")["input_ids"] == [1, 15043, 3186]
    assert tokenizer("Hello world", add_special_tokens=False)["input_ids"] == [15043, 3186]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == 32_000


def test_special_strings_stay_text(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    for text in ("</s>", "<s>", "<unk>", "a </s><s> b"):
        ids = encode(tokenizer, text)
        assert not set(ids) & {0, 1, 2}
        assert decode(tokenizer, ids) == text
        assert not set(encode(tokenizer, text, continues=True)) & {0, 1, 2}


def test_continuing_text_equals_joint_encoding(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    for left, right in (("Anna\n", "walks"), ("a:", " market"), ("x\n\n", "  \n y"), ("a\n", "")):
        joint = encode(tokenizer, left) + encode(tokenizer, right, continues=True)
        assert joint == encode(tokenizer, left + right)
    space = tokenizer.convert_tokens_to_ids("▁")
    assert encode(tokenizer, "é") == [space, *encode(tokenizer, "é", continues=True)]


def test_decode_drops_special_tokens_and_joins_bytes(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    ids = encode(tokenizer, " 🙂 né , it 's")
    assert decode(tokenizer, [1, *ids, 2, 0]) == " 🙂 né , it 's"
    assert decode(tokenizer, encode(tokenizer, "🙂")[:-1]) == "\ufffd" * 3
    assert decode(tokenizer, []) == ""


def test_text_must_be_unicode(tiny_tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        encode(load_tokenizer(tiny_tokenizer_dir), "a\ud800")


def test_threads_and_padding_state_do_not_disturb(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    expected = encode(tokenizer, "Anna walks")
    tokenizer(["Anna walks", "a"], padding="max_length", max_length=99, truncation=True)
    wrong: list[list[int]] = []

    def work() -> None:
        wrong.extend(i for _ in range(200) if (i := encode(tokenizer, "Anna walks")) != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("with_model_config", [False, True])
def test_saved_files_reload_plainly(
    tiny_tokenizer_dir: Path, tmp_path: Path, with_model_config: bool
) -> None:
    original = load_tokenizer(tiny_tokenizer_dir)
    original(["a", "a b"], padding="max_length", max_length=50)
    save_tokenizer(original, tmp_path)
    if with_model_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is None
    model = (tmp_path / "tokenizer.model").read_bytes()
    assert model == (tiny_tokenizer_dir / "tokenizer.model").read_bytes()
    plain, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in ("Anna walks", "  the   market ", "\n a", "", "🙂"):
        ids = encode(original, text)
        assert encode(ours, text) == ids
        assert plain(text, add_special_tokens=False)["input_ids"] == ids
        assert plain(text)["input_ids"] == [1, *ids]
        assert ours(text)["input_ids"] == [1, *ids]
    assert plain.pad_token_id == ours.pad_token_id == 0
    save_tokenizer(ours, tmp_path)  # into the folder that it came from


def test_training_is_deterministic_and_has_llamas_settings(
    tiny_texts: list[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        train_tokenizer(iter(tiny_texts), 300, tmp_path / name)
    files = [(tmp_path / name / "tokenizer.model").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    tokenizer = load_tokenizer(tmp_path / "a")
    assert len(tokenizer) == 300
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<0x00>"]
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "a" / "tokenizer.model"))
    for text in HARD_TEXTS + tiny_texts:
        assert encode(tokenizer, text) == reference.encode(text)
    assert decode(tokenizer, encode(tokenizer, "  a \n\tb  ")) == "  a \n\tb  "


def test_training_sees_the_ends_of_long_lines(tmp_path: Path) -> None:
    """SentencePiece would drop a line of over 4192 bytes: Q stands only behind that."""
    tokenizer = train_tokenizer(["abc " * 2000 + "Q" * 50], 265, tmp_path)
    assert "Q" in tokenizer.get_vocab()


def test_training_names_the_limits_of_vocab_size(tiny_texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small.*need \d+"):
        train_tokenizer(tiny_texts, 100, tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size 90000 is too large.*at most (\d+)") as error:
        train_tokenizer(tiny_texts, 90_000, tmp_path)
    limit = int(str(error.value).rsplit(" ", 1)[1])
    assert len(train_tokenizer(tiny_texts, limit, tmp_path)) == limit
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["\n"], 300, tmp_path)


def byte_level_folder(folder: Path, special: list[str], **config: object) -> Path:
    """A tokenizer.json like LLaMA-3's: byte-level BPE and special tokens behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)} | {"Ġa": 256}
    pipeline = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens(special)
    folder.mkdir(exist_ok=True)
    pipeline.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]


def test_byte_level_tokenizer_pads_with_a_reserved_token(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, LLAMA3, bos_token=LLAMA3[0], eos_token=LLAMA3[1])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert len(tokenizer) == 257 + 4
    assert max(encode(tokenizer, "a<|eot_id|> a")) == 256
    assert encode(tokenizer, " a", continues=True) == encode(tokenizer, " a") == [256]


def test_pad_equal_to_eos_is_replaced_or_refused(tmp_path: Path) -> None:
    names = {"eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"}
    tokenizer = load_tokenizer(byte_level_folder(tmp_path / "a", LLAMA3, **names))
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(LLAMA3[3])
    with pytest.raises(ValueError, match="no token to pad with"):
        load_tokenizer(byte_level_folder(tmp_path / "b", LLAMA3[:3], **names))


def test_own_pad_is_kept_only_where_it_has_an_embedding(tmp_path: Path) -> None:
    names = {"eos_token": LLAMA3[1], "pad_token": "<pad>"}
    folder = byte_level_folder(tmp_path, [*LLAMA3, "<pad>"], **names)
    assert load_tokenizer(folder).pad_token == "<pad>"
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 261}')
    assert load_tokenizer(folder).pad_token == LLAMA3[3]


@pytest.mark.parametrize(
    ("rows", "first", "count"), [(260, 260, 1), (259, 259, 2), (257, 257, 4), (256, 256, 5)]
)
def test_ids_beyond_the_embedding_are_refused_with_both_numbers(
    tmp_path: Path, rows: int, first: int, count: int
) -> None:
    special = ["<|im_start|>", "<|im_end|>", "</s>", "<|more|>"]  # 257 to 260
    folder = byte_level_folder(tmp_path, special, eos_token="</s>", pad_token="<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    count -= rows <= 258  # the pad token, which is replaced, counts as none
    with pytest.raises(ValueError, match=rf"id {first}, but .* has {rows} rows .* {count} tokens"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 261}))
    assert load_tokenizer(folder).pad_token == "<|im_end|>"


@pytest.mark.parametrize(("positions", "limit"), [(None, 100), (512, 100), (7, 7)])
def test_no_limit_is_beyond_the_models_positions(
    tmp_path: Path, positions: int | None, limit: int
) -> None:
    folder = byte_level_folder(tmp_path, LLAMA3, eos_token=LLAMA3[1])
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    assert within_positions(load_tokenizer(folder), 100) == limit


def test_eos_is_required(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(byte_level_folder(tmp_path, LLAMA3))


def test_tokens_added_by_the_publisher_keep_their_ids(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_tokenizer_dir / "tokenizer.model", tmp_path)
    added = {"301": {"content": "<|im_end|>", "special": False}, "300": {"content": "<|im_start|>"}}
    config = {
        "added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": "[PAD]",
        "chat_template": [{"name": "default", "template": "x"}],
        "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [300, 301]
    assert (tokenizer.eos_token_id, tokenizer.pad_token, len(tokenizer)) == (301, "<unk>", 302)
    assert max(encode(tokenizer, "a <|im_start|> <|im_end|>")) < 300
    assert tokenizer.chat_template == {"default": "x"}
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.eos_token_id == 301
    config["added_tokens_decoder"] = {"305": {"content": "<|im_start|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"<\|im_start\|>' should have id 305"):
        load_tokenizer(tmp_path)


def test_tiktoken_model_beside_json_is_not_taken_for_sentencepiece(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, LLAMA3, eos_token=LLAMA3[1])
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert len(load_tokenizer(folder)) == 261


def sentencepiece_folder(folder: Path, **options: Any) -> Path:
    options = {"byte_fallback": True, "vocab_size": 290, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran far away"] * 5),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", hard_vocab_limit=False, **options,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "byte_fallback": False, "vocab_size": 32},
    ],
)
def test_sentencepiece_with_other_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    """NFKC and collapsed spaces, no dummy prefix, no byte fallback: equal as well."""
    folder = sentencepiece_folder(tmp_path, **options)
    assert_equal_to_sentencepiece(
        folder,
        [
            "the \uff43at  sat",
            " a  cat ",
            "a\u3000cat\n",
            "xyz XYZ",
            "1\uff5e2 ｶﾞ か\u3099",
            *HARD_TEXTS,
        ],
    )


def test_control_pieces_take_no_part_in_merges(tmp_path: Path) -> None:
    """`at` is a control piece here: letters in text must not become it."""
    folder = sentencepiece_folder(tmp_path, control_symbols="at", add_dummy_prefix=False)
    assert_equal_to_sentencepiece(folder, ["cat", "the cat sat", "at cats"])


def test_what_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model: this SentencePiece model cannot be"):
        load_tokenizer(sentencepiece_folder(tmp_path, treat_whitespace_as_suffix=True))


def test_metaspace_first_prefixes_only_the_start(tmp_path: Path) -> None:
    pipeline = Tokenizer(models.BPE(vocab={"</s>": 0, "<unk>": 1, "▁": 2, "a": 3}, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline, eos_token="</s>", unk_token="<unk>"
    )
    assert encode(tokenizer, "a") == [2, 3]
    assert encode(tokenizer, "a", continues=True) == [3]
    assert not text_encoders(tokenizer).prefixes_every_segment


def test_byte_level_prefix_space_is_only_for_the_start() -> None:
    pipeline = Tokenizer(models.BPE(vocab={"</s>": 0, "Ġ": 1, "a": 2}, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token="</s>")
    assert encode(tokenizer, "a") == [1, 2]
    assert encode(tokenizer, "a", continues=True) == [2]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a readable hub id"):
        load_tokenizer(tmp_path / "absent")
