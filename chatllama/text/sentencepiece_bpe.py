"""A SentencePiece BPE model as a `tokenizers` pipeline that gives the same ids.

Only the conversion is here; special tokens, padding and files are in `tokenizer.py`.
transformers' own conversion gives other ids than sentencepiece for leading and repeated spaces,
and a wrong id is silent.
"""

from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from chatllama.runtime.json_files import refuse_pointer

SPACE = "▁"
LONGEST_PIECE = 1000
"""Characters; sentencepiece trains pieces of 16 unless told otherwise."""
sp_model: Any = sentencepiece_model_pb2  # its classes are made at import: no static types
_Piece = sp_model.ModelProto.SentencePiece

# Texts on which a conversion has gone wrong somewhere, compared at every load.
TEXTS = (
    "", " ", "   ", "a", " a", "  a  b   c ", "a ", "\n", "\n\n a\n", "\t\tx\t", "a\n  b\n    c",
    "Hello, world! 12345 3.14", "</s>", "<s> <unk>", "[INST] hi [/INST]", "a\0b", "\ufffd", "▁a▁ ▁",
    "日本語 と 한국어", "naïve café ﬁ Å e\u0301", "🙂👩\u200d👩\u200d👧", "<0x0A>",
    "\u00a0x\u3000y", "\r\n", "aaaaaaaaaaaaaaaaaaaa", "ababababab", "=================", "-" * 37,
    " " * 37 + "x", "..." * 9, "def f(x):\n        return x  # ok\n", "http://a.b/c?d=e&f=%20",
    "ⅣⅧ①½", "1\uff5e2 \uff01ﾊﾟ", "か\u3099 ｶﾞ \u1112\u1161\u11ab", "\ue000", "\U0010fffd",
)  # fmt: skip


def read_model(path: Path) -> Any | None:
    """The parsed SentencePiece model, or None where the file is in another format (tiktoken)."""
    refuse_pointer(path)
    model = sp_model.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model if model.pieces and model.HasField("trainer_spec") else None


def is_bpe(model: Any) -> bool:
    """Whether the model segments by BPE merges (LLaMA's kind), not by unigram probabilities."""
    return model.trainer_spec.model_type == sp_model.TrainerSpec.BPE


def build_bpe(path: Path, model: Any) -> Tokenizer:
    """The pipeline equal to `sentencepiece` on every text, without BOS and EOS.

    Departure: pieces of type USER_DEFINED are special tokens here, so that text cannot become them.

    Raises:
        ValueError: one of `TEXTS` gets other ids than from sentencepiece: nothing is approximated.
    """
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    if (longest := max(map(len, vocab))) > LONGEST_PIECE:
        raise ValueError(f"{path}: a piece of {longest} characters; {LONGEST_PIECE} is the most")
    unk = next((p.piece for p in model.pieces if p.type == _Piece.UNKNOWN), None)
    merges, fallback = _ranked_merges(model), model.trainer_spec.byte_fallback
    pipeline = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback)
    )
    pipeline.normalizer = _normalizer(model)
    pipeline.decoder = _decoder(model)
    text_types = (_Piece.NORMAL, _Piece.BYTE, _Piece.UNUSED)
    pipeline.add_special_tokens(
        [AddedToken(p.piece, normalized=False) for p in model.pieces if p.type not in text_types]
    )
    _compare(pipeline, path)
    return pipeline


def _ranked_merges(model: Any) -> list[tuple[str, str]]:
    """Every pair whose concatenation is a piece; the piece with the higher score merges first.

    Control, byte and unknown pieces take no part: written in text they stay text.
    """
    score = {p.piece: p.score for p in model.pieces if p.type == _Piece.NORMAL}
    pieces = sorted((p for p in score if len(p) > 1), key=lambda piece: -score[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]


def _normalizer(model: Any) -> normalizers.Normalizer:
    """SentencePiece's normalisation: character map, extra spaces, dummy prefix, escaped spaces."""
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        # `tokenizers` maps grapheme by grapheme, sentencepiece the longest match: composing before
        # and after, and parting \r\n, makes the two agree.
        steps += [normalizers.NFC(), normalizers.Precompiled(spec.precompiled_charsmap)]
        if spec.name.startswith("nmt"):
            steps.insert(1, normalizers.Replace("\r\n", "\n\n"))
        steps.append(normalizers.NFC())
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(model: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spec = model.normalizer_spec
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        spaces = 2**20 if spec.remove_extra_whitespaces else 1  # 2**20: all leading ones
        steps.append(decoders.Strip(" ", spaces, 0))
    return decoders.Sequence(steps)


def _compare(pipeline: Tokenizer, path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pipeline.encode_special_tokens = True
    for text in TEXTS:
        ids, expected = pipeline.encode(text, add_special_tokens=False).ids, reference.encode(text)
        if ids != expected:
            raise ValueError(
                f"{path}: this SentencePiece model cannot be converted exactly: {text!r} gives "
                f"{ids}, sentencepiece gives {expected}. Give a folder with tokenizer.json alone"
            )
    pipeline.encode_special_tokens = False
