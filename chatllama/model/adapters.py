"""Adapters on disk, in PEFT's own format, reopened and checked after writing.

A folder holds adapter_model.safetensors, adapter_config.json and chatllama.json (chat contract,
base, stage). No config.json: transformers would take the folder for a whole model.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import LoraConfig
from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import NotRequired, Required, TypedDict

from chatllama.config.model import LoraSection
from chatllama.model.integrity import check_adapter
from chatllama.runs.folder import INFO
from chatllama.runtime.files import replace_folder, write_json
from chatllama.runtime.json_files import MORE_KEYS, read_json, refuse_pointer

WEIGHTS = "adapter_model.safetensors"
HEAD_PREFIX = "base_model.model.score."
READ = [
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "revision",
    "modules_to_save", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version",
]  # fmt: skip
"""Keys of adapter_config.json that may differ from PEFT's defaults; others must be empty or so."""
HEADS = ("score", "classifier")
"""Names that PEFT gives for SEQ_CLS by itself; only `score` is a layer of these models."""
STARTS = (True, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights alone."""


_PART = re.compile(r"(.+)\.lora_([AB])\.weight")
_Names = list[str] | None


class _AdapterFile(TypedDict):
    """Keys of adapter_config.json that are read, with those that no adapter lacks."""

    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    peft_type: str
    r: Annotated[int, Field(ge=1, le=2**16)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    modules_to_save: NotRequired[_Names]


class _InfoFile(TypedDict, total=False):
    """Keys of chatllama.json that are read; older versions wrote fewer."""

    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    base: Required[str]
    stage: str
    contract: dict[str, Any]
    base_fingerprint: str | None


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read back from its folder."""

    lora: LoraSection
    state: dict[str, Tensor]
    """PEFT names -> float32 tensors, without the head."""
    head: dict[str, Tensor]
    """`weight` (1, H) and, for a value head, `bias` (1,); empty without a head."""
    info: dict[str, Any]
    """Contents of chatllama.json: `contract`, `base`, `stage` ..."""


def save_adapter(
    folder: Path,
    state: Mapping[str, Tensor],
    lora: LoraSection,
    info: Mapping[str, Any],
    head: Mapping[str, Tensor] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Replaces `folder` by the adapter, complete and checked, or leaves it as it was.

    With a reward model's head, a weight alone, the adapter loads through
    AutoModelForSequenceClassification(num_labels=1). That class has no bias, which a value head
    has: such an adapter is for this project's own use.

    Args:
        folder: read by PEFT's `from_pretrained`.
        state: PEFT names -> gathered tensors, as from `roles.adapter_state`.
        lora: the adapter's shape.
        info: `base` (path or hub id) and the other contents of chatllama.json.
        head: `weight` and perhaps `bias` of a scalar head.
        write_more: writes other files into the folder that it is given, such as a tokenizer.

    Raises:
        ValueError: a tensor is empty, all zero or not finite, or does not read back equal.
    """
    given = {**state, **{HEAD_PREFIX + name: tensor for name, tensor in (head or {}).items()}}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in given.items()}
    check_tensors(tensors, str(folder))
    # Names by which PEFT finds the adapted layers in any model class, with a head or without.
    adapted = {name.split(".")[-3] for name in state}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=sorted(
            adapted if lora.target_modules == "all-linear" else lora.target_modules
        ),
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=["score"] if head else None,
        base_model_name_or_path=str(info["base"]),
        bias="none",
        inference_mode=True,
    )
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(beside))
    write_json(beside / INFO, dict(info))
    if write_more is not None:
        write_more(beside)
    with safe_open(beside / WEIGHTS, framework="pt") as reopened:
        if set(reopened.keys()) != set(tensors):
            raise ValueError(f"{folder}: the adapter did not read back: other tensor names")
        for name, tensor in tensors.items():
            if not torch.equal(reopened.get_tensor(name), tensor):
                raise ValueError(f"{folder}: tensor {name} did not read back equal")
    replace_folder(beside, folder)


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError for a tensor that a broken gather or a dead training run writes."""
    if not tensors:
        raise ValueError(f"{where}: the adapter holds no tensors")
    is_critic = HEAD_PREFIX + "bias" in tensors  # it stays at 0 where all rewards were
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"{where}: tensor {name} is empty (not gathered under ZeRO-3?)")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: tensor {name} holds NaN or infinity")
        if not is_critic and not tensor.any():
            raise ValueError(f"{where}: tensor {name} is all zero: it was never trained")


class _OtherArithmetic(Exception):
    """An adapter that is more, or something else, than W + B A alpha / r."""


def _check_plain(config: Mapping[str, Any]) -> None:
    """Refuses every key of adapter_config.json that differs from plain LoRA, unknown ones too."""
    if config.get("peft_type") != "LORA":
        raise _OtherArithmetic(f"peft_type is {config.get('peft_type')!r}, only LORA is read here")
    targets, heads = config.get("target_modules"), config.get("modules_to_save")
    if isinstance(targets, str):
        raise _OtherArithmetic(
            f"target_modules {targets!r} is a regular expression; list the layers' names instead"
        )
    if heads and not (isinstance(heads, list) and all(each in HEADS for each in heads)):
        raise _OtherArithmetic(f"modules_to_save is {heads!r}, only score is read here")
    plain = LoraConfig().to_dict()
    for key, value in config.items():
        fits = value in STARTS if key == "init_lora_weights" else value == plain.get(key)
        if value and key not in READ and not fits:
            raise _OtherArithmetic(
                f"{key} is {value!r}, which makes it another computation than plain LoRA; merge "
                "the adapter into its base, or train it without"
            )


def load_adapter(folder: Path, plain: bool = False) -> SavedAdapter:
    """The adapter in `folder`, checked: what is built from its config has its tensors' size.

    Args:
        plain: PEFT's own files are enough; without chatllama.json `info` is empty.

    Raises:
        ValueError: a file is missing, cut off, or not an adapter that this project wrote, or not
            as its run wrote it.
    """
    check_adapter(folder)
    config_file = folder / "adapter_config.json"
    plain = plain and not (folder / INFO).is_file()
    for name in (WEIGHTS, config_file.name) if plain else (WEIGHTS, config_file.name, INFO):
        if not (folder / name).is_file():
            pickled = name == WEIGHTS and (folder / "adapter_model.bin").is_file()
            hint = "is this an adapter of a chatllama run?"
            if pickled:
                hint = "adapter_model.bin can run code; save it with safe_serialization=True"
            raise ValueError(f"{folder}: no {name}; {hint}")
    info = {} if plain else read_json(folder / INFO, _InfoFile)
    try:
        _check_plain(read_json(config_file))
        config = read_json(config_file, _AdapterFile)
        names = {key: config[f"lora_{key}"] for key in ("alpha", "dropout")}
        lora = LoraSection(r=config["r"], target_modules=sorted(config["target_modules"]), **names)
    except _OtherArithmetic as error:
        raise ValueError(f"{config_file}: {error}") from None
    except ValidationError as error:  # of LoraSection
        raise ValueError(f"{config_file}: {error.errors()[0]['msg']}") from error
    refuse_pointer(folder / WEIGHTS)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library has several
        raise ValueError(f"{folder}: damaged adapter: {error!r}") from error
    check_tensors(tensors, str(folder))
    names = [name for name in tensors if name.startswith(HEAD_PREFIX)]
    head = {name.removeprefix(HEAD_PREFIX): tensors.pop(name) for name in names}
    _check_shapes(lora, tensors, head, folder)
    return SavedAdapter(lora, tensors, head, info)


def _check_shapes(
    lora: LoraSection, state: Mapping[str, Tensor], head: Mapping[str, Tensor], folder: Path
) -> None:
    """Raises ValueError if the config names other ranks or modules than the weights have.

    PEFT makes what the config names, and does not take back a module that it has wrapped.
    """
    adapted: dict[str, set[str]] = {}
    for name, tensor in state.items():
        part = _PART.fullmatch(name)
        if part is None or tensor.ndim != 2:
            raise ValueError(f"{folder}: tensor {name} of shape {tuple(tensor.shape)} is no LoRA's")
        adapted.setdefault(part[1], set()).add(part[2])
        rank = tensor.shape[0 if part[2] == "A" else 1]
        if rank != lora.r:
            raise ValueError(f"{folder}: adapter_config.json says r {lora.r}, {name} has {rank}")
    if lone := [module for module, parts in adapted.items() if parts != {"A", "B"}]:
        raise ValueError(f"{folder}: {lone[0]} has one of its two matrices only")
    named = {target.split(".")[-1] for target in lora.target_modules}
    there = {module.split(".")[-1] for module in adapted}
    if named != there:
        raise ValueError(
            f"{folder}: adapter_config.json says target_modules {sorted(named)}, the weights have "
            f"{sorted(there)}"
        )
    shapes = {name: tensor.shape for name, tensor in head.items()}
    if head and ("weight" not in head or head["weight"].shape[:-1] != (1,)):
        raise ValueError(f"{folder}: the head has tensors of the shapes {shapes}, not one row")
    if shapes.get("bias", (1,)) != (1,) or shapes.keys() - {"weight", "bias"}:
        raise ValueError(f"{folder}: the head has tensors of the shapes {shapes}")
