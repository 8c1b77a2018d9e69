"""The records of a json array one after another, so that the file need not fit into memory.

A string cannot contain a line break, so text that ends with a whole line breaks off between two
tokens: it is incomplete if the error is at its end, and wrong if the error is before.
"""

import json
from collections.abc import Iterator

from data.reading.formats import RecordError, unique_keys

Line = tuple[str, "str | RecordError"]
"""`file:line`, and the text of the line or why it cannot be decoded."""

_KEPT = 1 << 14  # from this many characters on, what was read is dropped


class ArrayReader:
    """Values of the json array that begins on the first of `lines`, blank lines left out."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._text, self._at = "", 0
        self._starts: list[tuple[int, str]] = []
        """Where in the text each line begins, and its place."""
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_keys)

    def values(self) -> Iterator[object]:
        """Every value of the array.

        Raises:
            RecordError: broken JSON or an undecodable line; all values before have been yielded.
        """
        self._read()
        self._at = self._text.index("[") + 1
        mark = self._next()
        if mark == "]":
            self._at += 1
        while mark != "]":
            self._next()
            yield self._value()
            mark = self._next()
            if mark not in (",", "]"):
                raise self._error("Expecting ',' delimiter", self._at)
            self._at += 1
            self._forget()
        if self._next():
            raise self._error("Extra data", self._at)

    def _value(self) -> object:
        """The value that begins here."""
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                at_end = error.pos >= len(self._text.rstrip())
                if not at_end or not self._read(to_closing=True):
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise self._error("nested too deeply", self._at) from None
            except ValueError as error:
                raise self._error(str(error), self._at) from None

    def _next(self) -> str:
        """Moves to the next character that is not white space and returns it; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def _read(self, to_closing: bool = False) -> bool:
        """Adds the next line, or all up to one that may end a record; False if there is none."""
        size, pieces = len(self._text), list[str]()
        for where, line in self._lines:
            if isinstance(line, RecordError):
                raise line
            self._starts.append((size + 1, where))
            size += 1 + len(line)
            pieces.append("\n" + line)
            if not to_closing or "}" in line or "]" in line:
                break
        self._text += "".join(pieces)
        return bool(pieces)

    def _forget(self) -> None:
        """Drops the text that has been read, once it is most of what is in memory."""
        if self._at > _KEPT and self._at > len(self._text) // 2:
            passed = [start for start in self._starts if start[0] <= self._at]
            later = self._starts[len(passed) :]
            self._starts = [(start - self._at, where) for start, where in (passed[-1], *later)]
            self._text, self._at = self._text[self._at :], 0

    def _error(self, message: str, at: int) -> RecordError:
        """Broken JSON at an offset of the text; past its end, on its last line."""
        at = min(at, max(0, len(self._text.rstrip()) - 1)) if at >= len(self._text) else at
        start, where = [start for start in self._starts if start[0] <= at][-1]
        return RecordError(f"{where}: broken JSON ({message}, column {at - start + 1})")
