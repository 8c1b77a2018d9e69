"""The files of a tokenizer's folder, checked before libraries read them, and what those raise.

Making a tokenizer of them is in `tokenizer.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from chatllama.config.model import CODE_NOT_RUN, BackboneSection
from chatllama.runtime.json_files import MORE_KEYS, read_json, read_regular, refuse_pointer

TOKENIZER_CONFIG = "tokenizer_config.json"
MOST_TEMPLATE_BYTES = 2**20
"""Of a chat template; published ones have some thousands."""
_Id = Annotated[int, Field(ge=0, lt=2**31)]


class _Token(TypedDict):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    content: str
    special: NotRequired[bool]


class _Template(TypedDict):
    name: str
    template: str


class _SpecialTokens(TypedDict, total=False):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    bos_token: str | _Token | None
    eos_token: str | _Token | None
    unk_token: str | _Token | None
    pad_token: str | _Token | None
    model_max_length: float | None


class _Settings(_SpecialTokens, total=False):
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], _Token]
    chat_template: str | list[_Template] | dict[str, str] | None


class _Sizes(TypedDict, total=False):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    vocab_size: Annotated[int, Field(ge=1)] | None
    max_position_embeddings: Annotated[int, Field(ge=1)] | None


class _NumberedToken(_Token):
    id: _Id


class _Pipeline(TypedDict, total=False):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    added_tokens: list[_NumberedToken]


SHAPES: dict[str, Any] = {
    TOKENIZER_CONFIG: _Settings,
    "special_tokens_map.json": _SpecialTokens,
    "added_tokens.json": dict[str, _Id],
    "config.json": _Sizes,
    "tokenizer.json": _Pipeline,
}


def read_file(folder: Path, name: str) -> dict[str, Any]:
    """The content of one of the JSON files; empty if it is not there.

    Raises:
        ValueError: it is damaged, or its values have other types.
    """
    file = folder / name
    return read_json(file, SHAPES[name]) if file.exists() else {}


def read_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template of a folder, or several by name; None without one."""
    file = folder / "chat_template.jinja"
    if file.exists():
        content = read_regular(file, MOST_TEMPLATE_BYTES)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    texts = template.values() if isinstance(template, dict) else [template or ""]
    if (longest := max(map(len, texts), default=0)) > MOST_TEMPLATE_BYTES:
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: a chat template of {longest} bytes")
    return template


def has_template(template: str | dict[str, str] | None) -> bool:
    """Whether a tokenizer's `chat_template` can be used without naming one of several."""
    return "default" in template if isinstance(template, dict) else bool(template)


def own_template_exists(section: BackboneSection) -> bool:
    """Whether the backbone's tokenizer brings a chat template; reads its files, makes nothing.

    Raises:
        ValueError: the backbone is neither a folder nor a readable hub id, or a file is damaged.
    """
    if section.path is None:
        return False  # a tokenizer that a run makes of text has none
    folder = local_folder(section.path, section.revision, [TOKENIZER_CONFIG, "chat_template*"])
    return has_template(read_template(folder, read_file(folder, TOKENIZER_CONFIG)))


def local_folder(path: str | Path, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder itself, or those files of a hub repository as a cached folder.

    Raises:
        ValueError: neither a folder nor a readable hub id.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from chatllama.runtime.hub import hub_folder

    try:
        return hub_folder(str(path), revision, patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{path}: neither a folder nor a readable hub id: {error}") from error


@contextmanager
def read_by_library(place: Path) -> Iterator[None]:
    """Turns what transformers, tokenizers and sentencepiece raise inside into one ValueError.

    `place` is the file that they read, or the folder. Errors that name the folder are our own.
    """
    folder = place if place.is_dir() else place.parent
    try:
        with pipeline_errors():
            yield
    except MemoryError:
        raise
    except Exception as error:
        if place.is_file():
            refuse_pointer(place)
        text = " ".join(str(error).split()) or repr(error)
        if isinstance(error, ValueError) and text.startswith(str(folder)):
            raise
        if "trust_remote_code" in text:
            raise ValueError(f"{folder}: {CODE_NOT_RUN}") from error
        reason = f"{type(error).__name__}: {text[:300]}"
        raise ValueError(f"{place}: no tokenizer can be made of it: {reason}") from error


@contextmanager
def pipeline_errors() -> Iterator[None]:
    """Turns what `tokenizers` raises inside into a ValueError: bare Exceptions, and panics of Rust.

    A panic is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer fails: {str(error)[:300]}") from error
