"""A problem small enough to list every response to every prompt.

Six tokens (the end of turn and five words), four prompts of one to four words, responses of one to
three tokens: 156 of them per prompt. The pad id is that of the end of turn, so that code which
finds padding by its id goes wrong here. Nothing of PPO is computed in this file.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse, Replace, Sequence
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatllama.config.model import LoraSection
from chatllama.config.schema import Config
from chatllama.model.adapters import save_adapter
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import describe_contract
from trainers.ppo.data import Prompts, StopTokens, prompt_row

Precision = Literal["float32", "bfloat16"]
"""Of a backbone; adapters and heads are float32."""
STOP = 0
WORDS = ("ash", "bay", "cod", "dew", "elm")
PROMPTS = ((1,), (2, 3), (5, 4, 1), (3, 5, 2, 4))
MAX_NEW_TOKENS = 3
LORA = LoraSection(r=8, alpha=16.0)
MISSING_EOS_PENALTY = 0.5
ADAPTER_WEIGHT = 0.3
"""Weight of the reward adapter beside the function below."""


def reward(prompt: str, response: str) -> float:
    """A known reward: for words of the prompt, against repeats, with a best length per prompt.

    Without the length term the best responses hardly ever end early, and mistakes about the end of
    a response stay invisible.
    """
    given, said = prompt.split(), response.split()
    known = sum(0.6 if word in given else -0.2 for word in said)
    repeats = sum(a == b for a, b in itertools.pairwise(said))
    return known - 0.8 * repeats - 0.7 * abs(len(said) - (len(given) - 1) % 3)


@dataclass(frozen=True)
class World:
    """A run folder ready for PPO: SFT's and the reward model's adapters have random weights."""

    root: Path
    seed: int
    dtype: Precision = "float32"
    """Of the backbone, whose weights are numbers of that type in the float64 truth too."""

    @classmethod
    def make(cls, root: Path, seed: int, dtype: Precision = "float32") -> "World":
        """Writes the base and the adapters of SFT and of the reward model below `root`."""
        world = cls(root, seed, dtype)
        world.llama.save_pretrained(root / "base")
        cfg, run = world.config(), world.run
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            adapters = {"sft": Adapter(LORA), "reward": Adapter(LORA)}
            model = RoleModel(world.new_llama(), adapters, heads=("reward",))
            for role in adapters:
                for parameter in adapter_parameters(model, role):
                    parameter.data.normal_(std=0.1)
        contract = describe_contract(world.tokenizer, cfg.chat)
        info = {"base": str(root / "base"), "contract": contract}
        head = dict(model.heads["reward"].named_parameters())
        for role, folder in (("sft", run.sft_adapter), ("reward", run.reward_adapter)):
            state, head_of = adapter_state(model, role), head if role == "reward" else None
            save_adapter(folder, state, LORA, {**info, "stage": role}, head_of)
        return world

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.root / "run")

    def new_llama(self) -> LlamaForCausalLM:
        """The base: always the same weights, large enough that its distribution is uneven."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            llama = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=1 + len(WORDS),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=32,
                    initializer_range=0.15,
                    bos_token_id=None,
                    eos_token_id=STOP,
                    pad_token_id=None,
                    tie_word_embeddings=False,
                )
            )
        for parameter in llama.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.dtype)).float()
        return llama.requires_grad_(False).eval()

    @cached_property
    def llama(self) -> LlamaForCausalLM:
        """The base, for reading."""
        return self.new_llama()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word."""
        pieces = ["</s>", *(f"▁{word}" for word in WORDS)]
        backend = Tokenizer(WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="</s>"))
        backend.decoder = Sequence([Replace("▁", " "), Fuse()])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="</s>"
        )

    @property
    def stop_tokens(self) -> StopTokens:
        """The stop token, which also pads."""
        return StopTokens(self.tokenizer, [STOP], STOP)

    def text(self, ids: tuple[int, ...]) -> str:
        """The words of a prompt or response."""
        return " ".join(WORDS[i - 1] for i in ids if i != STOP)

    def prompts(self, repeats: int = 1) -> Prompts:
        """Every prompt, `repeats` times, to train on; none held out."""
        rows = [prompt_row(p, self.text(p)) for p in PROMPTS] * repeats
        data = Dataset.from_list(rows)
        return Prompts(data, data.select([]))

    def config(
        self,
        ppo: dict[str, Any] | None = None,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Config:
        """The config of a run in this world; keys of `ppo` replace the usual ones."""
        rewards = [{"function": f"{__name__}:reward"}, {"adapter": "run", "weight": ADAPTER_WEIGHT}]
        usual = {
            "rewards": rewards,
            "score_normalization": "none",
            "missing_eos_penalty": MISSING_EOS_PENALTY,
            "kl_coef": 0.3,
            "save_every": 0,
        }
        return Config.model_validate(
            {
                "run_dir": str(self.root / "run"),
                "seed": self.seed,
                "backbone": {"path": str(self.root / "base"), "dtype": self.dtype},
                "chat": {"template": "alpaca"},
                "lora": LORA.model_dump(),
                "sft": {"data": [{"path": "stands in for the adapter that `make` writes"}]},
                "generation": {
                    "max_new_tokens": max_new_tokens,
                    "temperature": temperature,
                    "batch_size": 4096,
                },
                "tracking": {"report_to": [], "sample_every": 0},
                "ppo": usual | (ppo or {}),
            }
        )


def all_responses(max_new_tokens: int = MAX_NEW_TOKENS) -> list[tuple[int, ...]]:
    """Every response that can be sampled: words and the stop token, or words up to the limit."""
    words = range(1, 1 + len(WORDS))
    ended = [
        (*said, STOP)
        for length in range(max_new_tokens)
        for said in itertools.product(words, repeat=length)
    ]
    return ended + list(itertools.product(words, repeat=max_new_tokens))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|; infinite where `actual` is not finite."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf
