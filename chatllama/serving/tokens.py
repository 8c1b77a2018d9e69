"""Text and bytes of single tokens, as log-probabilities list them."""

from transformers import PreTrainedTokenizerFast

from chatllama.tokenizer import control_tokens

SENTENCEPIECE_SPACE = "\u2581"


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE (GPT-2, LLaMA-3) writes for each byte, to the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


class TokenTexts:
    """Bytes and text of every token of a vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = tokenizer.get_vocab()
        self._pieces = {index: piece for piece, index in vocabulary.items()}
        self._controls = frozenset(control_tokens(tokenizer).values())
        has_byte_pieces = "<0x00>" in vocabulary
        self._letters = None if has_byte_pieces else _byte_letters()
        self.longest = max(len(self.bytes_of(index)) for index in self._pieces)
        """Bytes of the longest token: a text has at least its length / this many tokens."""

    def bytes_of(self, index: int) -> bytes:
        """What the token stands for; part of a character where one takes several tokens."""
        piece = self._pieces.get(index, "")
        if index in self._controls:
            return piece.encode()
        if self._letters is not None:
            letters = self._letters
            if all(letter in letters for letter in piece):
                return bytes(letters[letter] for letter in piece)
            return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SENTENCEPIECE_SPACE, " ").encode()

    def text_of(self, index: int) -> str:
        """The same as text, with U+FFFD for parts of characters."""
        return self.bytes_of(index).decode(errors="replace")
