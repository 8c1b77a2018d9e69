"""A tokenizer and a small LLaMA made from plain text, for runs that start from nothing.

The LLaMA trains on every token, as SFT does. It ends as a plain Hugging Face folder,
RUN/backbone, which everything after treats like any other backbone.
"""

import shutil
import time
from typing import cast

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from chatllama.config.model import FromScratch
from chatllama.config.schema import Config, DeepSpeedSection
from chatllama.config.stages import SftSection
from chatllama.model.backbone import check_kernels, use_liger
from chatllama.model.packed_attention import registered
from chatllama.model.roles import RoleModel
from chatllama.runs.folder import INFO, RunFolder
from chatllama.runs.replicas import replicate_folder
from chatllama.runtime import distributed
from chatllama.runtime.json_files import held_to_be_whole, read_json
from chatllama.text.tokenizer import load_tokenizer, train_tokenizer
from data.mixture import load_mixture
from data.tokenize import tokenize_text
from trainers.sft.data import arrange_rows
from trainers.sft.model import build_engine, save_model
from trainers.sft.train import train_sft
from trainers.stages.decisions import backbone_config


def ensure_backbone(cfg: Config, run: RunFolder) -> None:
    """RUN/backbone exists, trained from text, where the config asks for one; else does nothing.

    Its metrics are in RUN/pretraining/sft/metrics.jsonl, its closing numbers in
    RUN/backbone/chatllama.json. It is not resumed: an interrupted one starts again.

    Raises:
        ValueError: the text cannot be read, or does not fill the vocabulary.
    """
    section = cfg.backbone.from_scratch
    if section is None or run.backbone.is_dir():
        return
    started = time.monotonic()
    mixture = load_mixture(section.data, [], 0.0, cfg.seed, "text")
    tokenizer_folder = run.root / ".tokenizer"
    if distributed.rank() == 0:
        print(f"training a backbone from text: {run.backbone}\n{mixture.summary()}", flush=True)
        train_tokenizer(mixture.train["text"], section.vocab_size, tokenizer_folder)
    distributed.barrier()
    replicate_folder(run, tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    documents, _ = tokenize_text(mixture.train, tokenizer, section.max_length)
    as_sft = _as_sft(cfg, section)
    rows = arrange_rows(documents, None, as_sft.sft, cfg.seed)
    llama = _new_llama(cfg, section, tokenizer)
    model = RoleModel(llama, {})
    llama.requires_grad_(True)
    engine = build_engine(as_sft, model)
    pretraining = RunFolder(run.root / "pretraining")
    numbers = train_sft(as_sft, pretraining, rows, engine, tokenizer, False, is_backbone=True)
    info = {"stage": "backbone", "config": backbone_config(cfg), **numbers}
    info["wall_seconds"] = time.monotonic() - started
    save_model(run.backbone, llama, tokenizer, info)
    if distributed.rank() == 0:
        shutil.rmtree(tokenizer_folder)
    elif distributed.leads_node():
        shutil.rmtree(tokenizer_folder, ignore_errors=True)
    distributed.barrier()
    replicate_folder(run, run.backbone)


def backbone_seconds(run: RunFolder) -> dict[str, float]:
    """`backbone_seconds`, the wall time of making RUN/backbone; empty if this run made none."""
    info = run.backbone / INFO
    if not info.is_file():
        return {}
    content = read_json(info)
    with held_to_be_whole(info):
        if content["stage"] != "backbone":
            return {}
        return {"backbone_seconds": float(content["wall_seconds"])}


def _as_sft(cfg: Config, section: FromScratch) -> Config:
    """The config with SFT's defaults and the steps and sizes of `from_scratch` as its SFT.

    ZeRO-3 would only slow a small model down: it becomes ZeRO-2, which offloads at most to the CPU.
    """
    zero = cfg.deepspeed
    if zero.stage == 3:
        offload = "none" if zero.offload_optimizer == "none" else "cpu"
        zero = DeepSpeedSection(stage=2, offload_optimizer=offload)
    sft = SftSection(**section.model_dump(include=SftSection.model_fields.keys() - {"data"}))
    return cfg.model_copy(update={"sft": sft, "deepspeed": zero})


def _new_llama(
    cfg: Config, section: FromScratch, tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """A LLaMA with weights from the seed, float32, embeddings tied (a small model's saving)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_heads,
        num_key_value_heads=section.num_kv_heads,
        max_position_embeddings=section.max_positions,
        tie_word_embeddings=True,
        initializer_range=section.hidden_size**-0.5,  # keeps the scale of signals at any width
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    check_kernels(cfg.backbone, config)
    torch.manual_seed(cfg.seed)
    llama = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=registered(cfg.backbone.attn_implementation),
    )
    if cfg.backbone.liger_kernel:
        use_liger(llama)
    return llama
