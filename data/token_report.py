"""What became of records on their way to tokens, counted, so that no length limit acts unseen."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Value

from data.readers import code_digest, num_workers


@dataclass(frozen=True)
class TokenReport:
    """Counts of tokenised records."""

    num_read: int
    num_kept: int
    changed: dict[str, int]
    """Kept but changed, by what was done."""
    left_out: dict[str, int]
    """Left out, by reason."""

    def summary(self) -> str:
        """A line for the log."""
        counts = [f"{count} {what}" for what, count in self.changed.items()]
        counts += [f"{count} left out: {reason}" for reason, count in self.left_out.items()]
        return "; ".join([f"{self.num_kept} of {self.num_read} examples", *counts])

    @property
    def facts(self) -> dict[str, float]:
        """The counts for a stage's result."""
        return {
            "examples": self.num_kept,
            "examples_changed": sum(self.changed.values()),
            "examples_left_out": sum(self.left_out.values()),
        }


def tokenize(
    records: Dataset,
    function: Callable[..., dict[str, Any]],
    features: dict[str, Any],
    arguments: dict[str, Any],
) -> tuple[Dataset, TokenReport]:
    """The examples that `function` makes of records, and the report.

    The result is cached by `datasets` under the records, the arguments and this package's code.
    Every rank calls this; those that come later find the cache, those that come at the same time
    do the same work and reach the same result.

    Args:
        records: from `load_mixture`.
        function: from a record, `code` and `arguments` to the columns of `features`, `changed`
            (what was done to it, or "") and `left_out` (why it cannot be used, or "").
        features: columns of the result.
        arguments: of `function`.

    Raises:
        ValueError: there were records, and none could be used.
    """
    columns = Features({**features, "changed": Value("string"), "left_out": Value("string")})
    rows = records.map(
        _by_record,
        batched=True,
        features=columns,
        remove_columns=records.column_names,
        fn_kwargs={"function": function, "arguments": {**arguments, "code": code_digest()}},
        num_proc=num_workers(len(records)),
    )
    reasons: list[str] = rows["left_out"][:]
    kept = [i for i, reason in enumerate(reasons) if not reason]
    changes = Counter(rows.select(kept)["changed"][:])
    del changes[""]
    report = TokenReport(
        num_read=len(rows),
        num_kept=len(kept),
        changed=dict(changes.most_common()),
        left_out=dict(Counter(filter(None, reasons)).most_common()),
    )
    if reasons and not kept:
        raise ValueError(f"no record can be used ({report.summary()})")
    return rows.select(kept).remove_columns(["changed", "left_out"]), report


def _by_record(
    records: dict[str, list[Any]],
    function: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    """What `function` makes of each record of a batch: batches cost `datasets` far less."""
    made = [
        function(dict(zip(records, values, strict=True)), **arguments)
        for values in zip(*records.values(), strict=True)
    ]
    return {name: [row[name] for row in made] for name in made[0]}
