"""Rows end to end without padding are what each row is alone."""

import pytest
import torch
from core_models import ragged_batch, role_model, tiny_llama

from chatllama.packed_attention import NO_MASK
from chatllama.roles import acting_as, adapter_parameters
from chatllama.scoring import hidden_states

LENGTHS = [5, 1, 7, 7, 3]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_row_is_what_it_is_alone(attention: str):
    model = role_model(tiny_llama())
    model.llama.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]
    tokens, mask = torch.full((5, 9), 7), torch.zeros(5, 9, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, (4, 0, 1, 2, 3), strict=True)):
        tokens[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    with torch.no_grad(), acting_as(model, "policy"):
        states = hidden_states(model, "policy", tokens, mask)
        for i, row in enumerate(rows):
            alone = model.llama.model(row[None]).last_hidden_state[0]
            torch.testing.assert_close(states[i][mask[i]], alone, rtol=0, atol=1e-5)
        assert states[~mask].abs().max() == 0
        garbage = torch.where(mask, tokens, 50)
        assert torch.equal(hidden_states(model, "policy", garbage, mask), states)


def test_a_row_without_tokens_is_left_out():
    model, batch = role_model(tiny_llama()), ragged_batch()
    mask = batch.mask.clone()
    mask[1] = False
    with torch.no_grad():
        states = hidden_states(model, "policy", batch.tokens, mask)
        whole = hidden_states(model, "policy", batch.tokens, batch.mask)
    assert states[1].abs().max() == 0
    torch.testing.assert_close(states[0], whole[0], rtol=0, atol=1e-5)


def test_recomputed_rows_are_still_apart():
    batch, gradients = ragged_batch(), []
    for checkpointing in (False, True):
        model = role_model(tiny_llama()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        hidden_states(model, "policy", batch.tokens, batch.mask).square().sum().backward()
        gradients.append([p.grad for p in adapter_parameters(model, "policy")])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and torch.equal(plain, recomputed)


def test_without_row_lengths_attention_is_transformers_own():
    llama, tokens = tiny_llama(), ragged_batch().tokens
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
