"""What every section of the YAML is made of: the strict base class, number types, `DataSource`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function called `module:function`; modules of the current folder are found too.

    Args:
        name: as the config has it.
        key: of the config, for the message.

    Raises:
        ValueError: no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = vars(importlib.import_module(module_name))[function_name]
    except (ImportError, KeyError, ValueError) as error:
        raise ValueError(
            f"{key}: {name!r} is not `module:function` of an importable module: {error!r}"
        ) from error
    if not callable(found):
        raise ValueError(f"{key}: {name!r} is a {type(found).__name__}, not a function")
    return found


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Schedule = Literal["linear", "cosine", "constant"]


class Section(BaseModel):
    """A part of the YAML: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
