"""Sentences with their translations, to be scored: every one is needed, so a broken one stops."""

from collections.abc import Sequence

from chatllama.config import DataSource, language_codes
from data.layouts import RecordError, mapping
from data.readers import decode_source
from data.translation import TEMPLATES, request, sentence_pair


def read_requests(path: str, languages: Sequence[str]) -> list[tuple[str, str, str]]:
    """Place, request for a translation, and reference, of every pair in order.

    Args:
        path: a file of pairs, or of two aligned files without their endings, as in a config.
        languages: source and target, such as `de` and `en`.

    Raises:
        ValueError: an unknown language, no such file, or a pair is broken or has an empty side.
    """
    language_codes(languages)
    source = DataSource(path=path, format="translation", languages=list(languages))
    found: list[tuple[str, str, str]] = []
    for where, raw in decode_source(source):
        if isinstance(raw, RecordError):
            raise raw
        try:
            sentence, reference = sentence_pair(mapping(raw, "the record"), languages)
        except ValueError as error:
            raise RecordError(f"{where}: {error}") from None
        if not sentence or not reference:
            raise RecordError(f"{where}: the {'translation' if sentence else 'sentence'} is empty")
        found.append((where, request(sentence, languages, TEMPLATES[0]), reference))
    if not found:
        raise RecordError(f"{path}: no sentences")
    return found
