"""Tiny run folders, ready for PPO: base, SFT and reward adapters are made directly, not trained."""

import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import LORA, REWARD_LORA, tiny_llama
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.model.adapters import save_adapter
from chatllama.model.roles import Adapter, Role, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.runtime.files import write_json
from chatllama.text.chat_format import describe_contract
from chatllama.text.tokenizer import load_tokenizer
from trainers.functions.sample import Sample
from trainers.ppo.data import Prompts, PtxLoader, StopTokens, prompt_row
from trainers.ppo.model import build_engine, build_roles
from trainers.ppo.train import PpoTrainer

VOCABULARY = 300
PAD = 0
STOPS = [2, *range(3, 70)]
"""Ids that end a response in most tests: some responses end by themselves, some do not."""
DATA = {"data": [{"path": "read_before.jsonl"}]}
"""Of stages whose results the builders write: the run has them, and nothing is read."""
REWARD_RESULT = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "num_eval_pairs": 100}


def make_base(folder: Path, tokenizer_dir: Path, form: str = "llama") -> str:
    """A plain Hugging Face folder: a seeded model of tiny_models, with a tokenizer."""
    tiny_llama(VOCABULARY, form=form).save_pretrained(folder)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    return str(folder)


@lru_cache
def tokenizer_of(base: str) -> PreTrainedTokenizerFast:
    return load_tokenizer(base)


def ppo_config(base: str, run_dir: Path | str, **changes: Any) -> Config:
    """A config of two steps on eight responses each; `changes` replace keys inside sections."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "backbone": {"path": base, "dtype": "float32"},
        "chat": {"template": "alpaca"},
        "lora": LORA.model_dump(),
        "sft": DATA,
        "reward": DATA,
        "tracking": {"report_to": [], "sample_every": 0},
        "generation": {"max_new_tokens": 6, "batch_size": 16},
        "evaluation": {"num_prompts": 4},
        "ppo": {
            **DATA,
            "max_prompt_length": 200,
            "steps": 2,
            "rollout_batch_size": 8,
            "minibatch_size": 4,
            "microbatch_size": 2,
            "epochs": 2,
            "learning_rate": 3e-3,
            "score_normalization_samples": 6,
        },
    }
    for name, value in changes.items():
        old = values.get(name)
        values[name] = {**old, **value} if isinstance(old, dict) and value is not None else value
    return Config.model_validate(values)


def make_run(cfg: Config, members: int = 1, form: str = "llama") -> RunFolder:
    """The folder as the first two stages leave it, with random adapters and heads.

    With `lora: null` the result of SFT is the base itself.
    """
    run, tokenizer = RunFolder(Path(cfg.run_dir)), tokenizer_of(str(cfg.backbone.path))
    rewards = ["reward", *(f"reward_{number}" for number in range(1, members))]
    adapters: dict[Role, Adapter] = {"sft": Adapter(LORA)}
    adapters |= {role: Adapter(REWARD_LORA) for role in rewards}
    with torch.random.fork_rng():
        torch.manual_seed(23)
        model = RoleModel(tiny_llama(VOCABULARY, form=form), adapters, heads=tuple(rewards))
        for role in adapters:
            for parameter in adapter_parameters(model, role):
                parameter.data.normal_(std=0.15)
    info = {"base": str(cfg.backbone.path), "contract": describe_contract(tokenizer, cfg.chat)}
    if cfg.lora is None:
        tiny_llama(VOCABULARY).save_pretrained(run.full_model)
    else:
        state = adapter_state(model, "sft")
        save_adapter(run.sft_adapter, state, LORA, {**info, "stage": "sft"})
    for number, role in enumerate(rewards):
        folder = run.reward_adapter
        folder = folder if number == 0 else folder.with_name(f"adapter-{number}")
        head = dict(model.heads[role].named_parameters())
        state = adapter_state(model, role)
        save_adapter(folder, state, REWARD_LORA, {**info, "stage": "reward"}, head)
    write_json(run.result("sft"), {"loss": 1.0})
    write_json(run.result("reward"), {**REWARD_RESULT, "ensemble": members})
    return run


def make_prompts(num_train: int = 7, num_held_out: int = 5) -> Prompts:
    """Ragged prompts of random ids, with texts that name them."""
    generator = torch.Generator().manual_seed(5)
    records = [
        prompt_row(
            [1, *torch.randint(70, VOCABULARY, (1 + n % 5,), generator=generator).tolist()],
            f"question {n}",
            f"made.jsonl:{n + 1}",
            number=n,
        )
        for n in range(num_train + num_held_out)
    ]
    data = Dataset.from_list(records)
    held_out = range(num_train, num_train + num_held_out)
    return Prompts(data.select(range(num_train)), data.select(held_out))


def make_ptx() -> PtxLoader:
    """Five texts of random ids, some of whose tokens count as predictions."""
    rows = [
        {"input_ids": [1, 90, 91, 92, 2], "mask": [0, 0, 1, 1, 1]},
        {"input_ids": [1, 95, 2], "mask": [0, 1, 1]},
        {"input_ids": [1, 200, 201, 202, 203, 204, 2], "mask": [1, 1, 1, 1, 1, 1, 1]},
        {"input_ids": [1, 150, 151, 2], "mask": [0, 0, 0, 1]},
        {"input_ids": [1, 160, 161, 162, 2], "mask": [0, 0, 0, 1, 1]},
    ]
    return PtxLoader(Dataset.from_list(rows), per_microbatch=1, pad_id=PAD, seed=0)


def make_stop_tokens(cfg: Config, stops: list[int] | None = None) -> StopTokens:
    return StopTokens(tokenizer_of(str(cfg.backbone.path)), STOPS if stops is None else stops, PAD)


def make_trainer(
    cfg: Config, *, stops: list[int] | None = None, ptx: PtxLoader | None = None
) -> PpoTrainer:
    """What train_ppo.py makes, with prompts and stop tokens of its own."""
    run, stop_tokens = RunFolder(Path(cfg.run_dir)), make_stop_tokens(cfg, stops)
    roles = build_roles(cfg, run, stop_tokens.tokenizer)
    engine = build_engine(cfg, roles.model)
    return PpoTrainer(cfg, run, engine, roles.scorer, make_prompts(), stop_tokens, ptx)


@dataclass(frozen=True)
class TinyRun:
    """A run folder whose first two stages are there, for tests that only read it."""

    base: str
    folder: Path

    @classmethod
    def make(
        cls,
        folder: Path,
        tokenizer_dir: Path,
        members: int = 1,
        form: str = "llama",
        **changes: Any,
    ) -> "TinyRun":
        run = cls(make_base(folder / "base", tokenizer_dir, form), folder / "run")
        make_run(run.config(**changes), members, form)
        return run

    def config(self, **changes: Any) -> Config:
        return ppo_config(self.base, self.folder, **changes)

    @property
    def reward_adapter(self) -> str:
        """The first of the run's reward adapters."""
        return str(self.folder / "reward" / "adapter")

    def trainer(
        self, *, stops: list[int] | None = None, ptx: PtxLoader | None = None, **changes: Any
    ) -> PpoTrainer:
        return make_trainer(self.config(**changes), stops=stops, ptx=ptx)


def nudge(trainer: PpoTrainer, by: float = 0.02) -> None:
    """The policy away from the reference, as in the middle of a run."""
    for parameter in adapter_parameters(trainer.engine.model, "policy"):
        parameter.data += by


def weights(model: RoleModel) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sample_of(prompt: str, response: str, **columns: Any) -> Sample:
    """An answer as the terms of the score see it."""
    return Sample(prompt, response, [{"role": "user", "content": prompt}], "a.jsonl:7", columns)


def count_words(prompt: str, response: str) -> float:
    """A reward function: 10 for each word of the prompt, 1 for each character of the response."""
    return 10.0 * len(prompt.split()) + len(response)


async def gold_of_batches(
    prompts: list[str], completions: list[str], **columns: Any
) -> list[float]:
    """1000 for each of the prompt's `number`, 1 for each character of the response."""
    numbers = columns["number"]
    return [1000.0 * n + len(text) for n, text in zip(numbers, completions, strict=True)]


def letter_sum(prompt: str, response: str) -> float:
    """A reward function that tells almost all answers apart: the sum of the letters, modulo 17."""
    return float(sum(map(ord, response)) % 17)


def batch_lengths(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward function of batches: the length of each answer, less that of the longest."""
    longest = max(map(len, completions))
    return [float(len(each) - longest) for each in completions]
