"""Stage 3: PPO of the policy against the reward model, four roles on one frozen LLaMA.

Writes RUN/ppo/policy and RUN/ppo/value, and measures base, SFT and PPO on held-out prompts.
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
    from chatllama import distributed, reward_models
    from chatllama.decisions import finished_before
    from data.files import named_files

    if finished_before(cfg, run, "ppo", named_files):
        if distributed.rank() == 0:
            print(f"stage ppo of {run.root} has finished before: {run.result('ppo')}")
        return
    if any(source.adapter == "run" for source in cfg.ppo.rewards):
        run.read_result("reward")
        weak = reward_models.check_gate(run, cfg.reward)
        if weak and distributed.rank() == 0:
            print(*weak, sep="\n")
    from trainers import evaluate, ppo, ppo_setup, ppo_text, stage

    stage.join(run, "ppo", arguments.lock)
    tokenizer = stage.open_stage(cfg, run, "ppo")

    prompts, ends = ppo_setup.load_prompts(cfg, tokenizer), ppo_setup.turn_ends(cfg, tokenizer)
    text = ppo_text.load_text(cfg, tokenizer, ends.pad_id)
    roles = ppo_setup.build_roles(cfg, run, tokenizer)
    optimiser = ppo_setup.build_engine(cfg, roles.model)
    trainer = ppo.PpoTrainer(cfg, run, optimiser, roles.scorer, prompts, ends, text)
    numbers = trainer.train(arguments.resume)
    ppo_setup.export_ppo(run, roles.model, stage.adapter_info(cfg, run, tokenizer, "ppo"))

    measured = time.monotonic()
    evaluate.evaluate_roles(cfg, run, optimiser, roles.scorer, prompts, ends)
    now = time.monotonic()
    numbers |= {"wall_seconds": measured - started, "evaluation_seconds": now - measured}
    stage.finish(cfg, run, "ppo", numbers)


if __name__ == "__main__":
    run_stage(main)
