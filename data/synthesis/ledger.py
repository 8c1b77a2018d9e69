"""The output file of `data generate`, and a ledger of what each step cost; both are append-only.

Beside F.jsonl lie F.jsonl.ledger, a line for each request, kept or not, and F.jsonl.settings.json.
After a kill, the next run continues behind the last whole line.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chatllama.runtime.jsonl import append_lines, resume


class OutputFile:
    """Records in `path`, begun or continued, and what they cost.

    Raises:
        ValueError: `path` was made with other settings, or is not a file of this kind.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.ledger = path, path.with_name(path.name + ".ledger")
        self.records, self.entries = resume(settings, self.path, self.ledger)

    def add(self, records: Iterable[Mapping[str, Any]], entry: Mapping[str, Any]) -> None:
        """Appends the records of one step, then its line of the ledger."""
        for path, lines, new in (
            (self.path, self.records, [dict(record) for record in records]),
            (self.ledger, self.entries, [dict(entry)]),
        ):
            append_lines(path, new)
            lines += new

    def done(self) -> set[int]:
        """Numbers (`id`) of the prompts that need no further request."""
        return {line["id"] for line in (*self.records, *self.entries) if "id" in line}

    def failed(self) -> set[int]:
        """Numbers of the prompts that have failed at least once."""
        return {entry["failed"] for entry in self.entries if "failed" in entry}

    def outcomes(self) -> Counter[str]:
        """How often each outcome came, over all runs."""
        counts: Counter[str] = Counter()
        for entry in self.entries:
            counts.update(entry["outcomes"])
        return counts

    def total(self, name: str) -> int:
        """Sum of a number of the ledger (`requests`, `prompt_tokens`, `completion_tokens`)."""
        return sum(entry[name] for entry in self.entries)
