"""What a planted bug is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    name: str
    file: str
    """From the project's root."""
    old: str
    """Part of exactly one line of the file."""
    new: str
    """What stands there instead."""
    catchers: tuple[str, ...]
    """Tests as pytest names them; a function without [case] fails when one of its cases does."""
