"""Four roles on one backbone: the active adapter and the scalar heads.

The only module with PEFT adapter names. Everything else says `with acting_as(model, role):` or
calls the functions of `scoring.py`. Nothing here trains, samples or writes files.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from chatllama.config.model import LoraSection
from chatllama.model.last_layer import trim_last_layer
from chatllama.model.lora import check_targets, make_layer
from chatllama.model.packed_attention import registered
from chatllama.model.sampling_layers import SamplingLayers, float32_head
from chatllama.runtime.products import is_plain

T = TypeVar("T")
HALF = (torch.bfloat16, torch.float16)
Role = str
"""base, reference, policy, reward, value; further reward adapters have names of their own."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's shape and, if it continues another, its tensors."""

    lora: LoraSection
    state: Mapping[str, Tensor] | None = None
    """PEFT names -> tensors; None: a new adapter, which changes nothing yet (B = 0)."""
    trainable: bool = False


class RoleModel(nn.Module):
    """A frozen LLaMA, one LoRA adapter per role and the scalar heads.

    Args:
        adapters: role -> adapter, in the order in which they are made. A role left out has no
            adapter (`base` always; `reference` after full fine-tuning).
        heads: roles that get a scalar head.
        shared: role -> role whose adapter it uses (value head on the policy's trunk).
        dropout: whether the adapters keep their dropout (SFT and reward training only).

    Raises:
        ValueError: a new adapter names layers that are not there, or one does not fit.
    """

    def __init__(
        self,
        backbone: LlamaForCausalLM,
        adapters: Mapping[Role, Adapter],
        heads: tuple[Role, ...] = (),
        shared: Mapping[Role, Role] | None = None,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.adapter_names: dict[Role, str | None] = {"base": None, "reference": None}
        backbone.requires_grad_(False)
        attention = backbone.config._attn_implementation
        backbone.set_attn_implementation(registered(str(attention)))
        trim_last_layer(backbone)
        self.backbone: LlamaForCausalLM | PeftModel = backbone
        for adapter in adapters.values():
            if adapter.state is None:
                check_targets(backbone, adapter.lora.target_modules)
        for role, adapter in adapters.items():
            self._make_adapter(role, lora_config(adapter.lora, dropout=dropout))
        width = backbone.config.hidden_size
        self.heads = nn.ModuleDict({role: ScalarHead(width, role == "value") for role in heads})
        for role, source in (shared or {}).items():
            self.adapter_names[role] = self.adapter_names[source]
        self._lora_layers = _lora_layers(self.backbone)
        self._sampling: dict[Role, SamplingLayers] = {}
        self.lora = {role: adapter.lora for role, adapter in adapters.items()}
        self.acting: Role = "base"
        """The role whose adapter is active."""
        self.trainable_roles = tuple(r for r, a in adapters.items() if a.trainable)
        for role, adapter in adapters.items():
            if adapter.state is not None:
                _load_state(self, role, adapter.state)
            for parameter in adapter_parameters(self, role):
                parameter.requires_grad_(adapter.trainable)
        trains_head = {r: r in self.trainable_roles or r in (shared or {}) for r in heads}
        for role, head in self.heads.items():
            head.requires_grad_(trains_head[role])
        _activate(self, "base")

    def _make_adapter(self, role: Role, config: LoraConfig) -> None:
        if isinstance(self.backbone, PeftModel):
            self.backbone.add_adapter(role, config)
        else:
            self.backbone = cast(PeftModel, get_peft_model(self.backbone, config, role))
        self.adapter_names[role] = role

    def add(self, role: Role, adapter: Adapter) -> None:
        """Adds a frozen role to a model that is in use.

        Raises:
            ValueError: the adapter does not fit the backbone; nothing has changed then.
        """
        assert role not in self.adapter_names and adapter.state is not None and not self.training
        try:
            self._make_adapter(role, lora_config(adapter.lora))
            self._lora_layers = _lora_layers(self.backbone)
            _load_state(self, role, adapter.state)
        except BaseException:
            self.remove(role)
            raise
        self.lora[role] = adapter.lora
        self.eval().requires_grad_(False)
        _activate(self, self.acting)

    def remove(self, role: Role) -> None:
        """Removes a role that `add` made; its adapter must not be active."""
        assert role != self.acting
        self.adapter_names.pop(role, None)
        self._sampling.pop(role, None)
        self.lora.pop(role, None)
        if isinstance(self.backbone, PeftModel) and role in self.backbone.peft_config:
            self.backbone.delete_adapter(role)
        self._lora_layers = _lora_layers(self.backbone)
        for layer in self._lora_layers:  # PEFT leaves these where it failed half way
            if role in layer.lora_A:
                layer.delete_adapter(role)
        _activate(self, self.acting)

    @property
    def peft_model(self) -> PeftModel:
        """PEFT's model, which holds the adapters; there must be one."""
        assert isinstance(self.backbone, PeftModel)
        return self.backbone

    @property
    def llama(self) -> LlamaForCausalLM:
        """The LLaMA with its adapters in place."""
        if isinstance(self.backbone, PeftModel):
            return cast(LlamaForCausalLM, self.backbone.get_base_model())
        return self.backbone

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory; the recomputation runs under the role of its forward pass."""

        def contexts() -> tuple:
            return nullcontext(), acting_as(self, self.acting)

        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules())
        settings = {
            "use_reentrant": False,
            "context_fn": contexts,
            # Reading the generator's state waits for a GPU at every layer.
            "preserve_rng_state": dropout or bool(self.llama.config.attention_dropout),
        }
        # The older of two names: transformers 5.20, the last for Python 3.10, has no other.
        self.llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def forward(self, function: Callable[..., T], *args: object) -> T:
        """Runs `function(model, *args)` of `scoring.py` inside the engine's forward pass."""
        return function(self, *args)


@contextmanager
def acting_as(model: RoleModel, role: Role) -> Iterator[None]:
    """Makes the role's adapter the active one inside; the one before comes back at the end.

    Only names switch: no parameter's requires_grad changes (that would break ZeRO).

    Raises:
        ValueError: the model holds no such role.
    """
    if role not in model.adapter_names:
        raise ValueError(f"role {role!r} is not loaded; loaded: {sorted(model.adapter_names)}")
    before = model.acting
    _activate(model, role)
    try:
        yield
    finally:
        _activate(model, before)


@contextmanager
def sampling_as(
    model: RoleModel, role: Role, layers: SamplingLayers | None = None
) -> Iterator[None]:
    """As `acting_as` with autocast, for sampling without gradient: no other adapter trains inside.

    A 16-bit model computes with `sampling_layers`, whose copies of the adapter are made at the
    first call, and again at each of a model that trains; or with those that are given. Where
    ZeRO-3 has split the weights, and none are given, it keeps its own layers.
    """
    with acting_as(model, role):
        if model.llama.dtype not in HALF:
            yield
            return
        if layers is None and all(p.numel() for p in model.llama.parameters()):
            layers = sampling_layers(model, role)
        with float32_head(model.llama), layers.in_place() if layers else autocast(model):
            yield


def sampling_layers(model: RoleModel, role: Role) -> SamplingLayers:
    """The role's, up to date; under ZeRO-3 its adapter must be gathered."""
    layers = model._sampling.get(role)
    if layers is None:
        layers = model._sampling[role] = SamplingLayers(model.llama, model.adapter_names[role])
    elif model.trainable_roles:
        layers.refresh()
    return layers


def mergeable(model: RoleModel) -> bool:
    """Whether every adapted matrix is a plain one, neither quantised nor split over ranks."""
    return all(is_plain(x.get_base_layer()) and x.weight.ndim == 2 for x in model._lora_layers)


@contextmanager
def merged_as(model: RoleModel, role: Role) -> Iterator[None]:
    """As `acting_as`, with the adapter's product inside the weights, for inference.

    The model must be `mergeable`. The base is not written to: the sums are a second copy of the
    adapted matrices, and the weights are their old memory again at the end.
    """
    assert mergeable(model)
    originals: list[tuple[nn.Parameter, Tensor]] = []
    with acting_as(model, role):
        name = model.adapter_names[role]
        try:
            for layer in model._lora_layers:
                if name is not None and name in layer.lora_A:
                    weight = cast(nn.Parameter, layer.get_base_layer().weight)
                    up = cast(nn.Linear, layer.lora_B[name]).weight.data
                    down = cast(nn.Linear, layer.lora_A[name]).weight.data
                    merged = weight.data.float() + layer.scaling[name] * (up @ down)
                    originals.append((weight, weight.data))
                    weight.data = merged.to(weight.dtype)
                layer._disable_adapters = True
            yield
        finally:
            for weight, original in originals:
                weight.data = original


def _lora_layers(backbone: LlamaForCausalLM | PeftModel) -> list[LoraLayer]:
    layers: list[LoraLayer] = [m for m in backbone.modules() if isinstance(m, LoraLayer)]
    for layer in layers:  # 16-bit inputs are left as they are: autocast would cast them back
        layer.cast_input_dtype_enabled = False
    return layers


def _activate(model: RoleModel, role: Role) -> None:
    name = model.adapter_names[role]
    for layer in model._lora_layers:
        # PEFT's public set_adapter flips requires_grad; a test pins these private names.
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    model.acting = role


def lora_config(lora: LoraSection, *, dropout: bool = False) -> LoraConfig:
    """The PEFT configuration of an adapter, in memory: plain LoRA, no extras."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout if dropout else 0.0,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        bias="none",
    )
    # An experimental name of PEFT's (pinned by tests/model/test_lora.py).
    config._register_custom_module(cast(Any, {nn.Linear: make_layer}))
    return config


def adapter_parameters(model: RoleModel, role: Role) -> list[nn.Parameter]:
    """Parameters of the role's own adapter, without its head."""
    return list(_named_parameters(model, role).values())


def adapter_state(model: RoleModel, role: Role) -> dict[str, Tensor]:
    """PEFT's names -> tensors of the role's adapter (not copied). Gather first under ZeRO-3."""
    return {name: parameter.detach() for name, parameter in _named_parameters(model, role).items()}


def _named_parameters(model: RoleModel, role: Role) -> dict[str, nn.Parameter]:
    marks = (f".lora_A.{role}.", f".lora_B.{role}.")
    return {
        name.replace(f".{role}.weight", ".weight"): parameter
        for name, parameter in model.backbone.named_parameters()
        if any(mark in name for mark in marks)
    }


def _load_state(model: RoleModel, role: Role, state: Mapping[str, Tensor]) -> None:
    own = adapter_state(model, role)
    if own.keys() != state.keys():
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise ValueError(
            f"adapter for role {role} does not fit the backbone: missing {missing[:3]}, "
            f"not expected {extra[:3]} ({len(missing)} and {len(extra)} in all)"
        )
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"adapter for role {role}: {name} has shape {tuple(tensor.shape)}, "
                f"the backbone needs {tuple(own[name].shape)}"
            )
        own[name].copy_(tensor)


def set_head(model: RoleModel, role: Role, weight: Tensor | None) -> None:
    """Copies a saved weight (1, H), or a scalar, into a role's head; ValueError if none fits."""
    own = cast(ScalarHead, model.heads[role]).weight
    found = None if weight is None else tuple(weight.shape)
    if weight is None or found not in ((), own.shape):
        needs = f"the backbone needs {tuple(own.shape)}"
        raise ValueError(f"adapter for role {role}: its head has shape {found}, {needs}")
    own.data.copy_(weight)


def autocast(model: RoleModel) -> torch.autocast:
    """Matrix products in the backbone's type; adapters and heads themselves stay float32."""
    kind = model.llama.dtype
    half = kind in HALF
    return torch.autocast(model.llama.device.type, kind if half else torch.bfloat16, enabled=half)


class ScalarHead(nn.Linear):
    """One float32 number per position, in any type of backbone.

    Weights start from N(0, 1 / sqrt(H + 1)) (Stiennon 2020; Huang 2024, arXiv 2403.17031). A
    reward head has no bias, so that it loads as the `score` of a classification model.
    """

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__(hidden_size, 1, bias=bias, dtype=torch.float32)
        nn.init.normal_(self.weight, std=(hidden_size + 1) ** -0.5)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Scores of hidden states: (..., H) any float -> (...) float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).squeeze(-1)
