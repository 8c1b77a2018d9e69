"""Stage 2: the reward model: a LoRA adapter that starts from SFT's, and a scalar head.

Trains on preference pairs and writes RUN/reward/adapter.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from chatllama.runs.folder import RunFolder
from trainers.stages.arguments import parse_stage_arguments, run_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stage that the command line describes; does nothing if it has finished before."""
    started = time.monotonic()
    arguments = parse_stage_arguments(__doc__ or "", argv)
    cfg, run = arguments.config, RunFolder(Path(arguments.config.run_dir))

    # Heavy imports come after the command line: `--help` and config errors answer at once.
    from chatllama.runtime import distributed
    from data.reading.files import named_files
    from trainers.stages.decisions import finished_before

    if finished_before(cfg, run, "reward", named_files):
        if distributed.rank() == 0:
            print(f"stage reward of {run.root} has finished before: {run.result('reward')}")
        return
    run.read_result("sft")
    from trainers.reward import data as reward_data
    from trainers.reward import train as reward
    from trainers.reward.diagnosis import model_report
    from trainers.stages import stage

    stage.join(run, "reward", arguments.lock)
    tokenizer = stage.open_stage(cfg, run, "reward")

    data = reward_data.load_preferences(cfg, tokenizer)
    examined = model_report.open_diagnosis(run, data)
    info = stage.adapter_info(cfg, run, tokenizer, "reward")
    members = reward.train_ensemble(cfg, run, data, tokenizer, info, arguments.resume)
    numbers = reward.closing_numbers(cfg, data, members)
    model_report.close_diagnosis(run, cfg.reward, data, members, examined)

    numbers |= {"wall_seconds": time.monotonic() - started}
    stage.finish(cfg, run, "reward", numbers)


if __name__ == "__main__":
    run_stage(main)
