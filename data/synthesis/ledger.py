"""The files that grow: results and a ledger of what each step cost, both append-only.

Beside F.jsonl lie F.jsonl.ledger, a line for everything that was asked, kept or not, and
F.jsonl.settings.json. Stopped at any moment, the next run goes on behind the last whole line.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class Harvest:
    """Results in `out`, and what they cost.

    Args:
        out: file to write or to continue.
        settings: what decides the results, as JSON values.

    Raises:
        ValueError: `out` was made with other settings, or is no file of this kind.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.ledger = out, out.with_name(out.name + ".ledger")
        self._check_settings(out.with_name(out.name + ".settings.json"), settings)
        self.results = list(_whole_lines(out))
        self.entries = list(_whole_lines(self.ledger))

    def _check_settings(self, file: Path, settings: Mapping[str, Any]) -> None:
        if not file.is_file():
            if self.out.exists():
                raise ValueError(f"{self.out} is there, but was not made by this command")
            self.out.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [
            f"{name}: {before.get(name)!r} there, {settings.get(name)!r} now"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        if other:
            raise ValueError(
                f"{self.out} was begun with other settings ({'; '.join(other)}); "
                "go on with those, or choose another --out"
            )

    def add(self, results: Iterable[Mapping[str, Any]], entry: Mapping[str, Any]) -> None:
        """Appends what one step gave, then its line of the ledger."""
        kept = [dict(result) for result in results]
        _append(self.out, kept)
        _append(self.ledger, [dict(entry)])
        self.results += kept
        self.entries.append(dict(entry))

    def done(self) -> set[int]:
        """Numbers (`id`) of everything that has been decided."""
        return {line["id"] for line in (*self.results, *self.entries) if "id" in line}

    def outcomes(self) -> Counter[str]:
        """How often each outcome came, over all runs."""
        counts: Counter[str] = Counter()
        for entry in self.entries:
            counts.update(entry["outcomes"])
        return counts

    def total(self, name: str) -> int:
        """Sum of a number of the ledger (`requests`, `prompt_tokens`, `completion_tokens`)."""
        return sum(entry[name] for entry in self.entries)


def _append(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a last line that was not finished is cut off.

    Raises:
        ValueError: a line is no JSON.
    """
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: broken JSON ({error})") from None
