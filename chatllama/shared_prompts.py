"""Scores of answers that stand behind one copy of their prompt.

How such rows are laid out is in `data/answer_rows.py`. Shapes: B rows, T tokens, N answers. Inputs
may be on the CPU; scores are on the device.
"""

import torch

from chatllama.distributed import to_device
from chatllama.roles import Role, RoleModel, acting_as, autocast


def visible(prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Which tokens see which: (B, 1, T, T) bool, True where row i's token sees column j's.

    A token sees what stands before it (and itself) in its prompt and in its own answer, as if the
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
    tokens: torch.Tensor,
    positions: torch.Tensor,
    prompts: torch.Tensor,
    answers: torch.Tensor,
    ends: torch.Tensor,
    role: Role = "reward",
) -> torch.Tensor:
    """Rewards of answers, each read at its last token: (N,) float32.

    Args:
        model: holds the role and its head; not with flash attention, which knows no such masks.
        tokens: (B, T) int64.
        positions: (B, T) int64, of each token in its own sequence of prompt and answer.
        prompts: (B, T) int64, as for `visible`.
        answers: (B, T) int64, as for `visible`.
        ends: (N,) int64, where answer n ends in the rows laid end to end.
        role: which reward model.
    """
    inputs = (tokens, positions, prompts, answers, ends)
    tokens, positions, prompts, answers, ends = map(to_device, inputs)
    attention = model.llama.config._attn_implementation
    assert attention in ("sdpa", "varlen", "eager"), attention
    mask = visible(prompts, answers)
    with acting_as(model, role), autocast(model):
        if attention == "eager":  # adds its mask
            least = torch.finfo(model.llama.dtype).min
            mask = torch.where(mask, 0.0, least).to(model.llama.dtype)
        hidden = model.llama.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    return model.heads[role](hidden.flatten(0, 1)[ends])
