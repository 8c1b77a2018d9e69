"""Stage 1: supervised instruction tuning (LLaMA-I) of LoRA adapters on a frozen LLaMA.

Trains on the assistant's tokens of conversations and writes RUN/sft/adapter. With
backbone.from_scratch it first makes a tokenizer and a LLaMA from plain text.
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

    if stage.has_finished(cfg, run, "sft", arguments.resume):
        return
    if cfg.sft.adapter is not None:
        return given.take_over(cfg, run, "sft", arguments.lock)
    from trainers.sft import data, model, pretrain, train

    stage.join(cfg, run, "sft", arguments.lock)
    pretrain.ensure_backbone(cfg, run)
    tokenizer = stage.open_stage(cfg, run, "sft")

    rows = data.load_rows(cfg, tokenizer)
    policy = model.build_policy(cfg, run)
    engine = model.build_engine(cfg, policy)
    numbers = train.train_sft(cfg, run, rows, engine, tokenizer, arguments.resume)
    info = stage.adapter_info(cfg, run, tokenizer, "sft")
    model.export_sft(cfg, run, policy, tokenizer, info)

    numbers |= {"wall_seconds": time.monotonic() - started} | pretrain.backbone_seconds(run)
    stage.finish(cfg, run, "sft", numbers)


if __name__ == "__main__":
    run_stage(main)
