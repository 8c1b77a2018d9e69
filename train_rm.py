"""Stage 2: the reward model: a LoRA adapter that starts from SFT's, and a scalar head.

Trains on preference pairs and writes RUN/reward/adapter.
"""

import time
from collections.abc import Sequence

from trainers.stages.arguments import parse_stage_arguments, run_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stage that the command line describes; does nothing if it has finished before."""
    started = time.monotonic()
    arguments = parse_stage_arguments(__doc__ or "", argv)
    cfg, run = arguments.config, arguments.run

    # Heavy imports come after the command line: `--help` and config errors answer at once.
    from trainers.stages import given, stage

    if stage.has_finished(cfg, run, "reward", arguments.resume):
        return
    if cfg.reward.adapter is not None:
        return given.take_over(cfg, run, "reward", arguments.lock)
    from trainers.reward import data, train
    from trainers.reward.diagnosis import model_report

    stage.join(cfg, run, "reward", arguments.lock)
    tokenizer = stage.open_stage(cfg, run, "reward")

    preferences = data.load_preferences(cfg, tokenizer)
    examined = model_report.open_diagnosis(run, preferences)
    info = stage.adapter_info(cfg, run, tokenizer, "reward")
    members = train.train_ensemble(cfg, run, preferences, tokenizer, info, arguments.resume)
    numbers = train.closing_numbers(cfg, preferences, members)
    model_report.close_diagnosis(run, cfg.reward, preferences, members, examined)

    numbers |= {"wall_seconds": time.monotonic() - started}
    stage.finish(cfg, run, "reward", numbers)


if __name__ == "__main__":
    run_stage(main)
