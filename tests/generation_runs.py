"""A run with random weights that answers, and what generate makes of it."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import LORA, REWARD_LORA, tiny_llama

from chatllama.config.model import ChatSection
from chatllama.inference import batch
from chatllama.inference.answerer import Answerer
from chatllama.inference.load import load_run
from chatllama.inference.options import GenerateOptions
from chatllama.inference.prompt_files import Prompt
from chatllama.model.adapters import save_adapter
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import describe_contract
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

NEW = 10
TEXTS = ["Anna paints", "the river", "a", "my brother looks for an old house", "the queen", "hi!"]
PROMPTS = [Prompt(i, text, f"prompt {i}") for i, text in enumerate(TEXTS)]


def make_run(folder: Path, tokenizer_dir: Path) -> RunFolder:
    """A finished run of random weights, with EMA and two reward members. Read it only."""
    run = RunFolder(folder)
    llama = tiny_llama(vocabulary=300)
    llama.save_pretrained(run.backbone)
    tokenizer = load_tokenizer(tokenizer_dir)
    save_tokenizer(tokenizer, run.backbone)
    run.config.write_text(
        f"run_dir: {run.root}\nbackbone: {{path: {run.backbone}, dtype: float32}}\n"
        f"generation: {{max_new_tokens: {NEW}, batch_size: 4}}\n"
    )
    folders = {
        "reference": run.sft_adapter,
        "policy": run.policy_adapter,
        "ema": run.ema_adapter,
        "reward": run.reward_adapter,
        "reward_1": run.reward_adapter.with_name("adapter-1"),
    }
    rewards = ("reward", "reward_1")
    lora = {role: REWARD_LORA if role in rewards else LORA for role in folders}
    torch.manual_seed(3)
    adapters = {role: Adapter(lora[role]) for role in folders}
    model = RoleModel(llama, adapters, heads=rewards)
    info = {"base": str(run.backbone), "contract": describe_contract(tokenizer, ChatSection())}
    for role, folder in folders.items():
        for parameter in adapter_parameters(model, role):
            parameter.data.normal_(std=0.2)
        head = model.heads[role].state_dict() if role in rewards else None
        save_adapter(folder, adapter_state(model, role), lora[role], info, head)
    return run


def before_rewards(run: RunFolder, folder: Path) -> RunFolder:
    """The same run before its reward stage."""
    (folder / "config.yaml").write_text(run.config.read_text())
    (folder / "sft").symlink_to(run.root / "sft")
    return RunFolder(folder)


def answers(
    run: RunFolder, out: Path, prompts: list[Prompt] | None = None, **options: Any
) -> list[dict[str, Any]]:
    batch.generate_command(run.root, prompts or PROMPTS, GenerateOptions(**options), out)
    return [json.loads(line) for line in out.read_text().splitlines()]


def reopened(run: RunFolder, role: str = "policy") -> Answerer:
    return Answerer(load_run(run, roles=[role, "reward", "reward_1"]), role)
