"""Tokenizer files of strangers: one ValueError that names the file, in time, whatever they hold."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from chatllama.text.encoding import decode, encode
from chatllama.text.tokenizer import load_tokenizer

Change = Callable[[Path], object]
sp_model: Any = sentencepiece_model_pb2
NO_OBJECT = ("[]", "null", "", "{", "5", '"x"', "[" * 100_000, '{"a":' * 50_000, "\xff\xfe{")


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content, "latin-1")


def key(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return change


def model(**values: Any) -> Change:
    """Changes keys of tokenizer.json's `model`; the exact conversion beside it is not used."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"] |= values
        path.write_text(json.dumps(content))

    return change


def pieces(change: Callable[[Any], object]) -> Change:
    """Leaves tokenizer.model alone in the folder, changed."""

    def changed(folder: Path) -> None:
        proto = sp_model.ModelProto()
        proto.ParseFromString((folder / "tokenizer.model").read_bytes())
        change(proto)
        for file in folder.iterdir():
            file.unlink()
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())

    return changed


def no_model(content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(content)

    return change


REGEX = {"type": "Split", "behavior": "Isolated", "invert": False}
CHANGES: dict[str, Change] = {
    **{f"{name} {n}": text(name, content) for n, content in enumerate(NO_OBJECT) for name in
       ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "config.json")},
    "tokenizer.json empty": text("tokenizer.json", "{}"),
    "no model": key("tokenizer.json", model=None), "a list": key("tokenizer.json", model=[]),
    "merges 1": model(merges=[["nothing", "there"]]), "merges 2": model(merges=[["a"]]),
    "merges 3": model(merges=["a b c"]), "merges 4": model(merges=5), "vocab 1": model(vocab=[]),
    "vocab 2": model(vocab={"a": -1}), "vocab 3": model(vocab={"a": 2**40}),
    "vocab 4": model(vocab={}), "type": model(type="Nothing"), "unk": model(unk_token=5),
    "regex 1": key("tokenizer.json", pre_tokenizer={**REGEX, "pattern": {"Regex": "(((("}}),
    "regex 2": key("tokenizer.json", pre_tokenizer={**REGEX, "pattern": {"Regex": 5}}),
    "regex 3": key("tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": "[z-a]"},
                                                  "content": ""}),
    "map": key("tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AA"}),
    "added 1": key("tokenizer.json", added_tokens=[5]),
    "added 2": key("tokenizer.json", added_tokens={}),
    "added 3": key("tokenizer.json", added_tokens=[{"id": -1, "content": "x", "special": True}]),
    "added 4": key("tokenizer_config.json", added_tokens_decoder={"x": {"content": "a"}}),
    "added 5": key("tokenizer_config.json", added_tokens_decoder={"-1": {"content": "a"}}),
    "added 6": key("tokenizer_config.json", added_tokens_decoder=[]),
    "added 7": key("tokenizer_config.json", added_tokens_decoder={"0": {"content": 5}}),
    "added 8": key("added_tokens.json", a="x"), "added 9": key("added_tokens.json", a=-4),
    **{f"{name} {n}": key(name, **{token: value}) for name in
       ("tokenizer_config.json", "special_tokens_map.json") for token in ("eos_token", "pad_token")
       for n, value in ((f"{token} 1", 5), (f"{token} 2", ["a"]), (f"{token} 3", {"content": 5}))},
    "template 1": key("tokenizer_config.json", chat_template=5),
    "template 2": key("tokenizer_config.json", chat_template=[5]),
    "template 3": key("tokenizer_config.json", chat_template=[{"name": "a"}]),
    "template 4": text("chat_template.jinja", "\xff\xfe"),
    "template 5": text("chat_template.jinja", "x" * 2_000_000),
    "sizes 1": key("config.json", vocab_size="512"), "sizes 2": key("config.json", vocab_size=-1),
    "sizes 3": key("config.json", max_position_embeddings=float("nan")),
    "length": key("tokenizer_config.json", model_max_length="long"),
    "class": key("tokenizer_config.json", tokenizer_class=5, auto_map={"AutoTokenizer": 5}),
    "no protobuf 1": no_model(b""), "no protobuf 2": no_model(b"\0" * 100),
    "no protobuf 3": no_model(b"\xff" * 100), "no protobuf 4": no_model(b"\x0a\xff\xff\xff\x7f"),
    "protobuf 1": pieces(lambda proto: setattr(proto.trainer_spec, "eos_id", 99_999)),
    "protobuf 2": pieces(lambda proto: setattr(proto.pieces[5], "piece", "")),
    "protobuf 3": pieces(lambda proto: setattr(proto.pieces[290], "piece", "ab" * 100_000)),
    "protobuf 4": pieces(lambda p: setattr(p.normalizer_spec, "precompiled_charsmap", b"abc")),
    "protobuf 5": pieces(lambda proto: setattr(proto.pieces[290], "score", float("nan"))),
    "protobuf 6": pieces(lambda proto: proto.pieces.extend([proto.pieces[5]] * 3)),
}  # fmt: skip
LOADABLE = ("class", "protobuf 5")
"""Changes with which a tokenizer is still one."""


@pytest.mark.parametrize("name", CHANGES)
def test_strange_files_are_refused_by_name(
    tiny_tokenizer_dir: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "strange")
    CHANGES[name](folder)
    begun = time.process_time()
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error)) < 1000, error
    else:
        assert decode(tokenizer, encode(tokenizer, "a b")) == "a b"
        assert name in LOADABLE
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("where", ["pre_tokenizer", "normalizer", "decoder"])
def test_a_regex_that_panics_is_an_error_of_its_text(
    tiny_tokenizer_dir: Path, tmp_path: Path, where: str
) -> None:
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "strange")
    pattern = {"pattern": {"Regex": "(?:(?:a|aa)+)+$"}}
    replace = {"type": "Replace", "content": "", **pattern}
    fused = {"type": "Sequence", "decoders": [{"type": "Fuse"}, replace]}
    step = {"pre_tokenizer": {**REGEX, **pattern}, "normalizer": replace, "decoder": fused}[where]
    key("tokenizer.json", **{where: step})(folder)
    tokenizer = load_tokenizer(folder)
    assert decode(tokenizer, encode(tokenizer, "b"))
    with pytest.raises(ValueError, match="the tokenizer fails: "):
        decode(tokenizer, encode(tokenizer, "a" * 60 + "b"))
