"""What the sections of the YAML are built from: the strict base class, number types, functions.

The sections themselves are in the other modules of this package.
"""

import importlib.machinery
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
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
FunctionName = FilePath
"""`module:function`, or `FOLDER/module:function` with the folder that the module lies in."""


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
    """The function `module:function` or `FOLDER/module:function`; the module may end in .py.

    Without a folder, modules in the current one are found too.

    Raises:
        ValueError: there is no such module or function, or the module that Python finds lies
            elsewhere than in the folder; begins with `key`, the config's.
    """
    folder, _, inner = name.replace(".py:", ":").rpartition("/")
    place = os.path.realpath(folder or os.getcwd())
    if place not in sys.path:
        sys.path.append(place)
    try:
        if ":" not in inner:
            raise ValueError("it has no colon")
        found = pkgutil.resolve_name(inner)
    except (ImportError, AttributeError, ValueError) as error:
        if inner.startswith("__main__:"):
            own = inner.partition(":")[2]
            raise ValueError(
                f"{key}: {own} is a function of the script or notebook that trained this run, and "
                f"is not to be found here. Go on there: chatllama.train(..., reward={own}, "
                f"resume=True); or put it into a module and give that as module:{own}"
            ) from error
        raise ValueError(
            f"{key}: {name!r} is not `module:function` of an importable module: {error!r}"
        ) from error
    if not callable(found):
        raise ValueError(f"{key}: {name!r} is a {type(found).__name__}, not a function")
    file = vars(sys.modules[inner.partition(":")[0]]).get("__file__") or ""
    if folder and not Path(os.path.realpath(file)).is_relative_to(place):
        raise ValueError(
            f"{key}: {name!r}: Python finds another module of that name, {file}; rename yours"
        )
    return found


def with_folder(name: str) -> str:
    """The name of a function with the absolute folder of its module, if that is the current one.

    Names of installed modules, and of modules beside this package, stay as they are.
    """
    folder, _, inner = name.rpartition("/")
    if folder:
        return f"{Path(folder).absolute()}/{inner}"
    here, beside = os.path.realpath(os.getcwd()), Path(__file__).resolve().parents[2]
    elsewhere = [str(beside), *(p for p in sys.path if p and os.path.realpath(p) != here)]
    module = inner.partition(":")[0]
    spec = importlib.machinery.PathFinder.find_spec(module.partition(".")[0], elsewhere)
    file = Path(here, *module.split("."))
    if (spec is None or spec.origin is None) and (
        file.with_name(f"{file.name}.py").is_file() or (file / "__init__.py").is_file()
    ):
        return f"{here}/{inner}"
    return name
