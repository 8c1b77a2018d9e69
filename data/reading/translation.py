"""Translation as instructions: a sentence and its translation become a prompt and its completion.

The languages are the config's (`languages: [de, en]`); aligned files are found in `files.py`. The
sentence determines the wording of the prompt, so that it is the same in every run.
"""

import hashlib
from collections.abc import Sequence

from chatllama.config.sources import language_codes, split_language
from data.reading.formats import Malformed, Raw, checked_list, keys_of, mapping, shorten, string

TEMPLATES = (
    "Translate the following text from {source} to {target}.\n\n{text}",
    "Translate this {source} text into {target}:\n\n{text}",
    "{text}\n\nTranslate the text above from {source} into {target}.",
    "What is the {target} translation of this {source} text?\n\n{text}",
    "Give the {target} for the following {source}.\n\n{text}",
    "Please write this in {target}. It is {source}.\n\n{text}",
)
"""Wordings of the prompt; `chatllama eval --translation` uses the first."""


def request(text: str, languages: Sequence[str], template: str | None = None) -> str:
    """The prompt for the translation of `text`.

    Args:
        languages: source and target, `de` or `de=German`.
        template: one of `TEMPLATES`. None: one of them, by a digest of the text.
    """
    if template is None:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        template = TEMPLATES[int.from_bytes(digest, "big") % len(TEMPLATES)]
    (_, source), (_, target) = map(split_language, languages)
    return template.format(source=source, target=target, text=text)


def sentence_pair(fields: Raw, languages: Sequence[str]) -> tuple[str, str]:
    """The sentence and its translation, without white space around them.

    They are under the languages' codes, in `translation` (as in the WMT sets of the hub) or as
    columns, or under `source` and `target`.

    Raises:
        Malformed: they are not there.
    """
    inner = fields
    if "translation" in fields:
        inner = mapping(fields["translation"], "translation")
    codes = language_codes(languages)
    for names in (codes, ("source", "target")):
        if set(names) <= inner.keys():
            return string(inner, names[0]).strip(), string(inner, names[1]).strip()
    wanted = f"{codes[0]!r} and {codes[1]!r} (or source and target)"
    raise Malformed(f"expected {wanted}, got {keys_of(inner)}")


def as_instruction(fields: Raw) -> Raw:
    """The record as `prompt` and `completion`; `source.py` has added the config's languages.

    Raises:
        Malformed: it has no languages, or not their sentences.
    """
    if "languages" not in fields:
        raise Malformed("format translation needs `languages`, as in languages: [de, en]")
    languages = [str(each) for each in checked_list(fields["languages"], "languages")]
    if len(languages) != 2:
        raise Malformed(f"languages: expected [source, target], got {shorten(languages)}")
    try:
        language_codes(languages)
    except ValueError as error:
        raise Malformed(f"languages: {error}") from None
    sentence, translation = sentence_pair(fields, languages)
    prompt = request(sentence, languages) if sentence else ""
    return {"prompt": prompt, "completion": translation}
