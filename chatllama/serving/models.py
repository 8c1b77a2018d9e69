"""The names that `model` may take, and the adapters that are loaded and unloaded at run time."""

import asyncio
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from chatllama.inference.load import LoadedRun
from chatllama.model.adapters import SavedAdapter, load_adapter
from chatllama.model.roles import Adapter, Role
from chatllama.serving.engine import Engine
from chatllama.serving.errors import ApiError, shown
from chatllama.text.chat_format import check_contract

REWARD = "reward"


@dataclass(frozen=True)
class ServedModel:
    """One name."""

    name: str
    role: Role
    created: int
    """Unix time."""
    loaded: bool
    """Loaded at run time, so that it can be unloaded."""


class Models:
    """Names to roles. No path is made of a name.

    Run-time adapters, `max_adapters` at most, are loaded from below `adapter_root` only. The engine
    runs changes between two steps.
    """

    def __init__(
        self, run: LoadedRun, engine: Engine, adapter_root: Path, max_adapters: int
    ) -> None:
        self._run, self._engine, self._max_adapters = run, engine, max_adapters
        self._root = adapter_root.resolve()
        self._lock = asyncio.Lock()
        self._numbers = itertools.count(1)
        now = int(time.time())
        roles: dict[str, Role] = {"base": "base", "sft": "reference"}
        if run.config.lora is None:
            del roles["base"]  # the backbone is the tuned model; the original is not loaded
        elif "reference" not in run.model.lora:
            del roles["sft"]
        roles |= {role: role for role in ("policy", "ema") if role in run.model.lora}
        self._served = {name: ServedModel(name, role, now, False) for name, role in roles.items()}
        self.has_reward = bool(run.reward_roles)
        """Whether /v1/score works."""

    @property
    def all(self) -> list[ServedModel]:
        """Every model, the oldest first."""
        return list(self._served.values())

    @property
    def start(self) -> str:
        """The model that PPO starts from."""
        return "sft" if "sft" in self._served else "base"

    @property
    def names(self) -> list[str]:
        """The names of all."""
        return list(self._served)

    @property
    def num_loaded(self) -> int:
        """Adapters loaded at run time."""
        return sum(served.loaded for served in self._served.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of a request, None: the run's last stage; ApiError if none of it answers."""
        if name is None:
            name = next(each for each in ("policy", "sft", "base") if each in self._served)
        if name in self._served:
            return self._served[name]
        if name == REWARD and self.has_reward:
            text = "model 'reward' gives scores only: use /v1/score"
            raise ApiError(400, text, "wrong_model", "model")
        text = f"The model '{shown(name)}' does not exist; loaded: {', '.join(self.names)}"
        raise ApiError(404, text, "model_not_found", "model")

    async def load(self, name: str, path: str, inplace: bool) -> None:
        """Loads an adapter under a name.

        Raises:
            ApiError: the name is taken, there are too many, or the folder holds none that fits.
        """
        async with self._lock:
            old = self._served.get(name)
            if name == REWARD or (old is not None and not old.loaded):
                raise _refused(f"'{name}' is a role of the run; take another name", "name_taken")
            if old is not None and not inplace:
                raise _refused(
                    f"The lora adapter '{name}' has already been loaded. Unload it first, or set "
                    "'load_inplace' to true.",
                    "name_taken",
                )
            if old is None and self.num_loaded >= self._max_adapters:
                most = f"{self._max_adapters} adapters are loaded, which is the most"
                raise _refused(f"{most}: unload one first", "too_many_adapters")
            saved = await asyncio.to_thread(self._read, path)
            role = f"served_{next(self._numbers)}"
            adapter = Adapter(saved.lora, saved.state)
            add = self._engine.run(lambda: self._run.model.add(role, adapter))
            try:
                await asyncio.wrap_future(add)
            except ApiError:
                raise
            except Exception as error:  # nothing of it is left in the model
                raise _bad_path(str(error) or repr(error)) from error
            self._served[name] = ServedModel(name, role, int(time.time()), True)
            if old is not None:
                await self._retire(old)

    async def unload(self, name: str) -> None:
        """Removes an adapter loaded at run time; answers in progress are finished first."""
        async with self._lock:
            served = self._served.get(name)
            if served is None:
                raise _refused(f"The lora adapter '{name}' cannot be found.", "not_found", 404)
            if not served.loaded:
                raise _refused(f"'{name}' is a role of the run and stays", "not_unloadable")
            del self._served[name]
            await self._retire(served)

    async def _retire(self, served: ServedModel) -> None:
        await asyncio.wrap_future(self._engine.run(lambda: self._engine.retire(served.role)))

    def _read(self, path: str) -> SavedAdapter:
        """The adapter in a folder below the root; of other folders an ApiError reveals nothing."""
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
            check_contract(contract, self._run.tokenizer, self._run.config.chat, "the adapter")
        except Exception as error:  # files of a stranger
            text = str(error) or repr(error)
            raise _bad_path(text.replace(str(folder), "the folder")) from error
        return saved


def _refused(message: str, code: str, status: int = 400) -> ApiError:
    return ApiError(status, message, code, "lora_name")


def _bad_path(why: str) -> ApiError:
    return ApiError(400, f"lora_path: {why}", "bad_adapter", "lora_path")
