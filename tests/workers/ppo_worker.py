"""What tests/ppo/test_ppo_launch.py runs in one process and, through the launcher, on two ranks."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo_runs import TinyRun, make_ptx, tokenizer_of

from chatllama.config.schema import DeepSpeedSection
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import barrier, rank, shut_down
from trainers.engine.start import initialise
from trainers.ppo.evaluate import evaluate_roles
from trainers.ppo.model import export_ppo
from trainers.ppo.rollout import sample_responses
from trainers.ppo.train import PpoTrainer

SIZES = {
    "steps": 2,
    "minibatch_size": 8,
    "save_every": 1,
    "save_total_limit": 9,
    "score_normalization_samples": 7,
}
OPTIONS = {
    "ema_decay": 0.5,
    "reference_refresh_every": 1,
    "score_normalization": "running",
    "kl_controller": "adaptive",
    "kl_target": 0.01,
    "kl_horizon": 100,
    "kl_loss_coef": 0.1,
    "samples_per_prompt": 2,
    "missing_eos": "filter",
    "ptx_coef": 0.3,
    "ptx_data": [{"path": "-"}],
    "eval_every": 2,
    "rewards": [{"adapter": "run"}, {"function": "ppo_runs:count_words", "weight": 0.05}],
}
TRUNK = {"value_model": "policy_trunk", "critic_warmup_steps": 1, "target_kl": 1e-6, "epochs": 3}
RLOO = {"advantage": "rloo", "samples_per_prompt": 4}
WHOLE = {"stage3_param_persistence_threshold": 0}
SPLIT = {**WHOLE, "gather_for_rollouts": False}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, WHOLE),
    "options": (OPTIONS, WHOLE),
    "trunk": (TRUNK, WHOLE),
    "rloo": (RLOO, WHOLE),
    "split options": (OPTIONS, SPLIT),
    "persistent": (OPTIONS, {}),
}
"""Name -> changes of the sections ppo and deepspeed."""


def build(tiny: TinyRun, stage: int, name: str) -> PpoTrainer:
    ppo, deepspeed = VARIANTS[name]
    return tiny.trainer(
        ppo={**SIZES, **ppo},
        deepspeed={"stage": stage, **deepspeed},
        evaluation={"num_prompts": 3},
        ptx=make_ptx() if "ptx_coef" in ppo else None,
    )


def weights(trainer: PpoTrainer) -> dict[str, torch.Tensor]:
    """Copies of all whole parameters, on every rank."""
    engine = trainer.engine
    return {n: engine.whole_value(p).cpu() for n, p in engine.model.named_parameters()}


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics("ppo").read_text().splitlines()]
    timed = ("time", "ppo/reward_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def run_variant(base: TinyRun, folder: Path, stage: int, name: str) -> dict[str, Any]:
    """Two steps, the evaluation and the exports; then the second again from the first checkpoint.

    Args:
        base: a run folder after two stages, to be copied.
        folder: for what is written.
        stage: of ZeRO.
        name: of VARIANTS.
    """
    tiny = TinyRun(base.base, folder / name.replace(" ", "-"))
    if rank() == 0:
        shutil.copytree(base.folder, tiny.folder)
    barrier()
    run, out = RunFolder(tiny.folder), {}
    trainer = build(tiny, stage, name)
    trainer.train(resume=False)
    evaluate_roles(trainer.cfg, run, trainer.collector, trainer.prompts)
    info = {"base": tiny.base, "contract": {}, "stage": "ppo"}
    export_ppo(trainer.cfg, run, trainer.engine.model, tokenizer_of(tiny.base), info)
    out["weights"] = weights(trainer)
    # More ranks than prompts.
    arguments = ([[70, 71, 72]], trainer.cfg.generation, trainer.stop_tokens.stop_ids, (9,))
    out["lonely"] = sample_responses(trainer.engine, "policy", *arguments)
    barrier()
    out["metrics"] = metrics(run)
    out["evaluation"] = json.loads(run.evaluation.read_text())
    barrier()
    if rank() == 0:
        shutil.rmtree(run.checkpoints("ppo") / "step-2")
    barrier()
    again = build(tiny, stage, name)
    again.train(resume=True)
    resumed = weights(again)
    out["resumed"] = all(torch.equal(resumed[n], w) for n, w in out["weights"].items())
    barrier()
    out["resumed_metrics"] = metrics(run) == out["metrics"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("base")
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", type=int)
    parser.add_argument("variants", nargs="+")
    arguments = parser.parse_args()
    initialise(DeepSpeedSection())
    base = TinyRun(arguments.base, Path(arguments.run))
    found = {
        name: run_variant(base, arguments.folder, arguments.stage, name)
        for name in arguments.variants
    }
    torch.save(found, arguments.folder / f"out-{rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
