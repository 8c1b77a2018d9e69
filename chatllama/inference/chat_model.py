"""The roles of a loaded run as chat models: streamed answers, and answers side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from chatllama.generation.generate import stream
from chatllama.generation.sampling import Sampling
from chatllama.inference.answerer import Answerer, is_continued
from chatllama.inference.load import LoadedRun
from chatllama.inference.options import ChatOptions, GenerationRole
from chatllama.model.backbone import megabytes, weight_bytes
from chatllama.model.roles import Role, RoleModel, acting_as, autocast, sampling_as
from chatllama.model.sampling_layers import float32_head
from chatllama.model.scoring import hidden_states
from chatllama.runtime.command_line import tell
from chatllama.text.chat_format import Message, end_of_turn_ids
from chatllama.text.detokenizing import stream_text


@dataclass(frozen=True)
class Compared:
    """One role's answer to a prompt that several roles answer."""

    role: GenerationRole
    text: str
    num_tokens: int
    score: float | None
    """Of the reward model, where the run has one."""
    kl: float | None
    """To the role `start`, nats per token of this answer; None for that role itself."""
    start: GenerationRole = "sft"
    """What PPO starts from: SFT's model, or without one the base."""


ACTING: dict[GenerationRole, Role] = {
    "base": "base", "sft": "reference", "policy": "policy", "ema": "ema",
}  # fmt: skip


class ChatModel:
    """Answers with a run's model.

    Where conversation and answer do not fit the model's positions, the oldest exchanges are left
    out, with a note on stderr. The generator is on the CPU; `stops` are strings that end an answer.
    """

    def __init__(
        self,
        loaded: LoadedRun,
        sampling: Sampling,
        generator: torch.Generator,
        stops: Sequence[str] = (),
    ) -> None:
        self.loaded, self.sampling, self.generator = loaded, sampling, generator
        self._stops = tuple(stops)
        self.model = loaded.model.eval()
        self._stop_ids = end_of_turn_ids(loaded.tokenizer, loaded.chat)
        self.num_tokens = 0
        """Tokens of the newest streamed answer so far, the one that ends it left out."""

    @classmethod
    def chosen(cls, loaded: LoadedRun, options: ChatOptions) -> "ChatModel":
        """The model with the sampling that the options and the run's `generation` name."""
        generator = torch.Generator()
        if options.seed is None:
            generator.seed()
        else:
            generator.manual_seed(options.seed)
        longest = options.max_new_tokens or loaded.config.generation.max_new_tokens
        sampling = Sampling(longest, temperature=options.temperature, top_p=options.top_p)
        return cls(loaded, sampling, generator, options.stops)

    def find(self, name: str) -> GenerationRole:
        """The role of that name; ValueError if it is not loaded."""
        for role in self.roles:
            if role == name:
                return role
        raise ValueError(f"role {name or '(none named)'}: this run has {', '.join(self.roles)}")

    @property
    def roles(self) -> tuple[GenerationRole, ...]:
        """Those that are loaded; after full fine-tuning there is no base beside SFT's model."""
        full = self.loaded.config.lora is None
        there = {"base": not full, "sft": full or "reference" in self.model.lora}
        return tuple(
            role for role, acting in ACTING.items() if there.get(role, acting in self.model.lora)
        )

    def answer(self, messages: list[Message], role: GenerationRole) -> Iterator[str]:
        """Streams the answer as text, or what follows if the last message is the assistant's."""
        prompt = self._render(self._fitting(messages))
        with sampling_as(self.model, ACTING[role]):
            ids = self._counted(
                stream(self.model.llama, prompt, self.sampling, self._stop_ids, self.generator)
            )
            continues = is_continued(messages)
            yield from stream_text(self.loaded.tokenizer, ids, self._stops, continues)

    def compare(self, messages: list[Message]) -> Iterator[Compared]:
        """Every role's answer, from the same random numbers, with its numbers."""
        kept = self._fitting(messages)
        prompt = self._render(kept)
        uniforms = torch.rand(1, self.sampling.max_new_tokens, generator=self.generator)
        start = "sft" if "sft" in self.roles else "base"
        for role in self.roles:
            answerer = Answerer(self.loaded, ACTING[role])
            (answer,) = answerer.answer([kept], uniforms, self.sampling, self._stops, 1, False)
            kl = None
            if role != start:
                kl = mean_kl(self.model, ACTING[role], ACTING[start], prompt, answer.ids)
            yield Compared(role, answer.text, len(answer.ids), answer.score, kl, start)

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return Answerer(self.loaded, "base").render(messages)

    def _counted(self, ids: Iterator[int]) -> Iterator[int]:
        self.num_tokens = 0
        for index in ids:
            self.num_tokens += 1
            yield index

    def _fitting(self, messages: list[Message]) -> list[Message]:
        room = self.model.llama.config.max_position_embeddings - self.sampling.max_new_tokens
        kept = fit(messages, lambda some: len(self._render(some)), room)
        if len(kept) < len(messages):
            tell(f"(the oldest {len(messages) - len(kept)} messages no longer fit)")
        return kept


@torch.no_grad()
def mean_kl(
    model: RoleModel, role: Role, other: Role, prompt: Sequence[int], response: Sequence[int]
) -> float:
    """KL divergence from `other` to `role`, nats, averaged over the positions of a response.

    Exact at every position (over the whole vocabulary), at temperature 1. `prompt` and `response`
    are token ids.
    """
    tokens = torch.tensor([[*prompt, *response[:-1]]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    positions = mask.clone()
    positions[:, : len(prompt) - 1] = False
    logprobs = []
    for each in (role, other):
        hidden = hidden_states(model, each, tokens, mask, positions)
        with acting_as(model, each), autocast(model), float32_head(model.llama):
            logprobs.append(model.llama.lm_head(hidden).float().log_softmax(-1))
    own, reference = logprobs
    return float((own.exp() * (own - reference)).sum(-1).mean())


def fit(
    messages: Sequence[Message], count: Callable[[list[Message]], int], room: int
) -> list[Message]:
    """The longest suffix of a conversation, system prompt included, of at most `room` tokens.

    `count` returns the tokens of such a conversation. ValueError if the last message does not fit.
    """
    head = [m for m in messages[:1] if m["role"] == "system"]
    turns = list(messages[len(head) :])
    while (tokens := count([*head, *turns])) > room:
        if len(turns) <= 2:
            raise ValueError(
                f"this message takes {tokens} tokens and {room} are left beside the answer; "
                "shorten it or lower max_new_tokens"
            )
        turns = turns[2:]
    return [*head, *turns]


def describe_model(model: RoleModel, quantization: str) -> str:
    """Type, memory and place of the loaded weights, adapters and heads included."""
    kind = str(model.llama.dtype).removeprefix("torch.")
    if quantization != "none":
        kind = f"{quantization} and {kind}"
    return f"{kind}, {megabytes(weight_bytes(model))} of weights on {model.llama.device}"
