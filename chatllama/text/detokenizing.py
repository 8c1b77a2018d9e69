"""The text of an answer while its tokens come: whole characters only, and nothing of a stop string.

Decodes a window of the newest tokens, so a long answer costs no more a token than a short one.
"""

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from chatllama.text.byte_level import byte_letters
from chatllama.text.encoding import control_tokens, decode, encode

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_WINDOW = 64
"""Tokens after which an incomplete character is no longer waited for."""


class IncrementalDetokenizer:
    """Text of token ids as soon as it is certain: characters made of several tokens come whole.

    Bytes that are no UTF-8, on which tokenizers' own DecodeStream raises, become U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._controls = frozenset(control_tokens(tokenizer).values())
        # The decoder drops the first space of a window: after other text it must not be first.
        self._window = encode(tokenizer, "a") if continues else []
        self._emitted = len(self._window)  # tokens of it whose text has been returned
        self._emitted_text = "a" if continues else ""

    def push(self, index: int) -> str:
        """The text that this token makes certain, which may be none."""
        if index in self._controls:
            return ""
        self._window.append(index)
        text = decode(self._tokenizer, self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._emitted < LONGEST_WINDOW:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Bytes that never became a character."""
        return self._emit(decode(self._tokenizer, self._window))

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted_text) :]
        # The newest tokens stay: a decoder may need them beside the next.
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        self._emitted_text = decode(self._tokenizer, self._window)
        return new


class AnswerText:
    """The text of one answer up to its stop string, as it comes.

    The answer ends at the first token after which the text holds any of the strings (none of them
    empty), where the earliest begins: a string may be a token, a part of one, or span several.
    With `continues` the text follows other text, so SentencePiece's leading space is kept.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str], continues: bool = False
    ) -> None:
        self._stream = IncrementalDetokenizer(tokenizer, continues)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """A stop string was found: no more text follows."""

    def push(self, index: int) -> str:
        """New text that no stop string can begin in."""
        return self._add(self._stream.push(index))

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        text = self._add(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _add(self, new: str) -> str:
        text = self._held + new
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may become `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def stream_text(
    tokenizer: PreTrainedTokenizerFast,
    ids: Iterable[int],
    stops: Sequence[str] = (),
    continues: bool = False,
) -> Iterator[str]:
    """Deltas of the text of an answer's `ids` until a stop string; no further id is consumed.

    With `continues` the text follows other text, so its first space is kept.
    """
    answer = AnswerText(tokenizer, stops, continues)
    for index in ids:
        if delta := answer.push(index):
            yield delta
        if answer.stopped:
            return
    if delta := answer.finish():
        yield delta


SENTENCEPIECE_SPACE = "\u2581"


class TokenTexts:
    """Bytes and text of every token of a vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = tokenizer.get_vocab()
        self._pieces = {index: piece for piece, index in vocabulary.items()}
        self._controls = frozenset(control_tokens(tokenizer).values())
        has_byte_pieces = "<0x00>" in vocabulary
        self._letters = None if has_byte_pieces else byte_letters()
        self.longest = max(len(self.bytes_of(index)) for index in self._pieces)
        """Bytes of the longest token: a text has at least its length / this many tokens."""

    def bytes_of(self, index: int) -> bytes:
        """The token's bytes; part of a character where one takes several tokens."""
        piece = self._pieces.get(index, "")
        if index in self._controls:
            return piece.encode()
        if (letters := self._letters) is not None:
            known = all(letter in letters for letter in piece)
            return bytes(letters[letter] for letter in piece) if known else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SENTENCEPIECE_SPACE, " ").encode()

    def text_of(self, index: int) -> str:
        """The same as text, with U+FFFD for parts of characters."""
        return self.bytes_of(index).decode(errors="replace")

    def width(self, index: int) -> int:
        """Characters that the token adds to a text: those that begin in it; none by a control."""
        begun = [byte for byte in self.bytes_of(index) if byte & 0xC0 != 0x80]
        return 0 if index in self._controls else len(begun)
