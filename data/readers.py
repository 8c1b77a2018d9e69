"""Sources: from a file or a hub data set to a table of records, with a report of what was left out.

Local files are decoded by `files.py`, line by line, rather than by `datasets.load_dataset`: that
loses line numbers, fills missing keys with null, and turns the text "NA" of a csv into nothing.
`datasets` keeps the result as an Arrow file in its cache (HF_DATASETS_CACHE), which all ranks
share: one of them reads, the others wait for its lock. The cache entry is named after the content
of the file and of this package's code, so that neither can go stale.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from chatllama.config import DataSource, Format
from data.files import PROJECT_ROOT, decode, find_file
from data.layouts import RecordError, Unusable
from data.records import (
    Conversation,
    Kind,
    Preference,
    Prompt,
    Record,
    Text,
    detect_format,
    parse_record,
    record_key,
)

MAX_LEFT_OUT = 0.5  # above this share, the format is probably not what the file holds
MESSAGES = datasets.List({"role": Value("string"), "content": Value("string")})
COMMON = {"key": Value("string"), "where": Value("string")}
COLUMNS: dict[Kind, Features] = {
    "sft": Features({"messages": MESSAGES, **COMMON}),
    "preferences": Features(
        {
            "prompt": MESSAGES,
            "answers": datasets.List(Value("string")),
            "ranks": datasets.List(Value("int32")),
            "ratings": datasets.List(Value("float32")),
            **COMMON,
        }
    ),
    "prompts": Features({"messages": MESSAGES, **COMMON}),
    "text": Features({"text": Value("large_string"), **COMMON}),
}


@dataclass(frozen=True)
class ReadReport:
    """What became of a source's records."""

    path: str
    format: Format
    num_read: int
    num_kept: int
    left_out: dict[str, int]
    """Number of records by reason, most frequent first."""
    examples: list[str]
    """`file:line: reason` of the first few left out."""

    def summary(self) -> str:
        """A line for the log, and a line for each example left out."""
        line = f"{self.path} ({self.format}): {self.num_kept} of {self.num_read} records"
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            line += f"; left out: {reasons}"
        return "\n  ".join([line, *self.examples])


def read_source(source: DataSource, kind: Kind) -> tuple[Dataset, ReadReport]:
    """Every usable record of a source, in the file's order, and the report.

    Columns are the record's fields (`messages`; or `prompt`, `answers`, `ranks`, `ratings`; or
    `text`), `key` (see `record_key`) and `where` (`file:line`).

    Raises:
        ValueError: there is no such file or data set; a malformed file or record; no record that
            can serve, or more that cannot than can.
    """
    file = find_file(source.path)
    arguments = {"path": source.path, "format": source.format, "kind": kind, "code": code_digest()}
    if file is None or file.is_dir():
        data = _load_hub(str(file or source.path), source.split)
        generator, arguments = _hub_rows, {**arguments, "data": data}
    else:
        content = _file_digest(file)
        generator, arguments = _file_rows, {**arguments, "file": str(file), "content": content}
    columns = {**COLUMNS[kind], "problem": Value("string"), "format": Value("string")}
    try:
        rows = Dataset.from_generator(generator, features=Features(columns), gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # ours, wrapped by `datasets`
            raise error.__cause__ from None
        raise
    return _keep_usable(rows, source, kind)


def code_digest() -> str:
    """Digest of the code that makes records and tokens: a part of the name of cached results."""
    digest = hashlib.blake2b(digest_size=8)
    chat = [PROJECT_ROOT / "chatllama" / name for name in ("chat_format.py", "tokenizer.py")]
    for file in [*sorted(Path(__file__).parent.glob("*.py")), *chat]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _file_rows(
    path: str, format: Format | None, kind: Kind, file: str, content: str, code: str
) -> Iterator[dict[str, object]]:
    """Rows of a local file. `content` and `code` only name the cache entry."""
    yield from _rows(decode(Path(file), path), path, format, kind)


def _hub_rows(
    path: str, format: Format | None, kind: Kind, data: Dataset, code: str
) -> Iterator[dict[str, object]]:
    """Rows of a data set that `datasets` loaded; its null is a missing key."""
    raws = (
        (f"{path}: record {number}", {key: raw[key] for key in raw if raw[key] is not None})
        for number, raw in enumerate(data, start=1)
    )
    yield from _rows(raws, path, format, kind)


def _load_hub(path: str, split: str) -> Dataset:
    """The split of a hub data set, or of a local folder of data files."""
    try:
        data = datasets.load_dataset(path, split=split)
    except Exception as error:
        raise ValueError(
            f"no file {path!r}, and no data set of that name with a split {split!r} could be "
            f"loaded: {error}"
        ) from error
    assert isinstance(data, Dataset)
    return data


def _rows(
    raws: Iterator[tuple[str, object]], path: str, format: Format | None, kind: Kind
) -> Iterator[dict[str, object]]:
    """A row for each decoded object, whether or not it can serve."""
    where = ""
    for where, raw in raws:
        if format is None:
            format = detect_format(raw, kind, where)
        try:
            record, problem = parse_record(raw, format, kind, where), ""
        except Unusable as error:
            record, problem = None, str(error)
        row = dict.fromkeys(COLUMNS[kind]) if record is None else _columns(record)
        yield {**row, "where": where, "problem": problem, "format": format}
    if not where:
        raise RecordError(f"{path}: no records")


def _columns(record: Record) -> dict[str, object]:
    match record:
        case Conversation(messages) | Prompt(messages):
            fields: dict[str, object] = {"messages": messages}
        case Preference():
            fields = dict(record.__dict__)
        case Text(text):
            fields = {"text": text}
    return {**fields, "key": record_key(record)}


def _keep_usable(rows: Dataset, source: DataSource, kind: Kind) -> tuple[Dataset, ReadReport]:
    """The rows without a problem, and the report."""
    problems: list[str] = rows["problem"][:]
    bad = [i for i, problem in enumerate(problems) if problem]
    reasons = dict(Counter(problem for problem in problems if problem).most_common())
    examples = [f"{rows[i]['where']}: {problems[i]}" for i in bad[:5]]
    report = ReadReport(
        source.path, rows[0]["format"], len(rows), len(rows) - len(bad), reasons, examples
    )
    if len(bad) > MAX_LEFT_OUT * len(rows):
        raise RecordError(
            f"more than {MAX_LEFT_OUT:.0%} of the records cannot serve as {kind}; is it the right "
            f"format?\n{report.summary()}"
        )
    kept = [i for i, problem in enumerate(problems) if not problem]
    return rows.select(kept).remove_columns(["problem", "format"]), report
