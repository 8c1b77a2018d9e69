import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from chatllama.stop_strings import cut_at_stop
from chatllama.text_stream import AnswerText, stream_text
from chatllama.tokenizer import decode, encode, load_tokenizer

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


def test_bytes_that_make_no_character_come_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "a 🙂")[:-1]
    assert "".join(stream_text(tokenizer, ids)) == decode(tokenizer, ids)
    lead = tokenizer.convert_tokens_to_ids("<0xE2>")
    assert isinstance(lead, int)
    assert "".join(stream_text(tokenizer, [lead] * 200)) == "\ufffd" * 200


@pytest.mark.parametrize("stops", [["river"], ["er", "riv"], ["🙂"], ["x", "the"], ["nothing"]])
@pytest.mark.parametrize(
    "text", ["Anna walks the river, 🙂 the river", "ri ver rive river", "🙂🙂"]
)
def test_stop_strings_end_it_where_generate_ends_it(
    tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str]
) -> None:
    ids = encode(tokenizer, text)
    answer, told, used = AnswerText(tokenizer, stops), "", 0
    for index in ids:
        told += answer.push(index)
        used += 1
        if answer.stopped:
            break
        assert not any(stop in told for stop in stops)
    told += answer.finish()
    cut = cut_at_stop(ids, stops, lambda some: decode(tokenizer, some))
    assert (told, used, answer.stopped) == (
        (cut[1], cut[0], True) if cut else (text, len(ids), False)
    )


def test_random_tokens_come_out_as_decoded(tokenizer: PreTrainedTokenizerFast) -> None:
    words = random.Random(5)
    plain = list(range(259, 300))  # no bytes: these may make no character
    for _ in range(50):
        ids = words.choices(plain, k=20)
        assert "".join(stream_text(tokenizer, ids)) == decode(tokenizer, ids)
