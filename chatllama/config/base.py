"""What the sections of the YAML are built from: the strict base class, number types, functions.

The sections themselves are in the other modules of this package.
"""

import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e38)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e38)]
"""Within float32, in which they are computed with."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Schedule = Literal["linear", "cosine", "constant"]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path; `~` is expanded once, here, since some libraries would expand it and others not."""


class Section(BaseModel):
    """A part of the YAML: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def check_multiple(self, whole: str, part: str) -> None:
        """Raises ValueError if the number under key `whole` is not a multiple of that of `part`."""
        values = self.__dict__
        if values[whole] % values[part]:
            raise ValueError(f"{whole} {values[whole]} is not a multiple of {part} {values[part]}")


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function `module:function`; modules in the current folder are found too.

    Raises:
        ValueError: there is no such module or function; begins with `key`, the config's.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key}: {name!r} is not `module:function` of an importable module: {error!r}"
        ) from error
    if not callable(found):
        raise ValueError(f"{key}: {name!r} is a {type(found).__name__}, not a function")
    return found
