"""Kernels for training on a GPU, where the config asks for them: whether they work, and putting in.

Answering goes without. From Liger (https://github.com/linkedin/Liger-Kernel) come RMSNorm, rotary
embedding and SwiGLU, never its cross-entropy: our losses make no table of all logits to begin with
(`chosen_tokens.py`, `trainers/losses.py`).
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from chatllama.config import BackboneSection
from chatllama.distributed import device
from chatllama.packed_attention import check_varlen

ACTIVATIONS = ("silu", "swish")
"""Names of the activation that Liger's SwiGLU computes, whatever the model's config says."""


def check_kernels(section: BackboneSection, llama: LlamaConfig) -> None:
    """Nothing, if the kernels that the section names work on this machine and for this model.

    Raises:
        ValueError: which one does not, and why.
    """
    if section.attn_implementation == "varlen":
        check_varlen(llama)
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
    _liger()


def use_liger(llama: LlamaForCausalLM) -> None:
    """A loaded LLaMA computes with Liger's kernels from now on; its weights stay as they are.

    Before adapters are attached. The rotary embedding is a function that all LLaMAs of the process
    look up by its name, so it changes for every one of them.

    Raises:
        ValueError: a model with code of its own.
    """
    if type(llama) is not LlamaForCausalLM:
        raise ValueError(
            "backbone.liger_kernel: Liger's kernels are for the LLaMA of transformers, not for "
            f"{type(llama).__name__} of {type(llama).__module__}; set it to false"
        )
    names = cast(Any, modeling_llama)
    norm, mlp = names.LlamaRMSNorm, names.LlamaMLP
    _liger()(
        rope=True,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=llama,
    )
    # What is loaded later has them only if it is asked for, too.
    names.LlamaRMSNorm, names.LlamaMLP = norm, mlp


def _liger() -> Callable[..., None]:
    """Liger's function that changes a LLaMA."""
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        raise ValueError("backbone.liger_kernel needs the extra: pip install 'chatllama[liger]'")
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            apply_liger_kernel_to_llama,
        )
    except ImportError as error:  # it does not know this transformers
        raise ValueError(
            f"backbone.liger_kernel: liger-kernel cannot be used: {error}. The version in "
            "constraints.txt can: pip install -c constraints.txt 'chatllama[liger]'"
        ) from error
    return apply_liger_kernel_to_llama
