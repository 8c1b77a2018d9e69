"""chatllama: SFT, reward model and PPO as four adapters on one frozen LLaMA."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatllama.api import Model, load, train

__all__ = ["Model", "load", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the Python door when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from chatllama import api

    return getattr(api, name)
