"""Files: which ones a `path` of the config names. Their content is decoded in `decode.py`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatllama.config.nearest import did_you_mean

PROJECT_ROOT = Path(__file__).resolve().parents[2]
TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# Words in the names of a split's files, as on the hub: the word is alone in the path.
SPLIT_WORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class DataFile:
    """A file of a source."""

    path: Path
    name: str
    """The name in errors: as in the config, as far as that goes."""
    aligned: Path | None = None
    """The file whose lines are the translations of this one's."""


def find_aligned(path: str, codes: Sequence[str]) -> list[DataFile] | None:
    """The pair of files `path`.de and `path`.en, packed or not; None if neither exists.

    Raises:
        ValueError: only one of the two exists.
    """
    given = Path(path).expanduser()
    for base in [Path()] if given.is_absolute() else [Path.cwd(), PROJECT_ROOT]:
        names = [[f"{base / given}.{code}{packed}" for packed in ("", *COMPRESSIONS)]
                 for code in codes]  # fmt: skip
        found = [next((Path(n) for n in some if Path(n).is_file()), None) for some in names]
        source, target = found
        if source and target:
            return [
                DataFile(source, f"{path}.{source.name.removeprefix(given.name + '.')}", target)
            ]
        if source or target:
            missing = codes[1] if source else codes[0]
            raise ValueError(f"{source or target} is there, but no {path}.{missing} beside it")
    return None


def find_files(path: str, split: str = "train") -> list[DataFile] | None:
    """The files that `path` names, in order of their names; None if it can only be a hub id.

    `path` is a file, a folder, or a pattern with `*`, `?` or `**`. A relative one is looked for in
    the current directory, then in the folder of this package, so that `data/samples/...` works
    wherever the package is installed. Of a folder, only the files of the split are read; if no name
    has a split, all of them are `train`.

    Raises:
        ValueError: there is no such file, or none of that split.
    """
    given = Path(path).expanduser()
    bases = [Path()] if given.is_absolute() else [Path.cwd(), PROJECT_ROOT]
    for base in bases:
        place = base / given
        if place.is_dir():
            return _files_of_split(place, path, split)
        if place.exists():
            if not place.is_file():
                raise ValueError(f"{path}: not a regular file")
            return [DataFile(place, path)]
        if re.search(r"[*?]", path):
            root = Path(given.anchor) if given.is_absolute() else base
            pattern = str(given.relative_to(given.anchor)) if given.is_absolute() else path
            if matches := sorted(file for file in root.glob(pattern) if file.is_file()):
                names = [f.relative_to(base) if f.is_relative_to(base) else f for f in matches]
                return [DataFile(*pair) for pair in zip(matches, map(str, names), strict=True)]
    tried = [str(base / given) for base in bases]
    if re.search(r"[*?]", path):
        raise ValueError(f"no file matches {path!r} (tried {' and '.join(tried)})")
    if suffix(given) not in TYPES and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return None
    raise ValueError(f"no data file {path!r} (tried {' and '.join(tried)}){_near(tried)}")


def named_files(path: str, split: str) -> dict[str, Path] | None:
    """The same as name -> path."""
    files = find_files(path, split)
    return None if files is None else {file.name: file.path for file in files}


def suffix(file: Path) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    inner = Path(file.stem) if file.suffix.lower() in COMPRESSIONS else file
    return inner.suffix.lower()


def _files_of_split(folder: Path, path: str, split: str) -> list[DataFile]:
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and suffix(file) in TYPES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise ValueError(f"{path}: no data files in this folder; known: {', '.join(TYPES)}")
    by_split = {file: _split_of(file.relative_to(folder)) for file in found}
    if not any(by_split.values()):
        if split != "train":
            raise ValueError(f"{path}: no file name there has a split in it, so all are 'train'")
        chosen = found
    else:
        canonical = next((name for name, words in SPLIT_WORDS.items() if split in words), split)
        chosen = [file for file, its_split in by_split.items() if its_split == canonical]
        known = sorted({name for name in by_split.values() if name})
        if not chosen:
            raise ValueError(f"{path}: no files of the split {split!r}; there are {known}")
    return [DataFile(file, f"{path.rstrip('/')}/{file.relative_to(folder)}") for file in chosen]


def _split_of(relative: Path) -> str | None:
    """The split in the file's name, or else in its folders' names, from the inside out."""
    for part in reversed(relative.parts):
        words = re.split(r"[-._ ]|(?<=[a-z])(?=\d)", part.lower())
        for name, known in SPLIT_WORDS.items():
            if set(words) & set(known):
                return name
    return None


def _near(tried: list[str]) -> str:
    folders = {Path(each).parent for each in tried if Path(each).parent.is_dir()}
    names = {file.name for folder in folders for file in folder.iterdir()}
    return did_you_mean(Path(tried[0]).name, sorted(names))
