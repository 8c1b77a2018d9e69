"""Stage 1: supervised instruction tuning (LLaMA-I) of LoRA adapters on a frozen LLaMA.

Trains on the assistant's tokens of conversations and writes RUN/sft/adapter. With
backbone.from_scratch it first makes a tokenizer and a LLaMA from plain text.
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

    if finished_before(cfg, run, "sft", named_files):
        if distributed.rank() == 0:
            print(f"stage sft of {run.root} has finished before: {run.result('sft')}")
        return
    from trainers import pretrain, sft, stage

    stage.join(run, "sft", arguments.lock)
    pretrain.ensure_backbone(cfg, run)
    tokenizer = stage.open_stage(cfg, run, "sft")

    rows = sft.load_rows(cfg, tokenizer)
    model = sft.build_policy(cfg, run)
    numbers = sft.train_sft(cfg, run, rows, model, tokenizer, arguments.resume)
    info = stage.adapter_info(cfg, run, tokenizer, "sft")
    sft.export_sft(cfg, run, model, tokenizer, info)

    numbers |= {"wall_seconds": time.monotonic() - started} | pretrain.backbone_seconds(run)
    stage.finish(cfg, run, "sft", numbers)


if __name__ == "__main__":
    run_stage(main)
