"""Reward models of any family: a folder that AutoModelForSequenceClassification loads.

They read the conversation as text, by their own tokenizer and chat template.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from chatllama.runtime.distributed import device, rank, world_size
from chatllama.runtime.products import use_onednn
from trainers.functions.sample import Sample


class ClassifierModel:
    """A whole reward model on this rank's device, in the type of its weights.

    Args:
        path: folder or hub id.
        key: of the config, or the option, for messages.
        batch_size: answers per forward pass.

    Raises:
        ValueError: it cannot be loaded, gives other than one number, or lacks weights.
    """

    def __init__(self, path: str, key: str, batch_size: int) -> None:
        self.path, self.batch_size = path, batch_size
        load: Any = AutoModelForSequenceClassification.from_pretrained
        try:
            model, loading = load(path, dtype="auto", output_loading_info=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}: {path} cannot be loaded: {error}") from error
        if model.config.num_labels != 1:
            raise ValueError(
                f"{key}: {path} gives {model.config.num_labels} numbers, a reward model one "
                "(num_labels 1)"
            )
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"{key}: {path} has no weights for {', '.join(missing[:3])}, which would be random"
            )
        self.model = model.to(device()).eval().requires_grad_(False)
        use_onednn(self.model)
        self.tokenizer.padding_side = "right"
        positions = getattr(model.config, "max_position_embeddings", None)
        self.longest = min(self.tokenizer.model_max_length, positions or 2**31)
        if self.tokenizer.pad_token_id is None or model.config.pad_token_id is None:
            self.batch_size = 1  # without padding there is nothing to take for a token

    def rows(self, count: int) -> Sequence[int]:
        """Which of `count` answers this rank scores."""
        return range(rank(), count, world_size())

    @torch.no_grad()
    def values(self, samples: Sequence[Sample]) -> list[float]:
        """One number for each of this rank's samples; ValueError for one that is too long."""
        found: list[float] = []
        for start in range(0, len(samples), self.batch_size):
            some = samples[start : start + self.batch_size]
            encoded = [self.encode(each) for each in some]
            for sample, each in zip(some, encoded, strict=True):
                if (length := len(each["input_ids"])) > self.longest:
                    raise ValueError(
                        f"{sample}: {length} tokens, and the reward model {self.path} reads "
                        f"{self.longest}: lower ppo.max_prompt_length or generation.max_new_tokens"
                    )
            inputs = self.tokenizer.pad(encoded, return_tensors="pt")
            logits = self.model(**inputs.to(device())).logits
            found += logits[:, 0].float().tolist()
        return found

    def encode(self, sample: Sample) -> dict[str, list[int]]:
        """Ids of the conversation; without a chat template, of the pair of prompt and response."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(sample.conversation, tokenize=False)
            return dict(self.tokenizer(text, add_special_tokens=False))
        return dict(self.tokenizer(sample.prompt, sample.response))
