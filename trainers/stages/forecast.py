"""What a stage is about to do, in one line, and warnings of what is likely a mistake."""

import math
import sys

from chatllama.config.batch_sizes import ppo_optimizer_steps
from chatllama.config.schema import Config
from chatllama.runs.folder import Stage
from chatllama.runtime.distributed import rank, world_size

FEW_STEPS = 50
"""Optimizer steps below which an adapter hardly learns."""
MANY_LOST = 0.2
"""Share of records that a limit on tokens may cut or leave out unseen."""


def announce(
    cfg: Config,
    stage: Stage,
    *,
    records: int,
    over: int,
    limit: str,
    advice: str,
    examples: int,
    steps: int,
    tokens: float,
) -> None:
    """Prints, on rank 0, the work of a stage; on stderr what is likely a mistake, with a remedy.

    Args:
        records: training records read.
        over: those that the limit on tokens has cut or left out.
        limit: how many tokens, and by which key.
        advice: what keeps most records whole.
        examples: training sequences of one pass.
        steps: of the stage; in PPO rollout batches.
        tokens: of the whole stage, about.
    """
    if rank():
        return
    batch = cfg.ppo.rollout_batch_size if stage == "ppo" else vars(cfg)[stage].batch_size
    made = ppo_optimizer_steps(cfg.ppo) if stage == "ppo" else steps
    what = "prompts" if stage == "ppo" else "examples"
    lost = f" ({over:,} longer than the limit)" if over else ""
    print(
        f"{stage}: {records:,} records{lost}, {examples:,} {what}, {steps * batch / examples:.3g} "
        f"times over in {steps:,} steps of {batch}: {made:,} optimizer steps, about "
        f"{tokens:,.0f} tokens",
        flush=True,
    )
    if made < FEW_STEPS:
        print(
            f"warning: {stage}: {made} optimizer steps are few for an adapter to learn; "
            f"{_more_steps(cfg, stage, examples)} makes {FEW_STEPS}",
            file=sys.stderr,
        )
    if over > MANY_LOST * records:
        print(
            f"warning: {over:,} of {records:,} records of {stage} are longer than the limit of "
            f"{limit} and are cut or left out; {advice}",
            file=sys.stderr,
        )


def _more_steps(cfg: Config, stage: Stage, examples: int) -> str:
    """The key, with a value, that gives a stage enough optimizer steps; batches stay divisible."""
    if stage == "ppo":
        each = ppo_optimizer_steps(cfg.ppo) // cfg.ppo.steps
        return f"ppo.steps={math.ceil(FEW_STEPS / each)}"
    section = cfg.sft if stage == "sft" else cfg.reward
    if section.steps is not None:
        return f"{stage}.steps={FEW_STEPS}"
    unit = section.microbatch_size * world_size()
    size = int(section.epochs * examples / FEW_STEPS) // unit * unit
    if size:
        return f"{stage}.batch_size={size}"
    return f"{stage}.epochs={math.ceil(FEW_STEPS * section.batch_size / examples)}"
