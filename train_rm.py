"""Stage 2: the reward model: a LoRA adapter that starts from SFT's, and a scalar head.

Trains on preference pairs and writes RUN/reward/adapter.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from chatllama.arguments import parse_stage_arguments, run_stage
from chatllama.run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stage that the command line describes; does nothing if it has finished before."""
    started = time.monotonic()
    arguments = parse_stage_arguments(__doc__ or "", argv)
    cfg, run = arguments.config, RunFolder(Path(arguments.config.run_dir))

    # Heavy imports come after the command line: `--help` and config errors answer at once.
    from chatllama import distributed
    from chatllama.decisions import finished_before
    from data.files import named_files

    if finished_before(cfg, run, "reward", named_files):
        if distributed.rank() == 0:
            print(f"stage reward of {run.root} has finished before: {run.result('reward')}")
        return
    run.read_result("sft")
    from trainers import reward, reward_data, reward_doctor, stage

    stage.join(run, "reward", arguments.lock)
    tokenizer = stage.open_stage(cfg, run, "reward")

    data = reward_data.load_preferences(cfg, tokenizer)
    examined = reward_doctor.open_diagnosis(run, data)
    info = stage.adapter_info(cfg, run, tokenizer, "reward")
    members = reward.train_ensemble(cfg, run, data, tokenizer, info, arguments.resume)
    numbers = reward.closing_numbers(cfg, data, members)
    reward_doctor.close_diagnosis(run, cfg.reward, data, members, examined)

    numbers |= {"wall_seconds": time.monotonic() - started}
    stage.finish(cfg, run, "reward", numbers)


if __name__ == "__main__":
    run_stage(main)
