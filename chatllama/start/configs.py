"""The configs that come with the package: listed and copied."""

import shutil
from pathlib import Path

from chatllama.config.nearest import did_you_mean

SHIPPED = Path(__file__).resolve().parents[2] / "configs"


def list_configs() -> str:
    """Name and first sentence of each shipped config."""
    names = sorted(SHIPPED.glob("*.yaml"))
    width = max((len(file.stem) for file in names), default=0)
    lines = [f"  {file.stem:<{width}}  {_about(file)}" for file in names]
    return "\n".join(["shipped configs; chatllama configs copy NAME [FOLDER]:", *lines])


def copy_config(name: str, folder: Path) -> list[Path]:
    """Copies a config, and those that it extends, into a folder; returns the new files.

    Raises:
        ValueError: there is no such config, or a file of that name is there already.
    """
    wanted = name.removesuffix(".yaml")
    known = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if wanted not in known:
        near = did_you_mean(wanted, known)
        raise ValueError(f"no shipped config {name!r}{near or '; known: ' + ', '.join(known)}")
    chain = _chain(known[wanted])
    if there := [folder / file.name for file in chain if (folder / file.name).exists()]:
        raise ValueError(f"{there[0]} is there already: remove it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, folder / file.name)) for file in chain]


def _chain(file: Path) -> list[Path]:
    """The config and those that it extends."""
    for line in file.read_text("utf-8").splitlines():
        key, _, parent = line.partition(":")
        if key == "extends":
            return [file, *_chain(file.with_name(parent.split("#")[0].strip()))]
    return [file]


def _about(file: Path) -> str:
    return file.read_text("utf-8").splitlines()[0].removeprefix("# ").rstrip(":.")
