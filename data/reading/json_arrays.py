"""The records of a json array one after another, so that the file need not fit into memory.

A string cannot hold a line break, so text that ends with a whole line breaks off between two
tokens: it is incomplete if the error stands at its end, and wrong if it stands before.
"""

import json
from collections.abc import Iterator

from data.reading.formats import RecordError, unique_keys

_KEPT = 1 << 14  # characters that were read are dropped from this many on


class ArrayReader:
    """Values of a json array that begins on a line which has been read.

    Args:
        first: (number, text) of that line.
        lines: the lines after it, blank ones left out.
        name: of the file, for errors.
    """

    def __init__(self, first: tuple[int, str], lines: Iterator[tuple[int, str]], name: str) -> None:
        self._lines, self._name = lines, name
        self._text, self._at = first[1], 0
        self._starts = [(0, first[0])]
        """Where in the text each line begins, and its number."""
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_keys)

    def values(self) -> Iterator[object]:
        """Every value of the array.

        Raises:
            RecordError: broken JSON, with its line; what came before has been given.
        """
        self._at = self._text.index("[") + 1
        if self._next() == "]":
            self._at += 1
        else:
            while True:
                yield self._value()
                mark = self._next()
                if mark not in (",", "]"):
                    raise self._error("Expecting ',' delimiter", self._at)
                self._at += 1
                self._forget()
                if mark == "]":
                    break
                self._next()
        if self._next():
            raise self._error("Extra data", self._at)

    def _value(self) -> object:
        """The value that begins here."""
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if error.pos < len(self._text.rstrip()) or not self._read_to_closing():
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise self._error("nested too deeply", self._at) from None
            except ValueError as error:
                raise self._error(str(error), self._at) from None
            else:
                return value

    def _next(self) -> str:
        """The next character that is not white space, and goes there; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def _read_to_closing(self) -> bool:
        """Whether there was more; reads up to a line that may end a record."""
        size = len(self._text)
        pieces: list[str] = []
        for number, line in self._lines:
            self._starts.append((size + 1, number))
            size += 1 + len(line)
            pieces.append("\n" + line)
            if "}" in line or "]" in line:
                break
        self._text += "".join(pieces)
        return bool(pieces)

    def _read(self) -> bool:
        """Whether there was another line."""
        for number, line in self._lines:
            self._starts.append((len(self._text) + 1, number))
            self._text += "\n" + line
            return True
        return False

    def _forget(self) -> None:
        """Drops the text that has been read, once it is most of what is held."""
        if self._at > _KEPT and self._at > len(self._text) // 2:
            passed = [start for start in self._starts if start[0] <= self._at]
            later = [(begin - self._at, n) for begin, n in self._starts[len(passed) :]]
            self._starts = [(passed[-1][0] - self._at, passed[-1][1]), *later]
            self._text, self._at = self._text[self._at :], 0

    def _error(self, message: str, at: int) -> RecordError:
        """Broken JSON at a place of the text; at its end, on its last line."""
        at = min(at, max(0, len(self._text.rstrip()) - 1)) if at >= len(self._text) else at
        begin, number = [start for start in self._starts if start[0] <= at][-1]
        return RecordError(
            f"{self._name}:{number}: broken JSON ({message}, column {at - begin + 1})"
        )
