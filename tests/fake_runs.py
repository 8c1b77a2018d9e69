"""The stages' own code on fake tensors: shapes of any size, no arithmetic, no memory.

A fake model lies on a fake CPU. Ids and masks are real, since indexing needs their values.
Attention counts as on a GPU: a fused kernel, of which the result and a number per row are kept.
4-bit matrices are bitsandbytes' own layers, computed by its own functions: it must be installed.
"""

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from kernel_counts import made_fake
from memory_record import MemoryRecord, tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from chatllama.config.schema import Config
from chatllama.generation import decoding_batch
from chatllama.model import lm_head, sampling_layers
from chatllama.model.backbone import _keep_4bit_layout
from chatllama.model.families import family_class
from chatllama.model.roles import Adapter, RoleModel
from data.batches import SharedPromptCollator
from trainers.ppo.model import build_engine as ppo_engine
from trainers.ppo.rollout import arrange, sample_responses, score
from trainers.ppo.update import Targets, Update
from trainers.reward.model import build_engine as reward_engine
from trainers.reward.train import optimizer_step as reward_step
from trainers.sft.data import RowCollator, Rows
from trainers.sft.model import build_engine as sft_engine
from trainers.sft.train import Trained
from trainers.sft.train import optimizer_step as sft_step

GPU_CHUNK = 2**25


@dataclass(frozen=True)
class Measured:
    """Bytes of one stage."""

    resident: int
    """Between steps: weights, adapters, AdamW's moments."""
    peaks: dict[str, int]
    """Phase -> the most that tensors hold during it, the resident ones included."""


def meta_llama(shape: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return family_class(shape, "ForCausalLM")(shape)
    finally:
        torch.set_default_dtype(before)


def fake_model(cfg: Config, shape: LlamaConfig, stage: str) -> RoleModel:
    """The stage's roles, as its `model.py` makes them."""
    full = stage == "sft" and cfg.lora is None
    dtype = torch.float32 if full else getattr(torch, cfg.backbone.dtype)
    llama, lora = meta_llama(shape, dtype), cfg.adapter_lora
    if cfg.backbone.quantization == "nf4":
        pack(llama, dtype)
    trained, frozen = Adapter(lora, trainable=True), Adapter(lora)
    roles: dict[str, Adapter] = {"policy": trained}
    heads: tuple[str, ...] = ()
    if stage == "reward":
        roles, heads = {"reward": trained}, ("reward",)
    elif stage == "ppo":
        roles = {"reference": frozen, "policy": trained, "reward": frozen, "value": trained}
        heads = ("reward", "value")
        if cfg.lora is None:
            del roles["reference"]
        if cfg.ppo.advantage != "gae":
            del roles["value"]
            heads = ("reward",)
    with torch.device("meta"):
        dropout = stage != "ppo"
        model = RoleModel(llama, {} if full else roles, heads=heads, dropout=dropout)
    if full:
        llama.requires_grad_(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made_fake(model)
        describe_packed(model, dtype)
    cast(Any, model).to = lambda place: model  # torch cannot move fake parameters
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def pack(llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Puts 4-bit matrices in the place of the decoder layers', as `from_pretrained` does."""
    bnb: Any = importlib.import_module("bitsandbytes").nn
    settings = {"compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": True}
    for name, layer in list(llama.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            parent, _, own = name.rpartition(".")
            sizes = layer.in_features, layer.out_features
            made = bnb.Linear4bit(*sizes, bias=False, device="meta", **settings)
            made.weight.data = torch.empty(
                (layer.weight.numel() // 2, 1), dtype=torch.uint8, device="meta"
            )
            setattr(llama.model.layers.get_submodule(parent), own, made)
    _keep_4bit_layout(llama)
    vars(llama)["is_loaded_in_4bit"] = True  # PEFT's layers for such matrices


def describe_packed(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Gives 4-bit matrices the scales that belong to them, themselves in 8 bits."""
    for layer in packed(model):
        states: Any = importlib.import_module("bitsandbytes.functional").QuantState
        shape = torch.Size((layer.out_features, layer.in_features))
        blocks = shape.numel() // 64
        second = states(
            torch.empty(-(-blocks // 256)),
            code=torch.empty(256),
            blocksize=256,
            dtype=torch.float32,
        )
        layer.weight.quant_state = states(
            torch.empty(blocks, dtype=torch.uint8),
            shape=shape,
            code=torch.empty(16),
            blocksize=64,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()),
            state2=second,
        )


def packed(model: torch.nn.Module) -> list[Any]:
    """The matrices in 4 bits."""
    return [
        module for module in model.modules() if type(module).__module__.startswith("bitsandbytes")
    ]


def scales_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of all matrices in 4 bits."""
    states = [layer.weight.quant_state for layer in packed(model)]
    return [scales for state in states for scales in (state.absmax, state.state2.absmax)]


def measure(cfg: Config, shape: LlamaConfig, stage: str, chunk: int = GPU_CHUNK) -> Measured:
    """A stage's memory in one process, over optimizer steps of two microbatches of full length.

    Args:
        chunk: float32 logits in memory at a time.
    """
    cfg = _two_microbatches(cfg)
    model = fake_model(cfg, shape, stage)
    record = MemoryRecord([*tensors_of(model), *scales_of(model)])
    measured = {"sft": _sft, "reward": _reward, "ppo": _ppo}[stage]
    with (
        mock.patch.object(lm_head, "CHUNK_ELEMENTS", chunk),
        mock.patch.object(lm_head, "float32_logits", _gpu_logits),
        mock.patch.object(sampling_layers, "float32_logits", _gpu_logits),
        record,
    ):
        return measured(cfg, model, record)


def _gpu_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One tensor, as a GPU's product with float32 sums; the CPU's widens the weights in parts."""
    return hidden.new_empty((*hidden.shape[:-1], len(weight)), dtype=torch.float32)


def extrapolated(cfg: Config, shape: LlamaConfig, stage: str) -> Measured:
    """`measure` of a deep model, from 3 and 4 layers: each of the others adds as much as the last.

    Fake operators take as long as real ones on small tensors; 32 layers would be minutes.
    """
    few: list[Measured] = []
    for layers in (3, 4):
        shallow = LlamaConfig.from_dict(shape.to_dict() | {"num_hidden_layers": layers})
        few.append(measure(cfg, shallow, stage))
    three, four = few
    more = shape.num_hidden_layers - 4
    return Measured(
        four.resident + more * (four.resident - three.resident),
        {name: peak + more * (peak - three.peaks[name]) for name, peak in four.peaks.items()},
    )


def _two_microbatches(cfg: Config) -> Config:
    sft = {"batch_size": 2 * cfg.sft.microbatch_size}
    reward = {"batch_size": 2 * cfg.reward.microbatch_size}
    size = 2 * cfg.ppo.microbatch_size
    ppo = {"rollout_batch_size": size, "minibatch_size": size, "epochs": 1}
    return cfg.model_copy(
        update={
            "sft": cfg.sft.model_copy(update=sft),
            "reward": cfg.reward.model_copy(update=reward),
            "ppo": cfg.ppo.model_copy(update=ppo),
        }
    )


def _sft(cfg: Config, model: RoleModel, record: MemoryRecord) -> Measured:
    section, length = cfg.sft, cfg.sft.max_length
    documents = [length // 2, length - length // 2] if section.packing else [length]
    row = {"input_ids": [5] * length, "labels": [5] * length, "seq_lengths": documents}
    rows: Any = Rows(cast(Any, [row] * section.batch_size * 2), None, 2, 1, {})
    engine = sft_engine(cfg, model)
    low = cfg.backbone.dtype == "bfloat16"
    trained = Trained(section, engine, rows, RowCollator(0), low)
    sft_step(trained, 0, 1.0)
    resident = record.restart()
    sft_step(trained, 1, 1.0)
    return Measured(resident, {"step": record.most})


def _reward(cfg: Config, model: RoleModel, record: MemoryRecord) -> Measured:
    section, length = cfg.reward, cfg.reward.max_length
    half = length // 2  # prompt and both answers do not fit one row: each answer has its own
    pair = {
        "answer_ids": [[5] * length, [6] * length],
        "prompt_length": half,
        "ranks": [0, 1],
        "ratings": [1.0, 0.0],
    }
    rows, batch = [pair] * section.batch_size, list(range(section.batch_size))
    engine, collator = reward_engine(cfg, model), SharedPromptCollator(0, length)
    reward_step(cfg, engine, cast(Any, rows), batch, collator, 1.0)
    resident = record.restart()
    reward_step(cfg, engine, cast(Any, rows), batch, collator, 1.0)
    return Measured(resident, {"step": record.most})


STOP = 5


@contextmanager
def _two_tokens() -> Iterator[None]:
    """Sampling computes on fake logits, and gives every row a token and then the stop token.

    Later steps would allocate nothing more: the cache has its full size from the first on.
    """
    sample, calls = decoding_batch.next_tokens, itertools.count()

    def next_tokens(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        sample(logits, *rest)
        return torch.full((len(logits),), STOP if next(calls) else STOP + 1)

    with mock.patch.object(decoding_batch, "next_tokens", next_tokens):
        yield


def _ppo(cfg: Config, model: RoleModel, record: MemoryRecord) -> Measured:
    section, generation = cfg.ppo, cfg.generation
    engine = ppo_engine(cfg, model)
    count, length = section.rollout_batch_size, generation.max_new_tokens
    prompt = [5] * section.max_prompt_length
    rollout = arrange([prompt] * count, [[5] * length] * count, [], 0)
    zeros = torch.zeros(rollout.response_mask.shape)
    targets = Targets(zeros, zeros, rollout.response_mask)
    prompts = [[STOP + row, *prompt[1:]] for row in range(generation.batch_size)]

    def sample() -> None:
        with _two_tokens():
            sample_responses(engine, "policy", prompts, generation, [STOP], (0,))

    def update() -> None:
        Update(
            engine=engine,
            rollout=rollout,
            targets=targets,
            section=section,
            temperature=1.0,
            step=0,
            seed=0,
            lr_factors=lambda done: dict.fromkeys(engine.trained, 1.0),
            ptx=None,
            after_step=lambda: None,
        ).run()

    sample()
    update()
    resident, peaks = record.restart(), {}
    sample()
    peaks["rollout"] = record.most
    record.restart()
    score(model, rollout, 1.0, section.microbatch_size, ["reward"])
    peaks["scoring"] = record.most
    record.restart()
    update()
    peaks["update"] = record.most
    return Measured(resident, peaks)
