"""What SFT trains, and how its result is written: an adapter or a whole model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.model.adapters import check_tensors, save_adapter
from chatllama.model.backbone import load_backbone
from chatllama.model.lora import merge_products
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import INFO, RunFolder, backbone_path
from chatllama.runtime import distributed
from chatllama.runtime.files import replace_folder, write_json
from chatllama.text.tokenizer import save_tokenizer
from trainers.engine.engine import gathered, partitioned_loading


def build_policy(cfg: Config, run: RunFolder) -> LlamaForCausalLM | RoleModel:
    """What SFT trains: the backbone with a new policy adapter, or with `lora: null` all weights."""
    path = backbone_path(cfg.backbone, run)
    dtype = cfg.backbone.dtype if cfg.lora is not None else "float32"
    with partitioned_loading(cfg.deepspeed, dtype):
        llama = load_backbone(cfg.backbone, path, getattr(torch, dtype))
    if cfg.lora is None:
        llama.requires_grad_(True)
        if cfg.backbone.gradient_checkpointing:
            llama.activation_checkpointing_enable({"use_reentrant": False})
        return llama
    torch.manual_seed(cfg.seed)
    model = RoleModel(llama, {"policy": Adapter(cfg.lora, trainable=True)}, dropout=True)
    merge_products(model)
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def export_sft(
    cfg: Config,
    run: RunFolder,
    model: LlamaForCausalLM | RoleModel,
    tokenizer: PreTrainedTokenizerFast,
    info: Mapping[str, object],
) -> None:
    """Writes RUN/sft/adapter, or with `lora: null` the plain Hugging Face folder RUN/sft/model.

    Args:
        cfg: gives the adapter's shape.
        run: receives the folder.
        model: trained.
        tokenizer: saved beside a whole model.
        info: from `stage.adapter_info`.
    """
    if isinstance(model, RoleModel):
        parameters: Sequence[torch.nn.Parameter] = adapter_parameters(model, "policy")
    else:
        parameters = list(model.parameters())
    with gathered(parameters):
        if distributed.rank() == 0:
            if isinstance(model, RoleModel):
                assert cfg.lora is not None
                save_adapter(run.sft_adapter, adapter_state(model, "policy"), cfg.lora, info)
            else:
                save_model(run.full_model, model, tokenizer, info)
    distributed.barrier()


def save_model(
    folder: Path,
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    info: Mapping[str, object],
) -> None:
    """Replaces `folder` by a plain Hugging Face folder (float32), complete, or leaves it as it was.

    Args:
        folder: where `from_pretrained` will read.
        llama: its parameters whole (gathered under ZeRO-3).
        tokenizer: saved beside the weights.
        info: what chatllama.json will say.

    Raises:
        ValueError: a tensor is empty, all zero or not finite.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    llama.save_pretrained(beside)
    save_tokenizer(tokenizer, beside)
    write_json(beside / INFO, dict(info))
    for file in sorted(beside.glob("*.safetensors")):
        check_tensors(load_file(file), str(file))
    replace_folder(beside, folder)
