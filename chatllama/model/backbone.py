"""Loads the LLaMA that all roles share, with its kernels and quantisation.

Safe loading only: safetensors, no pickles, no remote code unless the user allows it. Training one
from text (`backbone.from_scratch`) is in trainers/sft/pretrain.py.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from chatllama.config.model import CODE_NOT_RUN, BackboneSection
from chatllama.model.families import family_class, family_of
from chatllama.model.llama_config import check_model_folder, check_trainable, check_weights
from chatllama.model.packed_attention import check_attention, registered
from chatllama.model.weight_files import local_folder
from chatllama.runtime.distributed import device, rank
from chatllama.runtime.products import CPU_FLAGS, use_onednn
from chatllama.runtime.waiting import now_doing

NF4_BLOCK = 64
"""Weights that share a scale."""


def load_backbone(
    section: BackboneSection, path: str, dtype: torch.dtype | None = None
) -> LlamaForCausalLM:
    """The causal LLaMA at `path`, frozen, in eval mode, on this process's device or partitioned.

    The weights go there from the files, one tensor at a time: nothing is held in between, where
    every rank of a machine would hold it.

    `dtype` overrides that of the section: full fine-tuning trains float32 weights.

    Raises:
        ValueError: another family, damaged files, no safetensors weights, or others than
            config.json describes, or a kernel that does not work here.
    """
    now_doing(f"loading {path}")
    folder, trusted = backbone_folder(section, path), section.trust_remote_code
    config = read_config(path, folder, trusted)
    check_kernels(section, config)
    _warn_of_slow_bfloat16(dtype or getattr(torch, section.dtype))
    with _naming_the_key():
        if not (trusted and "auto_map" in vars(config)):  # own code may have other tensors
            check_weights(config, folder)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name below
            dtype=dtype or getattr(torch, section.dtype),
            attn_implementation=registered(section.attn_implementation),
            use_safetensors=True,
            trust_remote_code=trusted,
            **_placement(),
            **_quantized(section, config, dtype),
        )
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, SafetensorError,
            TypeError, ValueError) as error:  # fmt: skip
        raise ValueError(_load_failure(section, path, error)) from error
    model, report = cast(tuple[LlamaForCausalLM, dict], loaded)
    _check_report(report, path)
    model.requires_grad_(False)
    _keep_frequencies(model)
    if not is_deepspeed_zero3_enabled():  # its own products keep no whole weights for backward
        use_onednn(model)
    if section.liger_kernel:
        use_liger(model)
    if section.quantization == "nf4":
        _keep_4bit_layout(model)
    if section.quantization != "none" and rank() == 0:
        memory = f"{section.quantization}, {megabytes(weight_bytes(model))} of weights"
        print(f"backbone: {memory}", file=sys.stderr)  # answers go to stdout
    return model.eval()


def backbone_folder(section: BackboneSection, path: str) -> Path:
    """The folder of the model at a path, or of a hub id, which is downloaded if it is not there.

    Raises:
        ValueError: there is no such model, or what is there is none.
    """
    revision = section.revision if path == section.path else None
    with _naming_the_key():
        folder = local_folder(path, revision, section.trust_remote_code)
        check_model_folder(folder)
    return folder


def _keep_frequencies(model: LlamaForCausalLM) -> None:
    """Keeps dynamic scaling from looking at lengths, and says on rank 0 where texts end.

    It scales beyond max_position_embeddings alone, and by the longest text of a batch: a token's
    state would depend on other rows, and cached keys would not fit later ones.
    """
    rotary: Any = model.model.rotary_emb
    if rotary.rope_type != "dynamic":
        return
    rotary.rope_type = "default"
    if rank() == 0:
        positions = model.config.max_position_embeddings
        print(
            f"backbone: its dynamic rope scaling begins beyond {positions} tokens: longer texts "
            "are refused or cut",
            file=sys.stderr,
        )


@contextmanager
def _naming_the_key() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"backbone.path: {error}") from error


def _check_report(report: dict[str, Any], path: str) -> None:
    """Raises ValueError for tensors that did not fit, of a model that brings code of its own."""
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"backbone.path: {path!r}: {name} has shape {tuple(found)}, but by config.json it "
            f"should have {tuple(expected)}: they do not belong together"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"backbone.path: {path!r} lacks {len(missing)} of the model's tensors, such as "
            f"{missing[0]}; they would be random numbers"
        )


def _warn_of_slow_bfloat16(dtype: torch.dtype) -> None:
    """Says on rank 0 that bfloat16 is emulated, where Linux lists no instruction for it."""
    if dtype != torch.bfloat16 or device().type != "cpu" or rank() or not CPU_FLAGS.is_file():
        return
    if "bf16" not in CPU_FLAGS.read_text(errors="replace"):
        print(
            "backbone.dtype: this CPU has no bfloat16 instructions; float32 is much faster",
            file=sys.stderr,
        )


def _placement() -> dict[str, Any]:
    """Arguments with which `from_pretrained` reads onto the GPU; ZeRO-3 places weights itself."""
    if device().type == "cpu" or is_deepspeed_zero3_enabled():
        return {}
    return {"device_map": {"": device()}}


def read_config(path: str, folder: Path, trusted: bool) -> LlamaConfig:
    """The config in a model's folder; ValueError if it is of no model that is trained here."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        family_of(config)
    except Exception as error:  # of a stranger's file
        if "trust_remote_code" in str(error):
            reason = CODE_NOT_RUN
        elif not (folder / "config.json").is_file():
            reason = "there is no config.json"
        else:
            reason = f"config.json: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"backbone.path: {path!r} cannot be loaded: {reason}") from error
    check_trainable(path, vars(config))
    return cast(LlamaConfig, config)


def _load_failure(section: BackboneSection, path: str, error: Exception) -> str:
    """Message for weights that do not load."""
    reason = _first_line(error)
    if isinstance(error, ImportError):  # attention from a package of its own
        return (
            f"backbone.attn_implementation: {section.attn_implementation} does not work here. "
            f"{reason} Install flash-attn (CUDA only) or choose sdpa"
        )
    if isinstance(error, SafetensorError):
        return f"backbone.path: damaged weights in {path!r}: {reason}"
    if isinstance(error, OSError):
        return (
            f"backbone.path: {path!r} holds no safetensors weights (pickled checkpoints are not "
            f"loaded). {reason}"
        )
    return f"backbone.path: {path!r} cannot be loaded: {type(error).__name__}: {reason}"


def _quantized(
    section: BackboneSection, llama: LlamaConfig, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Arguments with which `from_pretrained` quantises while it loads; ValueError if it cannot."""
    if section.quantization == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"backbone.quantization {section.quantization} needs the extra: pip install "
            "'chatllama[bitsandbytes]'"
        )
    narrow = [w for w in (llama.hidden_size, llama.intermediate_size) if w % NF4_BLOCK]
    if section.quantization == "nf4" and device().type == "cpu" and narrow:
        raise ValueError(
            f"backbone.quantization nf4: on the CPU bitsandbytes computes wrongly in layers whose "
            f"width is no multiple of {NF4_BLOCK}, and this model has {narrow[0]}; use int8"
        )
    if section.quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or getattr(torch, section.dtype),
        )
    return {"quantization_config": config, "device_map": {"": device()}}  # also on the CPU


def _keep_4bit_layout(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for the CPU's AVX512-BF16 when they sample.

    The repacked layers round their scales and cut the gradient: training would differ from
    sampling, and layers below them would not learn.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            vars(module)["support_avx512bf16_for_cpu"] = False


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, as they lie in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def megabytes(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


ACTIVATIONS = ("silu", "swish")
"""Names of the activation that Liger's SwiGLU computes, whatever the model's config says."""


def check_kernels(section: BackboneSection, llama: LlamaConfig) -> None:
    """Raises ValueError if a kernel of the section does not work on this machine or this model."""
    check_attention(section.attn_implementation, llama)
    if section.attn_implementation == "flash_attention_2" and section.dtype == "float32":
        raise ValueError(
            "backbone.attn_implementation: flash_attention_2 computes in 16 bits, not in float32; "
            "choose sdpa"
        )
    if section.dtype == "bfloat16" and device().type == "cuda" and rank() == 0:
        _warn_of_old_gpus()
    if not section.liger_kernel:
        return
    # Triton's interpreter is slow and exact: for tests.
    if device().type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backbone.liger_kernel: Liger's kernels need a CUDA GPU, and this process sees none; "
            "set it to false (the results are the same but for rounding)"
        )
    if llama.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"backbone.liger_kernel: Liger's SwiGLU computes silu, and this model has hidden_act "
            f"{llama.hidden_act!r}; set it to false"
        )
    _liger(llama)


def _warn_of_old_gpus() -> None:
    capability = torch.cuda.get_device_capability(device())
    if capability < (8, 0):
        print(
            f"warning: backbone.dtype bfloat16: {torch.cuda.get_device_name(device())} has compute "
            f"capability {capability[0]}.{capability[1]}; bfloat16 came with 8.0 and is many times "
            "slower than float32 there. Use float32 (for inference --dtype float16)",
            file=sys.stderr,
        )


def use_liger(llama: LlamaForCausalLM) -> None:
    """Makes a loaded model compute with Liger's kernels, before adapters are attached.

    Its weights stay as they are, and so do all other models of the process.

    Raises:
        ValueError: a model with code of its own.
    """
    plain = family_class(llama.config, "ForCausalLM")
    if type(llama) is not plain:
        raise ValueError(
            f"backbone.liger_kernel: Liger's kernels are for {plain.__name__} of transformers, not "
            f"for {type(llama).__name__} of {type(llama).__module__}; set it to false"
        )
    patch, rotary = _liger(llama.config)
    attention = attention_with(rotary, family_class(llama.config, "Attention"))
    names = vars(sys.modules[plain.__module__])
    before = dict(names)
    others = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    # Liger's `rope=True` would replace transformers' function for every model of the process.
    patch(rope=False, rms_norm=True, swiglu=True, model=llama, **others)
    names.update(before)  # its norm and MLP, for models that are built later
    for layer in llama.model.layers:
        cast(Any, layer.self_attn).__class__ = attention


def attention_with(rotary: Callable[..., Any], attention: type[Any]) -> type[Any]:
    """An attention layer with another rotary embedding; the two have the same arguments."""
    forward = cast(FunctionType, inspect.unwrap(attention.forward))
    assert "apply_rotary_pos_emb" in forward.__code__.co_names
    names = forward.__globals__ | {"apply_rotary_pos_emb": rotary}
    own = FunctionType(forward.__code__, names, "forward", forward.__defaults__)
    return type("LigerAttention", (attention,), {"forward": own})


def _liger(llama: LlamaConfig) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Liger's function that changes a model of this family, and its rotary embedding."""
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        raise ValueError("backbone.liger_kernel needs the extra: pip install 'chatllama[liger]'")
    try:
        import liger_kernel.transformers as liger  # pyright: ignore[reportMissingImports]
        from liger_kernel.transformers.rope import liger_rotary_pos_emb  # pyright: ignore[reportMissingImports]

        patch = getattr(liger, f"apply_liger_kernel_to_{family_of(llama).name}")
    except (AttributeError, ImportError) as error:  # it does not support this transformers
        raise ValueError(
            f"backbone.liger_kernel: liger-kernel cannot be used: {error}. The version in "
            "constraints.txt can: pip install -c constraints.txt 'chatllama[liger]'"
        ) from error
    return patch, liger_rotary_pos_emb
