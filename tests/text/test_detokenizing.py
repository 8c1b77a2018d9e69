import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chatllama.text import detokenizing
from chatllama.text.detokenizing import AnswerText, TokenTexts, stream_text
from chatllama.text.encoding import decode, encode
from chatllama.text.tokenizer import load_tokenizer

TEXTS = [
    "Anna paints the river.",
    " two  spaces ",
    "日本語 and naïve 🙂🙂 end",
    "\n\ttabs\n\n",
    "🙂" * 30,
    "a",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tiny_tokenizer_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_and_hold_whole_characters(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = encode(tokenizer, text)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == decode(tokenizer, ids) == text
    assert all(pieces) and "\ufffd" not in "".join(pieces)


def test_the_first_piece_does_not_wait_for_the_last(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = 0

    def ids() -> Iterator[int]:
        nonlocal asked
        for index in encode(tokenizer, "Anna paints the river"):
            asked += 1
            yield index

    next(stream_text(tokenizer, ids()))
    assert asked <= 2  # the first may be the blank alone


def test_control_tokens_leave_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [1, *encode(tokenizer, "the river"), 2]
    assert "".join(stream_text(tokenizer, ids)) == "the river"


@pytest.mark.parametrize("text", [" word", "  two", "word", " 🙂 and", "\n x"])
def test_text_that_follows_other_text_keeps_its_first_space(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = encode(tokenizer, text, continues=True)
    answer = AnswerText(tokenizer, [], continues=True)
    assert "".join(map(answer.push, ids)) + answer.finish() == text
    stopping = AnswerText(tokenizer, [text[:2]], continues=True)
    assert cut(stopping, ids)[1:] == ("", True)
    texts = TokenTexts(tokenizer)
    assert sum(map(texts.width, ids)) == len(text)
    assert isinstance(tokenizer.eos_token_id, int)
    assert texts.width(tokenizer.eos_token_id) == 0


def test_bytes_that_make_no_character_come_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "a 🙂")[:-1]
    assert "".join(stream_text(tokenizer, ids)) == decode(tokenizer, ids)
    lead = tokenizer.convert_tokens_to_ids("<0xE2>")
    assert isinstance(lead, int)
    assert "".join(stream_text(tokenizer, [lead] * 200)) == "\ufffd" * 200


# --- stop strings --------------------------------------------------------------------------------

PIECES = ["ab", "c", "\n", "\nUser", ":", "d", "abc"]


def cut(answer: AnswerText, ids: Sequence[int]) -> tuple[int, str, bool]:
    """Tokens taken, text told, and whether a stop string ended it."""
    told, used = "", 0
    for index in ids:
        told += answer.push(index)
        used += 1
        if answer.stopped:
            break
    return used, told + answer.finish(), answer.stopped


@pytest.mark.parametrize(
    ("ids", "stops", "expected"),
    [
        ([0, 1, 5], ["c"], (2, "ab", True)),  # a token
        ([0, 1, 5], ["b"], (1, "a", True)),  # a part of one
        ([0, 1, 3, 4, 5], ["\nUser:"], (4, "abc", True)),  # spread over several
        ([0, 1, 3, 4, 5], ["c\nU"], (3, "ab", True)),  # from inside one into inside another
        ([5, 6], ["c", "bc"], (2, "da", True)),  # of two in one token, the earlier
        ([5, 6], ["bc", "c"], (2, "da", True)),
        ([0, 1, 6], ["cab", "bc"], (2, "a", True)),  # complete first
        ([0, 1, 5], ["x"], (3, "abcd", False)),
        ([0, 1, 5], ["cdx"], (3, "abcd", False)),  # begun and not complete
        ([0, 1, 5], [], (3, "abcd", False)),
        ([], ["x"], (0, "", False)),
        ([6], ["abc"], (1, "", True)),
    ],
)
def test_stop_strings_across_tokens(
    monkeypatch: pytest.MonkeyPatch, ids: Any, stops: Any, expected: Any
) -> None:
    monkeypatch.setattr(detokenizing, "decode", lambda _, ids: "".join(PIECES[i] for i in ids))
    monkeypatch.setattr(detokenizing, "control_tokens", lambda _: {})
    tokenizer: Any = None
    assert cut(AnswerText(tokenizer, stops), ids) == expected


def test_stop_string_that_later_bytes_would_hide(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    # é = C3 A9, then half a character: the decoder would replace the whole run of bytes.
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in (0xC3, 0xA9, 0xC3)]
    assert "é" not in decode(tokenizer, ids)
    assert cut(AnswerText(tokenizer, ["é"]), ids) == (2, "", True)


@pytest.mark.parametrize("stops", [["river"], ["er", "riv"], ["🙂"], ["x", "the"], ["nothing"]])
@pytest.mark.parametrize(
    "text", ["Anna walks the river, 🙂 the river", "ri ver rive river", "🙂🙂"]
)
def test_stop_strings_end_it_where_the_text_so_far_holds_one(
    tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str]
) -> None:
    ids = encode(tokenizer, text)
    expected = (len(ids), text, False)
    for count in range(len(ids), 0, -1):
        found = [
            place for stop in stops if (place := decode(tokenizer, ids[:count]).find(stop)) >= 0
        ]
        if found:
            expected = (count, text[: min(found)], True)
    assert cut(AnswerText(tokenizer, stops), ids) == expected
    answer, told = AnswerText(tokenizer, stops), ""
    for index in ids[: expected[0]]:
        told += answer.push(index)
        assert not any(stop in told for stop in stops)


def test_random_tokens_come_out_as_decoded(tokenizer: PreTrainedTokenizerFast) -> None:
    words = random.Random(5)
    plain = list(range(259, 300))  # no bytes: these may make no character
    for _ in range(50):
        ids = words.choices(plain, k=20)
        assert "".join(stream_text(tokenizer, ids)) == decode(tokenizer, ids)
