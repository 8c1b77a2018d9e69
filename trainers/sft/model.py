"""What SFT trains, and how its result is written: an adapter or a whole model."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from chatllama.config.batch_sizes import microbatches_per_step
from chatllama.config.schema import Config
from chatllama.exporting.templates import write_tokenizer
from chatllama.model.adapters import check_tensors, save_adapter
from chatllama.model.backbone import load_backbone
from chatllama.model.lm_head import TokenLoss, token_loss
from chatllama.model.roles import Adapter, RoleModel, acting_as, adapter_parameters, adapter_state
from chatllama.model.weight_files import MAX_FILE_BYTES, open_model, write_model
from chatllama.runs.folder import INFO, RunFolder, backbone_path
from chatllama.runtime import distributed
from chatllama.runtime.files import replace_folder, write_json
from chatllama.text.tokenizer import save_tokenizer
from trainers.engine.engine import Engine, ParameterGroup, gathered
from trainers.engine.sharded_state import whole_shape
from trainers.engine.start import partitioned_loading
from trainers.sft.data import IGNORED


def build_policy(cfg: Config, run: RunFolder) -> RoleModel:
    """What SFT trains: the backbone's new policy adapter, or with `lora: null` all its weights."""
    path = backbone_path(cfg.backbone, run)
    dtype = cfg.backbone.dtype if cfg.lora is not None else "float32"
    with partitioned_loading(cfg.deepspeed, dtype):
        llama = load_backbone(cfg.backbone, path, getattr(torch, dtype))
    torch.manual_seed(cfg.seed)
    adapters = {} if cfg.lora is None else {"policy": Adapter(cfg.lora, trainable=True)}
    model = RoleModel(llama, adapters, dropout=True)
    if cfg.lora is None:
        llama.requires_grad_(True)
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def build_engine(cfg: Config, model: RoleModel) -> Engine:
    """The optimiser over all trained parameters; norms and biases, the vectors, do not decay."""
    section = cfg.sft
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(whole_shape(p)) > 1]
    vectors = [p for p in trained if len(whole_shape(p)) == 1]
    groups = [ParameterGroup("matrices", matrices, section.learning_rate)]
    if vectors:
        groups.append(ParameterGroup("vectors", vectors, section.learning_rate, decays=False))
    accumulation_steps = microbatches_per_step(section, distributed.world_size(), "sft")
    return Engine(model, groups, section, cfg.deepspeed, accumulation_steps)


def token_losses(
    model: RoleModel, batch: Mapping[str, torch.Tensor], use_bfloat16: bool
) -> TokenLoss:
    """Loss and right guesses of a batch's trained tokens; to be run by the engine.

    Autocast is entered here, inside the engine's forward pass: DeepSpeed switches off one that was
    entered outside. The LM head sees trained positions only.

    Args:
        batch: from `RowCollator`.
        use_bfloat16: compute in bfloat16 under autocast.
    """
    inputs, llama = {name: distributed.to_device(x) for name, x in batch.items()}, model.llama
    targets = inputs.pop("labels")[:, 1:]
    trained = targets != IGNORED
    role = "policy" if "policy" in model.adapter_names else "base"
    autocast = torch.autocast(targets.device.type, torch.bfloat16, enabled=use_bfloat16)
    with acting_as(model, role), autocast:
        hidden = llama.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        weight = llama.lm_head.weight  # whole within the head's call

        def loss(states: torch.Tensor) -> TokenLoss:
            return token_loss(states, weight, targets[trained])

        return distributed.call_inside([llama.lm_head], loss, hidden[trained])


def export_sft(
    cfg: Config,
    run: RunFolder,
    model: RoleModel,
    tokenizer: PreTrainedTokenizerFast,
    info: Mapping[str, object],
) -> None:
    """Writes RUN/sft/adapter, or with `lora: null` the plain Hugging Face folder RUN/sft/model.

    Every rank must call.
    """
    if cfg.lora is None:
        save_model(run.full_model, model.llama, tokenizer, info)
    else:
        with gathered(adapter_parameters(model, "policy")):
            if distributed.rank() == 0:
                more = partial(write_tokenizer, tokenizer=tokenizer, chat=cfg.chat)
                state = adapter_state(model, "policy")
                save_adapter(run.sft_adapter, state, cfg.lora, info, write_more=more)
    distributed.barrier()


def save_model(
    folder: Path,
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    info: Mapping[str, object],
) -> None:
    """Replaces `folder` by a plain Hugging Face folder (float32), complete, or leaves it as it was.

    Every rank must call; rank 0 writes. Under ZeRO-3 one tensor at a time is whole.

    Args:
        folder: where `from_pretrained` will read.

    Raises:
        ValueError: a tensor is empty, all zero or not finite.
    """
    weights = dict(llama.named_parameters())  # tied ones once

    def whole(name: str) -> torch.Tensor:
        with gathered([weights[name]]):
            return weights[name].detach().to("cpu", torch.float32, copy=True)

    if distributed.rank() > 0:
        for name in weights:
            with gathered([weights[name]]):
                pass
        return
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _align_special_tokens(llama, tokenizer)
    llama.save_pretrained(beside, state_dict={})  # configs and, of remote models, the code
    save_tokenizer(tokenizer, beside)
    write_json(beside / INFO, dict(info))
    shapes = {name: whole_shape(parameter) for name, parameter in weights.items()}
    write_model(beside, shapes, torch.float32, whole, MAX_FILE_BYTES)
    written = open_model(beside)
    for name in written.shapes:
        check_tensors({name: written.tensor(name)}, str(beside))
    replace_folder(beside, folder)


def _align_special_tokens(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The saved configs name the tokenizer's special tokens, beside others that they list."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        own = getattr(tokenizer, name)
        for config in (llama.config, llama.generation_config):
            known = getattr(config, name)
            if own not in (known if isinstance(known, list) else [known]):
                setattr(config, name, own)
