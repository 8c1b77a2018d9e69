"""Sources: from a file or a hub data set to a table of records, with a report of what was left out.

Local files are decoded by `decode.py`, line by line, rather than by `datasets.load_dataset`: that
loses line numbers, fills missing keys with null, and turns the text "NA" of a csv into nothing.
`datasets` keeps the result as an Arrow file in its cache (HF_DATASETS_CACHE), which all ranks
share: one of them reads, the others wait for its lock. The name of the cache entry has digests of
the files and of this package's code, so that neither can be stale.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import datasets
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from chatllama.config.sources import ColumnMapping, DataSource, Format, language_codes
from data.caching import code_digest, writing_cache
from data.reading import notes, verdicts
from data.reading.conversions import apply_mapping
from data.reading.decode import Cells, decode
from data.reading.files import DataFile, find_aligned, find_files
from data.reading.formats import Malformed, RecordError
from data.reading.grouped import PASSED_OVER, Found, LabelledAnswers, MessageTrees, is_tree_message
from data.reading.marks import KEEP
from data.reading.records import Kind, Labelled, detect_format, named, parse_records, record_key

MAX_LEFT_OUT = 0.5  # above this share, the format is probably not what the file holds
MAX_MALFORMED = 10_000  # a file with more is not what the config says
NUM_EXAMPLES = 5
GOOD, UNUSABLE, MALFORMED = 0, 1, 2
MESSAGES = datasets.List({"role": Value("string"), "content": Value("string")})
COMMON = {"key": Value("string"), "where": Value("string")}
ROW_COLUMNS = {
    "number": Value("int64"),
    "severity": Value("int8"),
    "problem": Value("string"),
    "format": Value("string"),
    "notes": datasets.List(Value("string")),
}
MESSAGE_COLUMNS = Features({"messages": MESSAGES, **COMMON})
COLUMNS: dict[Kind, Features] = {
    "sft": Features({"messages": MESSAGES, "untrained": datasets.List(Value("int32")), **COMMON}),
    "preferences": Features(
        {
            "prompt": MESSAGES,
            "answers": datasets.List(Value("string")),
            "ranks": datasets.List(Value("int32")),
            "ratings": datasets.List(Value("float32")),
            **COMMON,
        }
    ),
    "prompts": Features({**MESSAGE_COLUMNS, "columns": Value("string")}),
    "text": Features({"text": Value("large_string"), **COMMON}),
}


@dataclass(frozen=True)
class ReadReport:
    """Numbers of kept and left out records of a source."""

    path: str
    format: str
    """Name of the format; `mapping` for columns named by the config."""
    num_read: int
    num_kept: int
    left_out: dict[str, int]
    """Number of records by reason, most frequent first."""
    examples: list[str]
    """`file:line: reason` of the first few left out."""
    notes: dict[str, int]
    """Number of records by note (see `notes.py`), most frequent first."""

    def summary(self) -> str:
        """A line for the log, and a line for each example left out."""
        line = f"{self.path} ({self.format}): {self.num_kept} of {self.num_read} records"
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            line += f"; left out: {reasons}"
        said = [each for each in notes.summary(self.notes) if "keys not used" not in each]
        return "\n  ".join([line, *self.examples, *said])


def read_source(source: DataSource, kind: Kind) -> tuple[Dataset, ReadReport]:
    """Every usable record of a source, in the file's order, and the report.

    Columns are the record's fields (`messages`, with `untrained` for SFT and `columns`, the whole
    record as JSON, for prompts; or `prompt`, `answers`,
    `ranks`, `ratings`; or `text`), `key` (see `record_key`) and `where` (`file:line`).

    Raises:
        ValueError: there is no such file or data set; a malformed file or record; no usable record,
            or fewer than unusable ones.
    """
    rows = read_rows(source, kind)
    severities: list[int] = rows["severity"][:]
    if MALFORMED in severities:
        bad = [i for i, severity in enumerate(severities) if severity == MALFORMED]
        lines = [str(rows[i]["problem"]) for i in bad[:NUM_EXAMPLES]]
        if len(bad) > len(lines):
            lines.append(f"and {len(bad) - len(lines)} more")
        raise RecordError("\n  ".join(lines))
    return _keep_usable(rows, severities, source, kind)


def read_rows(source: DataSource, kind: Kind) -> Dataset:
    """A row for each record of a source, usable or not.

    Columns are those of `read_source`, `number` (of the object it is in, from 0), `severity`
    (`GOOD`, `UNUSABLE` or `MALFORMED`), `problem` (why it is unusable), `format` and `notes`.

    Raises:
        ValueError: there is no such file or data set, or it is empty; the cache cannot be written.
    """
    data = _open(source)
    features = Features({**COLUMNS[kind], **ROW_COLUMNS})
    arguments = {
        "reading": source.model_dump(exclude={"weight", "epochs"}),
        "kind": kind,
        "data": data,
        "digests": (code_digest(), [] if isinstance(data, Dataset) else [*map(_digest, data)]),
    }
    with writing_cache():
        try:
            return Dataset.from_generator(_generate, features=features, gen_kwargs=arguments)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError | OSError):  # wrapped by `datasets`
                raise error.__cause__ from None
            raise


def decode_source(source: DataSource) -> Iterator[tuple[str, object]]:
    """Place and object of everything in a source; a `RecordError` in place of what is broken."""
    return _decode(source, _open(source))


def _open(source: DataSource) -> list[DataFile] | Dataset:
    """The files of a source; the split of a hub data set if there are none.

    Raises:
        ValueError: there is no such file or data set.
    """
    files = None
    if source.languages is not None:
        files = find_aligned(source.path, language_codes(source.languages))
    files = files or find_files(source.path, source.split)
    return _load_hub(source) if files is None else files


def _load_hub(source: DataSource) -> Dataset:
    with writing_cache():  # else the error below would blame the name
        pass
    try:
        data = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:
        raise ValueError(
            f"no file {source.path!r}, and no data set of that name with a split "
            f"{source.split!r} could be loaded: {error}"
        ) from error
    assert isinstance(data, Dataset)
    return data


def _digest(file: DataFile) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in filter(None, (file.path, file.aligned)):
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _generate(
    reading: dict[str, Any], kind: Kind, data: list[DataFile] | Dataset, digests: object
) -> Iterator[dict[str, object]]:
    """Rows of a source. `digests` only names the cache entry."""
    source = DataSource(**reading)
    yield from _rows(lambda: _decode(source, data), source, kind)


def _decode(source: DataSource, data: list[DataFile] | Dataset) -> Iterator[tuple[str, object]]:
    if isinstance(data, Dataset):
        for number, raw in enumerate(cast(Iterable[dict[str, object]], data), start=1):
            # A hub data set has null for a missing key.
            yield f"{source.path}: record {number}", {k: v for k, v in raw.items() if v is not None}
        return
    for file in data:
        yield from decode(file, source)


def _rows(
    decoded: Callable[[], Iterator[tuple[str, object]]], source: DataSource, kind: Kind
) -> Iterator[dict[str, object]]:
    """A row for each record of the decoded objects, usable or not."""
    format, num_malformed = source.format, 0
    number = -1
    answers, trees = LabelledAnswers(), MessageTrees()
    said: dict[int, list[str]] = {}
    added: dict[str, object] = {KEEP: True} if source.keep_deleted else {}
    if source.languages is not None:
        added["languages"] = source.languages
    objects = decoded()
    for number, (where, raw) in enumerate(objects):
        try:
            if isinstance(raw, RecordError):
                raise raw
            if format is None:
                format = detect_format(raw, kind, where)
            compared = isinstance(format, ColumnMapping) and format.output_1 is not None
            if (compared or format == "comparison") and verdicts.SETTLED not in added:
                added[verdicts.SETTLED] = _meanings(decoded(), source)
            of_cells = [*raw.notes] if isinstance(raw, Cells) else []
            columns = _columns(raw, kind)
            if isinstance(raw, dict):
                raw = {**raw, **added}
            if format == "oasst" and is_tree_message(raw):
                trees.add(number, where, raw)
                continue
            found = parse_records(raw, format, kind, where)
            said[number] = of_cells + notes.notes(*named(raw, format, kind))
        except RecordError as error:
            num_malformed += 1
            yield _row(kind, (number, where, error), format)
            if num_malformed == MAX_MALFORMED:
                rest = sum(1 for _ in objects)
                end = f"{where}: reading stopped after {MAX_MALFORMED} malformed records"
                end += f", {rest} not read"
                yield _row(kind, (number, where, RecordError(end)), format)
                return
            continue
        for place, record in found:
            if isinstance(record, Labelled):
                answers.add(number, place, record)
            else:
                yield _row(kind, (number, place, record), format, said.pop(number, []), columns)
    for grouped in chain(answers.preferences(), trees.records(kind)):
        yield _row(kind, grouped, format, said.pop(grouped[0], []))
    if number < 0:
        raise RecordError(f"{source.path}: no records")


def _meanings(objects: Iterator[tuple[str, object]], source: DataSource) -> dict[str, str]:
    """What the verdicts of a source mean: the config's word, or what its whole column leaves.

    Raises:
        ValueError: neither says it.
    """
    if source.verdicts is not None:
        return {str(verdicts.written(key)): side for key, side in source.verdicts.items()}
    counts, keys = Counter[tuple[str, str]](), ("", "")
    for _, raw in objects:
        try:
            fields = cast("dict[str, object]", raw) if isinstance(raw, dict) else {}
            if isinstance(source.format, ColumnMapping):
                fields = apply_mapping(fields, source.format, answers_optional=True)
        except Malformed:  # reported when the record is read
            continue
        keys = verdicts.two_answer_keys(fields) or keys
        verdicts.count(fields, counts)
    try:
        return verdicts.settle(counts, keys)
    except Malformed as error:
        raise ValueError(f"{source.path}: {error}") from None


def _columns(raw: object, kind: Kind) -> str:
    """The whole record as JSON for PPO's prompts, whose reward functions may look at it.

    What JSON has no type for, such as dates of a parquet file, becomes text.
    """
    return json.dumps(raw, default=str) if kind == "prompts" and isinstance(raw, dict) else "{}"


def _row(
    kind: Kind,
    found: Found,
    format: Format | ColumnMapping | None,
    said: Sequence[str] = (),
    columns: str = "{}",
) -> dict[str, object]:
    number, where, record = found
    bad = isinstance(record, ValueError)
    fields: dict[str, Any] = dict.fromkeys(COLUMNS[kind])
    if not isinstance(record, ValueError):
        fields = {**record.__dict__, "key": record_key(record)}
        if kind == "prompts":
            fields["columns"] = columns
    severity = MALFORMED if isinstance(record, RecordError) else UNUSABLE if bad else GOOD
    return {
        **fields,
        "where": where,
        "number": number,
        "severity": severity,
        "problem": str(record) if bad else "",
        "format": "mapping" if isinstance(format, ColumnMapping) else format,
        "notes": [*said],
    }


def _keep_usable(
    rows: Dataset, severities: list[int], source: DataSource, kind: Kind
) -> tuple[Dataset, ReadReport]:
    """The rows without a problem, and the report."""
    bad = [i for i, severity in enumerate(severities) if severity != GOOD]
    problems: list[str] = rows.select(bad)["problem"][:]
    report = ReadReport(
        path=source.path,
        format=rows[0]["format"],
        num_read=len(rows),
        num_kept=len(rows) - len(bad),
        left_out=dict(Counter(problems).most_common()),
        examples=[f"{rows[i]['where']}: {rows[i]['problem']}" for i in bad[:NUM_EXAMPLES]],
        notes=notes.count(rows["notes"][:]),
    )
    # Unpaired labels, and bad answers in SFT, do not mean a wrong format.
    too_many = 1.0 if report.format == "kto" else MAX_LEFT_OUT
    num_joined = sum(report.left_out.get(each, 0) for each in PASSED_OVER)
    if len(bad) - num_joined > too_many * (len(rows) - num_joined) or not report.num_kept:
        raise RecordError(
            f"more than {MAX_LEFT_OUT:.0%} of the records cannot be used for {kind}; is the format "
            f"right?\n{report.summary()}"
        )
    kept = [i for i, severity in enumerate(severities) if severity == GOOD]
    return rows.select(kept).remove_columns([*ROW_COLUMNS]), report
