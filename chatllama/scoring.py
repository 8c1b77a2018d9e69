"""What the roles say about sequences: log-probabilities, values and rewards.

Everything here runs the model once and returns numbers; nothing trains, samples or writes files.

Shapes: B sequences, P prompt, R response, T = P + R, H hidden. Tokens are laid out as left-padded
prompts followed by right-padded responses, so response token t stands in column P + t.
"""

from dataclasses import dataclass

import torch

from chatllama.chosen_tokens import chosen_logprobs
from chatllama.packed_attention import packed_rows
from chatllama.roles import Role, RoleModel, acting_as, autocast


def hidden_states(
    model: RoleModel, role: Role, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Last hidden states of `role`: (B, T, H) in the backbone's type.

    Padding is not computed: real tokens go through the layers end to end, and each row sees itself.

    Args:
        model: holds the role.
        role: whose adapter computes.
        tokens: (B, T) int64.
        mask: (B, T) bool, True at real tokens; padding may stand on either side.
    """
    llama, lengths = model.llama.model, mask.sum(1).tolist()
    positions = mask.long().cumsum(1) - 1
    with acting_as(model, role), autocast(model):
        if min(lengths) == tokens.shape[1]:
            return llama(tokens, position_ids=positions, use_cache=False).last_hidden_state
        packed, positions = tokens[mask][None], positions[mask][None]
        attention, filled = llama.config._attn_implementation, [n for n in lengths if n]
        rows = packed_rows(attention, filled, tokens.device)
        states = llama(packed, position_ids=positions, use_cache=False, **rows).last_hidden_state
    padded = states.new_zeros(*tokens.shape, states.shape[-1])
    return padded.index_put(mask.nonzero(as_tuple=True), states[0])


@dataclass(frozen=True)
class TokenScores:
    """What one pass says about the sampled tokens; zeros outside the response mask."""

    logprobs: torch.Tensor
    """(B, R) float32, of the sampled tokens."""
    entropy: torch.Tensor
    """(B, R) float32, nats, without gradient."""


def response_logprobs(
    model: RoleModel,
    role: Role,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
) -> TokenScores:
    """Log-probabilities of the response tokens under softmax(logits / temperature).

    Only response positions go through the LM head, since it is most of a small model's work.

    Args:
        model: holds the role.
        role: whose distribution scores.
        tokens: (B, T) int64.
        mask: (B, T) bool, real tokens.
        response_mask: (B, R) bool, True up to and including the first EOS.
        temperature: the sampling temperature.
    """
    states = _before_responses(model, role, tokens, mask, response_mask)
    return _scores(model, role, states, tokens, response_mask, temperature)


def response_values(
    model: RoleModel, tokens: torch.Tensor, mask: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """Values of the states BEFORE each response token: (B, R) float32, 0 outside the mask."""
    states = _before_responses(model, "value", tokens, mask, response_mask)
    return _laid_out(model.heads["value"](states), response_mask)


def policy_and_value(
    model: RoleModel,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
) -> tuple[TokenScores, torch.Tensor | None]:
    """Policy log-probabilities and values: one pass where both have the same trunk, else two.

    Values are None where the model holds no value head (advantages without a critic).
    """
    states = _before_responses(model, "policy", tokens, mask, response_mask)
    scores = _scores(model, "policy", states, tokens, response_mask, temperature)
    if "value" not in model.heads:
        return scores, None
    if shares_trunk(model):
        return scores, _laid_out(model.heads["value"](states), response_mask)
    return scores, response_values(model, tokens, mask, response_mask)


def shares_trunk(model: RoleModel) -> bool:
    """Whether the value head reads the policy's own hidden states."""
    return model.adapter_names["value"] == model.adapter_names["policy"]


def _before_responses(
    model: RoleModel,
    role: Role,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
) -> torch.Tensor:
    """Hidden states that predict the response tokens, row by row: (N, H)."""
    response_length = response_mask.shape[1]
    hidden = hidden_states(model, role, tokens, mask)[:, -response_length - 1 : -1]
    return hidden[response_mask]


def _scores(
    model: RoleModel,
    role: Role,
    states: torch.Tensor,
    tokens: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
) -> TokenScores:
    targets = tokens[:, -response_mask.shape[1] :][response_mask]
    with acting_as(model, role), autocast(model):
        head = model.llama.lm_head
        logprobs, entropy = chosen_logprobs(head, states, targets, temperature)
    return TokenScores(_laid_out(logprobs, response_mask), _laid_out(entropy, response_mask))


def _laid_out(numbers: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(N,) numbers of the response tokens as (B, R), 0 elsewhere."""
    zeros = torch.zeros(response_mask.shape, device=numbers.device)
    return zeros.masked_scatter(response_mask, numbers)


def last_token_index(mask: torch.Tensor) -> torch.Tensor:
    """Column of each row's last real token: (B,) int64, for padding on either side.

    Args:
        mask: (B, T) bool with at least one True in every row.
    """
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def score_sequences(
    model: RoleModel, tokens: torch.Tensor, mask: torch.Tensor, role: Role = "reward"
) -> torch.Tensor:
    """Reward of whole sequences, read at the last real token: (B,) float32.

    Args:
        model: holds the role and its head.
        tokens: (B, T) int64, prompt and answer with its end-of-turn.
        mask: (B, T) bool, real tokens.
        role: which reward model.
    """
    hidden = hidden_states(model, role, tokens, mask)
    rows = torch.arange(len(tokens), device=tokens.device)
    return model.heads[role](hidden[rows, last_token_index(mask)])
