"""Rows end to end without padding are what each row is alone."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FORMS, ragged_batch, role_model, tiny_config, tiny_llama
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chatllama.config.model import BackboneSection
from chatllama.model import packed_attention
from chatllama.model.backbone import load_backbone
from chatllama.model.packed_attention import NO_MASK, SDPA, VARLEN, check_attention, registered
from chatllama.model.roles import acting_as, adapter_parameters
from chatllama.model.scoring import hidden_states

LENGTHS = [5, 1, 7, 7, 3]


def as_documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What PyTorch's documentation says of `varlen_attn` with these arguments, on any device."""
    assert query.ndim == key.ndim == value.ndim == 3 and key.shape == value.shape
    assert query.shape[0] == key.shape[0] and query.shape[2] == key.shape[2]
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert window_size[1] == 0 and enable_gqa and query.shape[1] % key.shape[1] == 0
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    bounds = cu_seq_q.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == len(query) and max(lengths) == max_q == max_k
    group = query.shape[1] // key.shape[1]
    outputs = []
    for start, length in zip(bounds, lengths, strict=False):
        q, k, v = (x[start : start + length] for x in (query, key, value))
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if window_size[0] >= 0:
            hidden |= torch.ones(length, length, dtype=torch.bool).tril(-1 - window_size[0])
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, v))
    return torch.cat(outputs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model of PyTorch's function stands in its place; tokens of each call."""
    seen: list[int] = []

    def called(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(query))
        return as_documented(query, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", called)
    return seen


EVERY = [
    (form, attention)
    for form in FORMS
    for attention in ("sdpa", "varlen", "eager")
    if attention != "eager" or "window" not in form  # refused
]


@pytest.mark.parametrize(("form", "attention"), EVERY)
def test_each_row_is_what_it_is_alone(form: str, attention: str, calls: list[int]):
    model = role_model(tiny_llama(form=form))
    model.llama.set_attn_implementation(registered(attention))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]
    tokens, mask = torch.full((5, 9), 7), torch.zeros(5, 9, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, (4, 0, 1, 2, 3), strict=True)):
        tokens[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    with torch.no_grad(), acting_as(model, "policy"):
        states = hidden_states(model, "policy", tokens, mask, mask)
        assert len(states) == sum(LENGTHS)
        for row, found in zip(rows, states.split(LENGTHS), strict=True):
            alone = model.llama.model(row[None]).last_hidden_state[0]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
        # One call in each of two layers for all rows, and none for a row alone.
        assert calls == ([sum(LENGTHS)] * 2 if attention == "varlen" else [])
        garbage = torch.where(mask, tokens, 50)
        assert torch.equal(hidden_states(model, "policy", garbage, mask, mask), states)


@pytest.mark.parametrize(("form", "attention"), EVERY)
@pytest.mark.parametrize("padded", [True, False])
def test_states_that_are_wanted_are_those_of_the_whole(
    form: str, attention: str, padded: bool, calls: list[int]
):
    model, batch = role_model(tiny_llama(form=form)).train(), ragged_batch()
    model.llama.set_attn_implementation(registered(attention))
    mask = batch.mask if padded else torch.ones_like(batch.mask)
    wanted = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.4)
    wanted[1] = False
    assert 0 < wanted[0].sum() < mask[0].sum()
    with acting_as(model, "policy"):
        alone = [
            model.llama.model(row[real][None]).last_hidden_state[0][chosen[real]]
            for row, real, chosen in zip(batch.tokens, mask, wanted, strict=True)
        ]
    found, whole = hidden_states(model, "policy", batch.tokens, mask, wanted), torch.cat(alone)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for states in (found, whole):
        loss = (states * weights).sum()
        gradients.append(torch.autograd.grad(loss, adapter_parameters(model, "policy")))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)  # up to 100


def test_a_row_without_tokens_is_left_out():
    model, batch = role_model(tiny_llama()), ragged_batch()
    mask = batch.mask.clone()
    mask[1] = False
    with torch.no_grad():
        states = hidden_states(model, "policy", batch.tokens, mask, mask)
        whole = hidden_states(model, "policy", batch.tokens, batch.mask, batch.mask)
    torch.testing.assert_close(states, whole[mask[batch.mask]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_recomputed_rows_are_still_apart(attention: str, calls: list[int]):
    batch, gradients = ragged_batch(), []
    wanted = batch.mask & (torch.arange(batch.mask.shape[1]) > 8)
    for checkpointing in (False, True):
        model = role_model(tiny_llama()).train()
        model.llama.set_attn_implementation(registered(attention))
        if checkpointing:
            model.enable_gradient_checkpointing()
        states = hidden_states(model, "policy", batch.tokens, batch.mask, wanted)
        states.square().sum().backward()
        gradients.append([p.grad for p in adapter_parameters(model, "policy")])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and torch.equal(plain, recomputed)


def test_gradients_of_one_call_are_those_of_one_call_per_row(calls: list[int]):
    batch, gradients = ragged_batch(), []
    for attention in ("sdpa", "varlen"):
        model = role_model(tiny_llama())
        model.llama.set_attn_implementation(registered(attention))
        states = hidden_states(model, "policy", batch.tokens, batch.mask, batch.mask)
        states.square().sum().backward()
        gradients.append([p.grad for p in adapter_parameters(model, "policy")])
    assert len(calls) == 2
    for rows, at_once in zip(*gradients, strict=True):
        torch.testing.assert_close(at_once, rows, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_pytorchs_own_function_agrees_on_a_gpu():
    batch, found = ragged_batch(), []
    check_attention("varlen", tiny_config())
    for attention in ("sdpa", "varlen"):
        model = role_model(tiny_llama(dtype=torch.bfloat16)).to("cuda")
        model.llama.set_attn_implementation(registered(attention))
        states = hidden_states(model, "policy", batch.tokens, batch.mask, batch.mask)
        states.float().square().sum().backward()
        gradients = [p.grad for p in adapter_parameters(model, "policy")]
        found.append([states.detach(), *gradients])
    for rows, at_once in zip(*found, strict=True):
        assert (at_once - rows).norm() < 0.03 * rows.norm()  # bfloat16 has 8 bits


def test_varlen_is_sdpa_where_nothing_is_packed(calls: list[int]):
    tokens, mask = ragged_batch().tokens, ragged_batch().mask
    own, other = tiny_llama(), tiny_llama()
    other.set_attn_implementation(registered("varlen"))
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask.long()}):
            expected = own.model(tokens, use_cache=False, **given).last_hidden_state
            assert torch.equal(other.model(tokens, **given).last_hidden_state, expected)
    assert calls == []


@pytest.mark.parametrize(
    ("machine", "model", "reason"),
    [
        ({"device": "cpu"}, {}, "varlen needs a CUDA GPU, and this process sees none;"),
        ({"capability": (7, 5)}, {}, "needs a GPU of the Ampere generation or later, not Old One"),
        ({}, {"head_dim": 12}, "a multiple of 8 and at most 256 numbers; this model's have 12"),
        ({}, {"head_dim": 512}, "this model's have 512"),
        ({}, {"attention_dropout": 0.1}, "has no dropout"),
        ({"function": lambda query: query}, {}, f"needs a newer torch than {torch.__version__}"),
        ({}, {}, None),
    ],
)
def test_where_varlen_cannot_work_it_is_refused(
    machine: dict[str, Any],
    model: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
):
    where = torch.device(machine.get("device", "cuda"))
    monkeypatch.setattr(packed_attention, "device", lambda: where)
    capability = machine.get("capability", (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old One")
    if "function" in machine:
        monkeypatch.setattr(varlen, "varlen_attn", machine["function"])
    llama = tiny_config()
    for key, value in model.items():
        setattr(llama, key, value)
    if reason is None:
        check_attention("varlen", llama)
    else:
        with pytest.raises(ValueError, match=re.escape(reason)):
            check_attention("varlen", llama)


def test_a_backbone_takes_varlen_only_where_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_llama().save_pretrained(tmp_path)
    section = BackboneSection(path=str(tmp_path), attn_implementation="varlen")
    monkeypatch.setattr(packed_attention, "device", lambda: torch.device("cpu"))
    with pytest.raises(ValueError, match=r"backbone\.attn_implementation: varlen needs a CUDA"):
        load_backbone(section, str(tmp_path))
    monkeypatch.setattr(packed_attention, "_why_not_varlen", lambda llama: None)
    loaded = load_backbone(section, str(tmp_path))
    assert loaded.config._attn_implementation == VARLEN
    with pytest.raises(ValueError, match="varlen computes in bfloat16, not in dtype float32"):
        BackboneSection(path="p", attn_implementation="varlen", dtype="float32")


def test_packed_rows_of_equal_length_are_those_of_a_plain_batch():
    llama, tokens = tiny_llama(), ragged_batch().tokens
    llama.set_attn_implementation(registered("sdpa"))
    with torch.no_grad():
        whole = llama.model(tokens).last_hidden_state
        rows = [tokens.shape[1]] * len(tokens)
        positions = torch.arange(tokens.shape[1]).repeat(len(tokens))[None]
        packed = llama.model(
            tokens.reshape(1, -1),
            position_ids=positions,
            attention_mask=NO_MASK,
            row_lengths=rows,
            use_cache=False,
        ).last_hidden_state
    torch.testing.assert_close(packed.view_as(whole), whole, rtol=0, atol=1e-5)


def test_building_leaves_transformers_registry_and_saved_configs_alone(tmp_path: Path):
    registries = (AttentionInterface, AttentionMaskInterface)
    before = [{k: v for k, v in each().items() if k not in (SDPA, VARLEN)} for each in registries]
    assert all("sdpa" in each for each in before)
    tiny_llama().save_pretrained(tmp_path / "base")
    section = BackboneSection(path=str(tmp_path / "base"), dtype="float32")
    for _ in range(2):  # a second run in the same process
        load_backbone(section, str(tmp_path / "base")).save_pretrained(tmp_path / "saved")
        assert role_model(tiny_llama()).llama.config._attn_implementation == SDPA
    for registry, entries in zip(registries, before, strict=True):
        after = dict(registry().items())
        assert {key: after[key] for key in entries} == entries
        assert after.keys() - entries.keys() == {SDPA, VARLEN}
    assert before[0]["sdpa"] is sdpa_attention_forward
    assert "chatllama" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config._attn_implementation == "sdpa"
