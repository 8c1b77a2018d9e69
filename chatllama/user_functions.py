"""Python functions that the config names as `module:function`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


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
