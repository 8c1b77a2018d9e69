"""The LLaMA that all roles share: where it comes from and how it is loaded.

Safe loading only: safetensors, no pickles, no remote code unless the user allows it. Building one
from text (`backbone.from_scratch`) is training, so it lives in trainers/pretrain.py.
"""

from typing import cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chatllama.config import BackboneSection


def load_backbone(
    section: BackboneSection, path: str, dtype: torch.dtype | None = None
) -> LlamaForCausalLM:
    """The causal LLaMA at `path`, frozen, in eval mode, on the CPU or partitioned under ZeRO-3.

    Args:
        section: type, attention, revision, remote code.
        path: local folder or hub id (`backbone_path` or `base_path`).
        dtype: overrides `section.dtype` (full fine-tuning trains float32 weights).

    Raises:
        ValueError: not a LLaMA, no safetensors weights, or some of them missing.
    """
    revision = section.revision if path == section.path else None
    common = {"revision": revision, "trust_remote_code": section.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **common)
    except OSError as error:
        raise ValueError(
            f"backbone.path: no model at {path!r}. Give a local Hugging Face folder (with "
            f"config.json and model.safetensors) or a hub id. {_first_line(error)}"
        ) from error
    except ValueError as error:  # no known model_type, or code that we do not run
        raise ValueError(f"backbone.path: {path!r} cannot be loaded: {error}") from error
    if not isinstance(config, LlamaConfig):
        raise ValueError(
            f"backbone.path: {path!r} is a {config.model_type!r} model; chatllama trains LLaMAs"
        )
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=dtype or getattr(torch, section.dtype),
            attn_implementation=section.attn_implementation,
            use_safetensors=True,
            **common,
        )
    except OSError as error:
        raise ValueError(
            f"backbone.path: {path!r} holds no safetensors weights (pickled checkpoints are not "
            f"loaded). {_first_line(error)}"
        ) from error
    except ImportError as error:  # attention from a package of its own
        raise ValueError(
            f"backbone.attn_implementation: {section.attn_implementation} does not work here. "
            f"{_first_line(error)} Install flash-attn (CUDA only) or choose sdpa"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"backbone.path: the weights in {path!r} are damaged: {_first_line(error)}"
        ) from error
    model, report = cast(tuple[LlamaForCausalLM, dict], loaded)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"backbone.path: {path!r} lacks {len(missing)} of the model's tensors, such as "
            f"{missing[0]}; they would be random numbers"
        )
    model.requires_grad_(False)
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
