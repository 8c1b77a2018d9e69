"""The loop of SFT and reward training: optimizer steps, evaluations, checkpoints, signals.

What a step computes belongs to the stage. PPO, whose steps sample and can be rolled back, has a
loop of its own.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from chatllama.config.batch_sizes import lr_factor
from chatllama.config.schema import Config
from chatllama.config.stages import OptimizerSection
from chatllama.reporting.tracker import Tracker
from chatllama.runs import interruption
from chatllama.runs.checkpoints import checkpoint_to_resume, layout_of, save_step
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.distributed import rank
from trainers.engine.engine import Engine, seed_step
from trainers.stages.not_finite import Batch, check_finite

Metrics = dict[str, float]


def train_steps(
    cfg: Config,
    section: OptimizerSection,
    run: RunFolder,
    stage: Stage,
    engine: Engine,
    tracker: Tracker,
    steps: int,
    *,
    seed: int,
    resume: bool,
    optimizer_step: Callable[[int, float], Metrics],
    evaluate: Callable[[], Metrics],
    batch: Callable[[int], Batch],
    interrupted: RunFolder | None,
) -> float:
    """Makes all optimizer steps of a stage; returns the loss of the last one.

    Args:
        stage: names the checkpoints and the metric `<stage>/loss`.
        tracker: opened, and not yet logged to.
        steps: optimizer steps of the whole stage.
        resume: go on from the newest checkpoint, if there is one.
        optimizer_step: step from 0 and learning rate factor -> metrics of the step.
        evaluate: metrics on held-out data, every `section.eval_every` steps.
        batch: the tensors of a step from 0, for the file that shows why it is not finite.
        interrupted: the run whose stage is saved and ended by a signal. None: it ends at once.

    Raises:
        ValueError: checkpoints do not fit or `resume` is off; a metric is not finite.
        Interrupted: a signal came; the step is saved.
    """
    layout = layout_of(cfg.deepspeed, section.microbatch_size)
    checkpoint = checkpoint_to_resume(run, stage, resume, layout, steps)
    first, loss = 0, float("nan")
    if checkpoint is not None:
        state = engine.load(checkpoint)
        first, loss = state["step"], state["loss"]
        tracker.resume_from(first)
    key = stage if interrupted is not None else "backbone.from_scratch"
    warn_of_warmup(key, section.warmup_steps, steps, first)
    engine.show = tracker.phase
    with interruption.steps() if interrupted is not None else nullcontext():
        for step in range(first, steps):
            seed_step(seed, step)
            factor = lr_factor(step, steps, section.lr_schedule, section.warmup_steps)
            metrics = optimizer_step(step, factor)
            done, loss = step + 1, metrics[f"{stage}/loss"]
            if done % cfg.tracking.log_every == 0 or done == steps:
                tracker.log(done, metrics)
            check_finite(run, stage, key, done, metrics, partial(batch, step), first)
            if section.eval_every and done % section.eval_every == 0 and done < steps:
                tracker.log(done, evaluate())
            stopping = interrupted is not None and interruption.stop_requested()
            if stopping or (section.save_every and done % section.save_every == 0):
                write = partial(engine.save, state={"step": done, "loss": loss})
                save_step(run, stage, done, section.save_total_limit, layout, write)
            if stopping and interrupted is not None:
                interruption.stop(interrupted, stage, done)
    return loss


def warn_of_warmup(key: str, warmup_steps: int, steps: int, done: int = 0) -> None:
    """Warns, on rank 0, of a warm-up that is not shorter than the stage; all in optimizer steps."""
    if rank() == 0 and done < steps <= warmup_steps:
        print(
            f"warning: {key}.warmup_steps {warmup_steps} is not shorter than the stage, which has "
            f"{steps} optimizer steps: the learning rate falls nowhere and "
            f"{'just reaches' if steps == warmup_steps else 'never reaches'} its peak. Lower "
            f"{key}.warmup_steps or raise {key}.steps",
            file=sys.stderr,
            flush=True,
        )
