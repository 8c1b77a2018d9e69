"""PPO on a real model beside a bare loop of transformers and PEFT.

    python benchmarks/bare_ppo.py MODEL [--rounds 2] [--steps 2] [--threads 1] [--out FILE]

Both give one frozen LLaMA four LoRA adapters (r 16): policy, critic, reward model, reference. A
step is that of configs/real/sentiment.yaml: 32 prompts, here of 24 tokens, 28 new ones each, one
epoch of minibatches of 16. The bare loop is what one writes first: `generate`, logits of the whole
answer, a forward pass for each role. Nothing ends early and nothing is padded, so packing and
answers of different lengths, where this project gains most, count for nothing here. Every
measurement is a process of its own, in turn (A B A B).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import Clock, hardware, peak_mib, ppo_trainer, publish, run_child
from torch import Tensor, nn
from transformers import LlamaForCausalLM

VARIANTS = ("ours", "bare")
BATCH, MINIBATCH, PROMPT, NEW = 32, 16, 24, 28
KL, CLIP, VALUE_CLIP, GAMMA, LAMBDA, VALUE_COEF = 0.05, 0.2, 0.2, 1.0, 0.95, 0.1
HEADER = (
    "| trainer | samples a CPU second | ratio | peak MiB (libraries) | ratio |",
    "|---|---|---|---|---|",
)


def main() -> None:
    """Runs the children in turn and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a LLaMA with its tokenizer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file, appended to")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        run = ours if arguments.child == "ours" else bare
        print(json.dumps(run(arguments.model, arguments.steps)))
        return
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    options = [f"--{name}={vars(arguments)[name]}" for name in ("steps", "threads")]
    for _ in range(arguments.rounds):
        for name in VARIANTS:
            command = [sys.executable, __file__, arguments.model, "--child", name, *options]
            rows[name].append(run_child(command, arguments.threads))
            print(name, json.dumps(rows[name][-1]), flush=True)
    lines = [f"{hardware(arguments.threads)}; {arguments.steps} steps", "", *HEADER]
    middle = {
        name: {key: statistics.median(row[key] for row in each) for key in each[0]}
        for name, each in rows.items()
    }
    base = middle["bare"]
    for name, row in middle.items():
        lines.append(
            f"| {name} | {row['rate']:.2f} | {row['rate'] / base['rate']:.2f} "
            f"| {row['peak']:,.0f} ({row['libraries']:,.0f}) | {row['peak'] / base['peak']:.2f} |"
        )
    publish(lines, arguments.out)


def random_prompts(vocabulary: int) -> Tensor:
    """(B, P) int64: the same for both."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(100, vocabulary, (BATCH, PROMPT), generator=generator)


def measured(clock: Clock, steps: int, libraries: int) -> dict[str, float]:
    """The row of a variant whose steps are done."""
    rate = BATCH * steps / clock.read()[1]
    return {"rate": rate, "peak": peak_mib(), "libraries": libraries}


def ours(folder: Path, steps: int) -> dict[str, float]:
    """This project's trainer, step by step."""
    from chatllama.config.schema import Config
    from chatllama.text.tokenizer import load_tokenizer
    from trainers.ppo.data import StopTokens
    from trainers.ppo.rewards import Statistics
    from trainers.ppo.state import PpoState

    libraries = peak_mib()
    cfg = Config.model_validate(
        {
            "run_dir": "unused",
            "backbone": {"path": str(folder), "dtype": "float32"},
            "chat": {"template": "chatml"},
            "lora": {"r": 16, "alpha": 32},
            "tracking": {"report_to": []},
            "generation": {"max_new_tokens": NEW, "batch_size": BATCH},
            "ppo": {
                "steps": steps,
                "rollout_batch_size": BATCH,
                "minibatch_size": MINIBATCH,
                "microbatch_size": MINIBATCH,
                "epochs": 1,
                "kl_coef": KL,
                "score_normalization": "none",
            },
        }
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM.from_pretrained(folder)
    prompts = random_prompts(llama.config.vocab_size).tolist()
    trainer = ppo_trainer(cfg, llama, prompts, StopTokens(load_tokenizer(folder), [], 0))
    state = PpoState(0, KL, Statistics())
    clock = Clock()
    for _ in range(steps):
        state = trainer.advance(state)[0]
    return measured(clock, steps, libraries)


def bare(folder: Path, steps: int) -> dict[str, float]:
    """The loop that one writes first."""
    libraries = peak_mib()
    torch.manual_seed(0)
    loop = BareLoop(LlamaForCausalLM.from_pretrained(folder))
    prompts = random_prompts(loop.llama.config.vocab_size)
    clock = Clock()
    for _ in range(steps):
        loop.step(prompts)
    return measured(clock, steps, libraries)


class BareLoop:
    """PPO with four adapters of PEFT on one model."""

    def __init__(self, llama: LlamaForCausalLM) -> None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        self.llama = llama
        self.model: Any = get_peft_model(llama, lora, adapter_name="policy")
        for name in ("value", "reward", "reference"):
            self.model.add_adapter(name, lora)
        self.heads = {name: nn.Linear(llama.config.hidden_size, 1) for name in ("value", "reward")}
        self.trained = list(self.heads["value"].parameters())
        for name, parameter in self.model.named_parameters():
            if ".policy." in name or ".value." in name:
                self.trained.append(parameter)
        self.optimizer = torch.optim.AdamW(self.trained, lr=3e-4)

    def hidden(self, role: str, tokens: Tensor) -> Tensor:
        """(B, T, D) last hidden states with a role's adapter."""
        self.model.set_adapter(role)
        return self.llama.model(tokens).last_hidden_state

    def logprobs(self, role: str, tokens: Tensor) -> Tensor:
        """(B, NEW) of the new tokens."""
        logits = self.llama.lm_head(self.hidden(role, tokens)[:, PROMPT - 1 : -1])
        return logits.log_softmax(-1).gather(2, tokens[:, PROMPT:, None])[..., 0]

    def values(self, tokens: Tensor) -> Tensor:
        """(B, NEW) of the states before the new tokens."""
        return self.heads["value"](self.hidden("value", tokens)[:, PROMPT - 1 : -1])[..., 0]

    @torch.no_grad()
    def collect(self, prompts: Tensor) -> dict[str, Tensor]:
        """Answers with what the update needs."""
        self.model.set_adapter("policy")
        tokens = self.model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
            top_k=0, temperature=1.0, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0,
        )  # fmt: skip
        old, values = self.logprobs("policy", tokens), self.values(tokens)
        rewards = -KL * (old - self.logprobs("reference", tokens))
        rewards[:, -1] += self.heads["reward"](self.hidden("reward", tokens)[:, -1])[:, 0]
        advantages, carried = torch.zeros_like(rewards), torch.zeros(len(rewards))
        for t in reversed(range(NEW)):
            following = values[:, t + 1] if t + 1 < NEW else torch.zeros(len(rewards))
            carried = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * carried
            advantages[:, t] = carried
        returns = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return {"tokens": tokens, "old": old, "values": values, "advantages": advantages,
                "returns": returns}  # fmt: skip

    def step(self, prompts: Tensor) -> None:
        """One step of PPO."""
        batch = self.collect(prompts)
        for rows in torch.randperm(BATCH).split(MINIBATCH):
            part = {name: value[rows] for name, value in batch.items()}
            ratio = (self.logprobs("policy", part["tokens"]) - part["old"]).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            (-torch.min(ratio * part["advantages"], clipped * part["advantages"])).mean().backward()
            values = self.values(part["tokens"])
            near = part["values"] + (values - part["values"]).clamp(-VALUE_CLIP, VALUE_CLIP)
            errors = torch.max((values - part["returns"]) ** 2, (near - part["returns"]) ** 2)
            (VALUE_COEF * 0.5 * errors.mean()).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


if __name__ == "__main__":
    main()
