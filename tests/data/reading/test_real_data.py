"""A real LLaMA on real instructions, preferences and prompts: ranks and ZeRO change no loss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import PROJECT, launch

import train_ppo
import train_rm
import train_sft
from chatllama.model.adapters import load_adapter
from chatllama.runs.folder import STAGES, RunFolder, Stage

pytestmark = pytest.mark.slow
MAINS: dict[Stage, Callable[[list[str]], None]] = {
    "sft": train_sft.main,
    "reward": train_rm.main,
    "ppo": train_ppo.main,
}
SCRIPTS: dict[Stage, str] = {"sft": "train_sft.py", "reward": "train_rm.py", "ppo": "train_ppo.py"}
CONFIG = """
run_dir: {folder}/one
backbone: {{path: {data}/stories260k/hf, dtype: float32}}
chat: {{template: alpaca}}
lora: {{r: 8}}
tracking: {{report_to: []}}
deepspeed: {{stage3_param_persistence_threshold: 0}}
sft:
  data: [{{path: {data}/llama_factory/alpaca_en_demo.json, format: alpaca}}]
  max_length: 256
  batch_size: 8
  microbatch_size: 4
  learning_rate: 1e-3
  steps: 3
reward:
  data: [{{path: {data}/hh_rlhf/harmless-base-first1800.jsonl.gz, format: hh}}]
  eval_fraction: 0.167
  max_length: 512  # the context of this LLaMA; 41 % of the pairs are longer in its small vocabulary
  batch_size: 16
  microbatch_size: 8
  learning_rate: 3e-4
  adam_eps: 1e-6  # the default makes whole steps of gradients that are rounding
  steps: 3
  allow_weak: true
ppo:
  data: [{{path: {data}/hh_rlhf/harmless-base-first1800.jsonl.gz, format: hh}}]
  eval_fraction: 0.167
  max_prompt_length: 128
  rollout_batch_size: 16
  minibatch_size: 8
  microbatch_size: 4
  epochs: 2
  learning_rate: 1e-3
  score_normalization_samples: 16
  steps: 2
generation: {{max_new_tokens: 24}}
evaluation: {{num_prompts: 16}}
"""


@pytest.fixture(scope="module")
def config_file(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    file = folder / "real.yaml"
    file.write_text(CONFIG.format(folder=folder, data=testdata))
    return file


@pytest.fixture(scope="module")
def alone(config_file: Path) -> RunFolder:
    """The three stages in this one process."""
    for stage in STAGES:
        MAINS[stage]([str(config_file)])
    return RunFolder(config_file.parent / "one")


def metrics_of(run: RunFolder, stage: Stage) -> list[dict[str, float]]:
    """Lines of metrics without times and rates."""
    left_out = ("time", f"{stage}/tokens_per_second")
    lines = [json.loads(line) for line in run.metrics(stage).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines]


def test_the_data_is_what_the_stages_say(alone: RunFolder):
    assert alone.read_result("sft")["steps"] == alone.read_result("reward")["steps"] == 3
    # 1,052 of the 1,800 pairs fit the context of this LLaMA, whose 512 pieces make long texts.
    assert alone.read_result("reward")["num_eval_pairs"] == 172
    doctor = json.loads((alone.stage("reward") / "doctor.json").read_text())
    assert doctor["data"]["training"]["pairs"] == 880
    for stage in STAGES:
        assert len(metrics_of(alone, stage)) >= 2
    first = metrics_of(alone, "ppo")[0]
    assert first["ppo/kl_abs_max"] == 0 and first["ppo/first_log_ratio"] == 0
    assert json.loads(alone.evaluation.read_text())["num_prompts"] == 16


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_give_the_losses_of_one_process(alone: RunFolder, config_file: Path, zero: int):
    two = RunFolder(config_file.parent / f"zero-{zero}")
    for stage in STAGES:
        script = str(PROJECT / SCRIPTS[stage])
        launch(script, str(config_file), f"run_dir={two.root}", f"deepspeed.stage={zero}")
        mine, theirs = metrics_of(two, stage), metrics_of(alone, stage)
        assert len(mine) == len(theirs)
        for found, expected in zip(mine, theirs, strict=True):
            # A margin is a small difference of scores of size 1: hence the absolute part.
            assert found == pytest.approx(expected, rel=1e-4, abs=3e-5)
    for folder in ("sft_adapter", "reward_adapter", "policy_adapter", "value_adapter"):
        found, expected = (load_adapter(getattr(run, folder)) for run in (two, alone))
        for name, tensor in expected.state.items():
            assert float((found.state[name] - tensor).abs().max()) < 1e-3, (folder, name)
