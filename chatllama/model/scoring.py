"""Log-probabilities, values and rewards of sequences, by role.

Everything here runs the model once and returns numbers; nothing trains, samples or writes files.

Shapes: B sequences, P prompt, R response, T = P + R, N real tokens, H hidden. Arguments of one name
are the same everywhere:

    tokens         (B, T) int64; with responses, left-padded prompts and then right-padded
                   responses, so that response token t stands in column P + t
    mask           (B, T) bool, True at real tokens; padding may stand on either side
    response_mask  (B, R) bool, True up to and including the first EOS
    role           whose adapter is active; the model holds it

Pass tokens and masks on the CPU: indexing needs their values and would synchronise the GPU, which
receives real tokens only. Results are on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from chatllama.model.last_layer import Wanted
from chatllama.model.lm_head import token_logprobs
from chatllama.model.packed_attention import SDPA, VARLEN, packed_rows
from chatllama.model.roles import Role, RoleModel, acting_as, autocast
from chatllama.runtime.distributed import to_device


def hidden_states(
    model: RoleModel, role: Role, tokens: Tensor, mask: Tensor, wanted: Tensor
) -> Tensor:
    """Last hidden states where `wanted`, row after row: (N, H) in the backbone's type.

    Padding is not computed: real tokens go through the layers end to end, and each row sees itself.
    With `sdpa` the last layer computes only what is `wanted`: (B, T) bool, True at N real tokens.
    """
    tokens, mask, wanted = tokens.cpu(), mask.cpu(), wanted.cpu()
    llama, lengths = model.llama.model, mask.sum(1).tolist()
    attention = llama.config._attn_implementation
    positions, places = mask.long().cumsum(1) - 1, _places(wanted[mask])
    filled = None
    if min(lengths) < tokens.shape[1]:
        tokens, positions = tokens[mask][None], positions[mask][None]
        filled = [n for n in lengths if n]
    rows = packed_rows(attention, filled)
    if attention == SDPA:
        rows["wanted"] = Wanted(places, wanted.sum(1).tolist(), lengths)
    with acting_as(model, role), autocast(model):
        inputs = {"position_ids": to_device(positions), **rows}
        output = llama(to_device(tokens), use_cache=False, **inputs)
    states = output.last_hidden_state.flatten(0, 1)
    return states if attention == SDPA else states.index_select(0, places)


def _places(mask: Tensor) -> Tensor:
    """Indices at which a flattened mask is True: int64, on the device."""
    return to_device(mask.cpu().flatten().nonzero()[:, 0])


@dataclass(frozen=True)
class TokenScores:
    """Scores of the sampled tokens from one pass; zeros outside the response mask."""

    logprobs: Tensor
    """(B, R) float32, of the sampled tokens."""
    entropy: Tensor
    """(B, R) float32, nats, without gradient."""


def response_logprobs(
    model: RoleModel,
    role: Role,
    tokens: Tensor,
    mask: Tensor,
    response_mask: Tensor,
    temperature: float,
) -> TokenScores:
    """Log-probabilities of the response tokens under softmax(logits / temperature).

    Only response positions go through the LM head, since it is most of a small model's work.
    """
    states = _before_responses(model, role, tokens, mask, response_mask)
    return _scores(model, role, states, tokens, response_mask, temperature)


def response_values(
    model: RoleModel, tokens: Tensor, mask: Tensor, response_mask: Tensor
) -> Tensor:
    """Values of the states BEFORE each response token: (B, R) float32, 0 outside the mask."""
    states = _before_responses(model, "value", tokens, mask, response_mask)
    return _laid_out(model.heads["value"](states), response_mask)


def policy_and_value(
    model: RoleModel, tokens: Tensor, mask: Tensor, response_mask: Tensor, temperature: float
) -> tuple[TokenScores, Tensor | None]:
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
    model: RoleModel, role: Role, tokens: Tensor, mask: Tensor, response_mask: Tensor
) -> Tensor:
    """Hidden states that predict the response tokens, row after row."""
    seen = mask[:, :-1] & mask[:, 1:]  # a row's last token predicts nothing that is read
    predicts = torch.zeros_like(seen)
    predicts[:, -response_mask.shape[1] :] = response_mask
    return hidden_states(model, role, tokens[:, :-1], seen, predicts)


def _scores(
    model: RoleModel,
    role: Role,
    states: Tensor,
    tokens: Tensor,
    response_mask: Tensor,
    temperature: float,
) -> TokenScores:
    targets = to_device(tokens[:, -response_mask.shape[1] :][response_mask])
    with acting_as(model, role), autocast(model):
        head = model.llama.lm_head
        logprobs, entropy = token_logprobs(head, states, targets, temperature)
    return TokenScores(_laid_out(logprobs, response_mask), _laid_out(entropy, response_mask))


def _laid_out(numbers: Tensor, response_mask: Tensor) -> Tensor:
    """Numbers of the response tokens, row after row, as (B, R); 0 elsewhere."""
    zeros = torch.zeros(response_mask.numel(), device=numbers.device)
    return zeros.index_copy(0, _places(response_mask), numbers).view(response_mask.shape)


def score_sequences(
    model: RoleModel, tokens: Tensor, mask: Tensor, role: Role = "reward"
) -> Tensor:
    """Reward of prompts and answers, read at the last real token of each row: (B,) float32."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return model.heads[role](hidden_states(model, role, tokens, mask, last))


def visible(prompts: Tensor, answers: Tensor) -> Tensor:
    """Which tokens see which: (B, 1, T, T) bool, True where row i's token sees column j's.

    A token sees itself and what stands before it in its prompt and in its own answer, as if the
    prompt had been repeated for every answer.

    Args:
        prompts: (B, T) int64, number of the prompt that a token belongs to; padding has its own.
        answers: (B, T) int64, number of the answer; negative in prompts, which all answers see.
    """
    length = prompts.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=prompts.device).tril()
    together = prompts[:, :, None] == prompts[:, None, :]
    columns = answers[:, None, :]
    return (causal & together & ((columns < 0) | (columns == answers[:, :, None])))[:, None]


def score_shared(
    model: RoleModel,
    tokens: Tensor,
    positions: Tensor,
    prompts: Tensor,
    answers: Tensor,
    ends: Tensor,
    role: Role = "reward",
) -> Tensor:
    """Rewards of answers, each read at its last token: (N,) float32.

    Args:
        model: not with flash attention, which takes no such masks.
        tokens: (B, T) int64, several answers in a row.
        positions: (B, T) int64, of each token in its own sequence of prompt and answer.
        prompts: (B, T) int64, as for `visible`; `answers` too.
        answers: see `prompts`.
        ends: (N,) int64, where answer n ends in the rows laid end to end.
    """
    inputs = (tokens, positions, prompts, answers, ends)
    tokens, positions, prompts, answers, ends = map(to_device, inputs)
    attention = model.llama.config._attn_implementation
    assert attention in (SDPA, VARLEN, "eager"), attention
    mask = visible(prompts, answers)
    with acting_as(model, role), autocast(model):
        if attention == "eager":  # adds its mask
            least = torch.finfo(model.llama.dtype).min
            mask = torch.where(mask, 0.0, least).to(model.llama.dtype)
        hidden = model.llama.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    return model.heads[role](hidden.flatten(0, 1)[ends])
