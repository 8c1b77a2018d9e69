"""A data source of the config: path, format, columns, languages, weight.

Reading it is in `data/reading/`.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from chatllama.config.base import FilePath, PositiveFloat, Section

Format = Literal[
    "alpaca", "messages", "sharegpt", "prompt_completion", "question_answer", "self_instruct",
    "utterances", "text", "lines", "preference", "hh", "ranked", "comparison", "kto", "oasst",
    "prompts", "turns", "translation",
]  # fmt: skip

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French", "gu": "Gujarati",
    "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "kk": "Kazakh",
    "km": "Khmer", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def split_language(language: str) -> tuple[str, str]:
    """Code and English name of a language written as `de`, `pt-BR` or `nds=Low German`.

    Raises:
        ValueError: neither the code is known nor a name given.
    """
    code, _, name = (part.strip() for part in language.partition("="))
    known = LANGUAGES.get(re.split("[-_]", code)[0].lower())
    if not code or not (name or known):
        raise ValueError(
            f"unknown language {language!r}; known: {', '.join(LANGUAGES)}; or write its name "
            "too, as in nds=Low German"
        )
    return code, name or str(known)


def language_codes(languages: Sequence[str]) -> tuple[str, str]:
    """The codes of a source and a target language.

    Raises:
        ValueError: an unknown one, or the same twice.
    """
    source, target = (split_language(each)[0] for each in languages)
    if source == target:
        raise ValueError(f"from {source!r} into itself is no translation")
    return source, target


class ColumnMapping(Section):
    """Which column of a data set has which field; the given keys determine the format.

    A column inside another is written with dots, a list entry as its index from 0:
    `instances.0.output`.
    """

    prompt: str | None = None
    """The prompt: text or messages."""
    completion: str | None = None
    """Its answer."""
    instruction: str | None = None
    """The prompt, if `input` may follow it."""
    input: str | None = None
    """Text that the instruction is about; may be empty."""
    output: str | None = None
    """The answer to instruction and input."""
    system: str | None = None
    """System prompt."""
    history: str | None = None
    """Earlier [question, answer] pairs."""
    messages: str | None = None
    """Turns with `role` and `content`, or with `from` and `value`."""
    chosen: str | None = None
    """The better answer, or the conversation that ends with it."""
    rejected: str | None = None
    """The worse one."""
    margin: str | None = None
    """How much better chosen is."""
    answers: str | None = None
    """Several answers, the best first."""
    ranks: str | None = None
    """Their ranks, lower is better."""
    scores: str | None = None
    """Their ratings, higher is better."""
    output_1: str | None = None
    """One of two answers."""
    output_2: str | None = None
    """The other."""
    preference: str | None = None
    """Which of the two is better: 1 or 2, or a number between."""
    label: str | None = None
    """Whether the answer is a good one: true or false."""
    text: str | None = None
    """Plain text."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> "ColumnMapping":
        if not any(self.__dict__.values()):
            raise ValueError("name at least one column, as in {prompt: question}")
        return self


FormatOrMapping = Annotated[
    Annotated[Format, Tag("name")] | Annotated[ColumnMapping, Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict | ColumnMapping) else "name"),
]


class DataSource(Section):
    """One data set of a stage's mixture."""

    path: FilePath
    """A file (json, jsonl, csv, tsv, parquet, txt; also .gz, .bz2, .xz, .zst), a folder of such
    files, a pattern (`notes/*.jsonl`), or the id of a data set on the hub."""
    format: FormatOrMapping | None = None
    """Format of the records: a name, or which column has which field, as in
    `{prompt: question, completion: answer}`. null: detected from the keys of the first record."""
    languages: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """With format `translation`: source and target language, as in [de, en] (or
    `nds=Low German`). `path` may then stand for two aligned files, PATH.de and PATH.en."""
    split: str = "train"
    """Split to read, for hub data sets and folders."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    columns: list[str] | None = None
    """Names of the columns of a csv or tsv file without a header line."""
    verdicts: dict[str, Literal["first", "second", "tie"]] | None = None
    """Which of two answers a verdict is for, as in {0: first, 1: second, 2: tie}; numbers between
    first and second are for the nearer one. null: what the whole column leaves no doubt of."""
    quoting: Literal["double", "backslash", "none"] | None = None
    """Cells of a csv or tsv may be in quotation marks, inside which a mark is doubled or follows a
    backslash; none: marks are text. null: none in tsv; in csv double, or backslash where only that
    gives every row the header's length, and no backslash stands before anything else."""
    keep_deleted: bool = False
    """Use records and messages of `deleted: true` or `review_result: false` (OASST) too."""
    encoding: str = "utf-8"
    """Encoding of text files, such as latin-1."""
    weight: PositiveFloat | None = None
    """Share in the mixture, relative to the other sources'; give it to all sources or to none."""
    epochs: PositiveFloat = 1.0
    """Passes over this source in the mixture; with weights, the most passes."""

    @field_validator("languages")
    @classmethod
    def _check_languages(cls, languages: list[str] | None) -> list[str] | None:
        if languages is not None:
            language_codes(languages)
        return languages

    @model_validator(mode="after")
    def _check_translation(self) -> "DataSource":
        if (self.format == "translation") != (self.languages is not None):
            raise ValueError(
                "format translation and languages (as in languages: [de, en]) go together"
            )
        return self

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, name: str) -> str:
        try:
            if "\n".encode(codecs.lookup(name).name) == b"\n":
                return name
        except LookupError:
            raise ValueError(f"unknown encoding {name!r}; for example utf-8 or latin-1") from None
        raise ValueError(f"{name!r} cannot be read line by line; convert the file to utf-8")
