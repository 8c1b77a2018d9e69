"""Marks of records: keys beside the text that change what the text means.

Each is honoured, or the record is left out with a reason that names the key. Marks of single
turns are in `formats.py`; keys without such a meaning are listed by `notes.py`.
"""

from __future__ import annotations

from data.reading.formats import WEIGHTS, Raw, Unusable, flag, is_number, shorten

KEEP = "keep deleted"
"""The key under which `source.py` adds the source's `keep_deleted` to a record."""
DELETED, NOT_REVIEWED = "deleted: true", "review_result: false"
WEIGHED = "a weight of the record that is neither 0 nor 1: only a source can have one"
BESIDE = ("images", "image", "videos", "audios", "tools")


def check_record(fields: Raw) -> None:
    """Raises Unusable if a mark says not to use the record, or that the text is not all of it."""
    if reason := deletion(fields):
        raise Unusable(reason)
    for key in WEIGHTS:
        value = fields.get(key)
        if flag(value) is False:
            raise Unusable(f"{key}: {shorten(value)}")
        if flag(value) is None and is_number(value):  # a word is no weight: a city, a split
            raise Unusable(WEIGHED)
    if fields.get("mask") not in (None, ""):
        raise Unusable("the key 'mask', which may mean either of two things")
    for key in BESIDE:
        if str(fields.get(key) or "").strip() not in ("", "[]", "{}", "null", "None"):
            raise Unusable(f"{key} beside the text")


def deletion(fields: Raw) -> str:
    """Why OASST's people took the message out, or "" if they did not."""
    if fields.get(KEEP):
        return ""
    if flag(fields.get("deleted")):
        return DELETED
    return NOT_REVIEWED if flag(fields.get("review_result")) is False else ""
