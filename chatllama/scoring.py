"""What the roles say about sequences: log-probabilities, values and rewards.

Everything here runs the model once and returns numbers; nothing trains, samples or writes files.

Shapes: B sequences, P prompt, R response, T = P + R, H hidden. Tokens are laid out as left-padded
prompts followed by right-padded responses, so response token t stands in column P + t.
"""

from dataclasses import dataclass

import torch

from chatllama.chosen_tokens import chosen_logprobs
from chatllama.roles import Role, RoleModel, acting_as, autocast


def hidden_states(
    model: RoleModel, role: Role, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Last hidden states of `role`: (B, T, H) in the backbone's type.

    Args:
        model: holds the role.
        role: whose adapter computes.
        tokens: (B, T) int64.
        mask: (B, T) bool, True at real tokens; padding may stand on either side.
    """
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with acting_as(model, role), autocast(model):
        output = model.llama.model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=False,
        )
    return output.last_hidden_state


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
    response_length = response_mask.shape[1]
    hidden = hidden_states(model, role, tokens, mask)[:, -response_length - 1 : -1]
    chosen = hidden[response_mask]
    targets = tokens[:, -response_length:][response_mask]
    with acting_as(model, role), autocast(model):
        head = model.llama.lm_head
        logprobs, entropy = chosen_logprobs(head, chosen, targets, temperature)
    zeros = torch.zeros(response_mask.shape, device=tokens.device)
    return TokenScores(
        logprobs=zeros.masked_scatter(response_mask, logprobs),
        entropy=zeros.masked_scatter(response_mask, entropy),
    )


def response_values(
    model: RoleModel, tokens: torch.Tensor, mask: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """Values of the states BEFORE each response token: (B, R) float32, 0 outside the mask."""
    response_length = response_mask.shape[1]
    hidden = hidden_states(model, "value", tokens, mask)[:, -response_length - 1 : -1]
    values = model.heads["value"](hidden[response_mask])
    zeros = torch.zeros(response_mask.shape, device=tokens.device)
    return zeros.masked_scatter(response_mask, values)


def policy_and_value(
    model: RoleModel,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
) -> tuple[TokenScores, torch.Tensor | None]:
    """Policy log-probabilities and values in one call.

    Values are None where the model holds no value head (advantages without a critic).
    """
    scores = response_logprobs(model, "policy", tokens, mask, response_mask, temperature)
    if "value" not in model.heads:
        return scores, None
    return scores, response_values(model, tokens, mask, response_mask)


def policy_value_and_text(
    model: RoleModel,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
    text: torch.Tensor,
    text_mask: torch.Tensor,
    text_trains: torch.Tensor,
) -> tuple[TokenScores, torch.Tensor | None, torch.Tensor]:
    """`policy_and_value`, and the sum () of the policy's log-probabilities of other text.

    In one call because ZeRO wants one forward pass per backward pass.

    Args:
        model: as for `policy_and_value`, like the next four.
        tokens: of the rollout.
        mask: of the rollout.
        response_mask: of the rollout.
        temperature: of the rollout; the text is scored at 1.
        text: (N, L) int64, padded on the right.
        text_mask: (N, L) bool, real tokens.
        text_trains: (N, L) bool, tokens that count as predictions.
    """
    scores, values = policy_and_value(model, tokens, mask, response_mask, temperature)
    # Every token but the first is a response to those before it.
    predicted = response_logprobs(model, "policy", text, text_mask, text_trains[:, 1:], 1.0)
    return scores, values, predicted.logprobs.sum()


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
