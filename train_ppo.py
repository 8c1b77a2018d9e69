"""Stage 3: PPO of the policy against the reward model, four roles on one frozen LLaMA.

Writes RUN/ppo/policy and RUN/ppo/value, and measures base, SFT and PPO on held-out prompts.
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
    from trainers.stages import stage

    if stage.has_finished(cfg, run, "ppo", arguments.resume):
        return
    from trainers.ppo import data, evaluate, model, train
    from trainers.reward.evaluate import check_gate

    if any(source.adapter == "run" for source in cfg.ppo.rewards):
        stage.print_lines(check_gate(run, cfg.reward))
    stage.join(cfg, run, "ppo", arguments.lock)
    tokenizer = stage.open_stage(cfg, run, "ppo")

    prompts, stop = data.load_prompts(cfg, tokenizer), data.stop_tokens(cfg, tokenizer)
    ptx = data.load_ptx(cfg, tokenizer, stop.pad_id)
    roles = model.build_roles(cfg, run, tokenizer)
    engine = model.build_engine(cfg, roles.model)
    trainer = train.PpoTrainer(cfg, run, engine, roles.scorer, prompts, stop, ptx)
    numbers = trainer.train(arguments.resume)
    info = stage.adapter_info(cfg, run, tokenizer, "ppo")
    model.export_ppo(cfg, run, roles.model, tokenizer, info)

    measured = time.monotonic()
    evaluate.evaluate_roles(cfg, run, trainer.collector, prompts)
    now = time.monotonic()
    numbers |= {"wall_seconds": measured - started, "evaluation_seconds": now - measured}
    stage.finish(cfg, run, "ppo", numbers)


if __name__ == "__main__":
    run_stage(main)
