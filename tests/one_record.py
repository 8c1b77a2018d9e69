"""The one record of an object that holds one, as most do."""

from chatllama.config.sources import ColumnMapping, Format
from data.reading.formats import Unusable
from data.reading.records import Kind, Record, parse_records


def parse_record(raw: object, format: Format | ColumnMapping, kind: Kind, where: str) -> Record:
    """What `parse_records` finds; raises the reason if it cannot be used."""
    ((_, record),) = parse_records(raw, format, kind, where)
    if isinstance(record, Unusable):
        raise record
    return record
