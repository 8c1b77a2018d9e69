"""The names that `model` may take, and the adapters behind them that come and go at run time."""

import asyncio
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from chatllama.inference.load import LoadedRun
from chatllama.model.adapters import SavedAdapter, load_adapter
from chatllama.model.roles import Adapter, Role
from chatllama.serving.engine import Engine
from chatllama.serving.errors import ApiError, unknown_model
from chatllama.text.chat_format import check_contract

REWARD = "reward"


@dataclass(frozen=True)
class Served:
    """One name."""

    name: str
    role: Role
    created: int
    """Unix time."""
    loaded: bool
    """It came at run time and can be unloaded."""


class Models:
    """Names to roles.

    A name reaches nothing but this table: no path is made of it.

    Args:
        run: opened, with every adapter that the run has written.
        engine: runs changes between two steps.
        adapter_root: the only folder that run-time adapters are loaded from.
        most: adapters at run time.
    """

    def __init__(self, run: LoadedRun, engine: Engine, adapter_root: Path, most: int) -> None:
        self._run, self._engine, self._most = run, engine, most
        self._root = adapter_root.resolve()
        self._lock = asyncio.Lock()
        self._numbers = itertools.count(1)
        now = int(time.time())
        roles: dict[str, Role] = {"base": "base", "sft": "reference"}
        if run.config.lora is None:
            del roles["base"]  # the backbone is the tuned model: the bare one is not here
        elif "reference" not in run.model.lora:
            del roles["sft"]
        roles |= {role: role for role in ("policy", "ema") if role in run.model.lora}
        self._served = {name: Served(name, role, now, False) for name, role in roles.items()}
        self.has_reward = bool(run.reward_roles)
        """Whether /v1/score works."""
        self.created = now

    @property
    def names(self) -> list[str]:
        """Every name that answers."""
        return list(self._served)

    @property
    def all(self) -> list[Served]:
        """Everything that answers, in the order in which it came."""
        return list(self._served.values())

    @property
    def newest(self) -> str:
        """The name meant where a request gives none: what training came to."""
        return next(name for name in ("policy", "sft", "base") if name in self._served)

    @property
    def num_loaded(self) -> int:
        """Adapters that came at run time."""
        return sum(served.loaded for served in self._served.values())

    def find(self, name: str | None) -> Served:
        """What a request's `model` means.

        Raises:
            ApiError: there is no such model, or it does not answer.
        """
        served = self._served.get(self.newest if name is None else name)
        if served is None:
            if name == REWARD and self.has_reward:
                raise ApiError(
                    400, "model 'reward' gives scores only: use /v1/score", "wrong_model", "model"
                )
            raise unknown_model(str(name), self.names)
        return served

    async def load(self, name: str, path: str, inplace: bool) -> None:
        """Loads an adapter under a name.

        Raises:
            ApiError: the name is taken, there are too many, or the folder holds none that fits.
        """
        async with self._lock:
            old = self._served.get(name)
            if name == REWARD or (old is not None and not old.loaded):
                raise ApiError(
                    400, f"'{name}' is a role of the run; take another name", "name_taken",
                    "lora_name",
                )  # fmt: skip
            if old is not None and not inplace:
                raise ApiError(
                    400,
                    f"The lora adapter '{name}' has already been loaded. Unload it first, or set "
                    "'load_inplace' to true.",
                    "name_taken",
                    "lora_name",
                )
            if old is None and self.num_loaded >= self._most:
                raise ApiError(
                    400, f"{self._most} adapters are loaded, which is the most: unload one first",
                    "too_many_adapters", "lora_name",
                )  # fmt: skip
            saved = await asyncio.to_thread(self._read, path)
            role = f"served_{next(self._numbers)}"
            adapter = Adapter(saved.lora, saved.state)
            try:
                await asyncio.wrap_future(
                    self._engine.run(lambda: self._run.model.add(role, adapter))
                )
            except ValueError as error:
                raise _bad_path(str(error)) from error
            self._served[name] = Served(name, role, int(time.time()), True)
            if old is not None:
                await self._retire(old)

    async def unload(self, name: str) -> None:
        """Forgets a name; answers that it is giving are finished first.

        Raises:
            ApiError: nothing of that name came at run time.
        """
        async with self._lock:
            served = self._served.get(name)
            if served is None:
                raise ApiError(
                    404, f"The lora adapter '{name}' cannot be found.", "not_found", "lora_name"
                )
            if not served.loaded:
                raise ApiError(
                    400, f"'{name}' is a role of the run and stays", "not_unloadable", "lora_name"
                )
            del self._served[name]
            await self._retire(served)

    async def _retire(self, served: Served) -> None:
        await asyncio.wrap_future(self._engine.run(lambda: self._engine.retire(served.role)))

    def _read(self, path: str) -> SavedAdapter:
        """The adapter in a folder below the root.

        Raises:
            ApiError: it lies elsewhere, or is none that fits. What lies elsewhere is not told.
        """
        try:
            folder = Path(path).resolve()
            inside = folder.is_relative_to(self._root) and folder.is_dir()
        except (OSError, ValueError, RuntimeError):
            inside, folder = False, self._root
        if not inside:
            raise _bad_path("no folder below the one that --adapter-root allows")
        try:
            saved = load_adapter(folder)
            if saved.head:
                raise ValueError("a reward or value adapter, which does not answer")
            contract = saved.info.get("contract")
            if not isinstance(contract, dict):
                raise ValueError("chatllama.json names no chat contract")
            check_contract(contract, self._run.tokenizer, self._run.chat, "the adapter")
        except (ValueError, OSError) as error:
            raise _bad_path(str(error).replace(str(folder), "the folder")) from error
        return saved


def _bad_path(why: str) -> ApiError:
    return ApiError(400, f"lora_path: {why}", "bad_adapter", "lora_path")
