"""Bodies of the server's requests: OpenAI's API, vLLM's for adapters, and ours.

null means "not given", at any place. Unknown arguments are refused by name. Those of OpenAI's and
vLLM's that are not supported are accepted with a value that changes nothing, which many clients
send, and refused with others.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from chatllama.config.limits import LEAST_TEMPERATURE, MOST_NEW_TOKENS, MOST_TEMPERATURE, MOST_TOP_K
from chatllama.text.chat_format import Message


def _temperature(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        least = {"least": LEAST_TEMPERATURE}
        raise PydanticCustomError("too_small", "must be 0 (the likeliest token) or {least}", least)
    return value


Temperature = Annotated[float, Field(ge=0, le=MOST_TEMPERATURE), AfterValidator(_temperature)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
StopString = Annotated[str, StringConstraints(max_length=200)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
StopIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)]
MaxTokens = Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)]
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128

# Arguments that are not supported, each with the values, or the types, that change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), (0,)),
    **dict.fromkeys(("repetition_penalty", "best_of"), (1,)),
    **dict.fromkeys(("echo", "use_beam_search", "ignore_eos"), (False,)),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("store", "parallel_tool_calls"), (bool,)),
    **dict.fromkeys(("metadata", "prediction", "prompt_cache_options"), (dict,)),
    **dict.fromkeys(("user", "safety_identifier"), (str,)),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), (str,)),
    "logit_bias": ({},),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "skip_special_tokens": (True,),
}


class Request(BaseModel):
    """Base of all requests and their parts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Arguments without a field, with the values and types that are accepted and not used."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if value is None:
                continue
            if name not in cls.neutral:
                kept[name] = value
            elif not any(_changes_nothing(value, each) for each in cls.neutral[name]):
                text = "{param}: not supported by this server"
                raise PydanticCustomError("unsupported", text, {"param": name})
        return kept


def _changes_nothing(given: object, neutral: object) -> bool:
    if isinstance(neutral, type):
        return type(given) is neutral
    both = type(given) is type(neutral) or isinstance(given, float)
    return both and given == neutral


class TextPart(Request):
    """A part of a message in OpenAI's list form."""

    type: Literal["text"]
    text: str


class ChatMessage(Request):
    """One message; a message of OpenAI's responses can be sent back as it is."""

    neutral = {
        **dict.fromkeys(("annotations",), (list,)),
        **dict.fromkeys(("name", "id"), (str,)),
        **dict.fromkeys(("refusal", "reasoning", "reasoning_content"), ("",)),
        "tool_calls": ([],),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> Message:
        """The message of the chat contract."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class StreamOptions(Request):
    """What a stream contains besides text."""

    neutral = {"include_obfuscation": (bool,), "continuous_usage_stats": (False,)}
    include_usage: bool = False
    """Whether a last chunk gives the number of tokens."""


class GenerationRequest(Request):
    """What chat and completion have in common."""

    neutral = NEUTRAL
    model: Name | None = None
    """base, sft, policy or a loaded adapter. null: the run's last stage."""
    temperature: Temperature = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOP_K)] = 0
    """0 or -1: all tokens."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    """Answers to each prompt."""
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    """Ends an answer and is not in it. Empty ones count as not given."""
    stop_token_ids: StopIds | None = None
    """Ends an answer, besides the end of turn."""
    seed: Seed | None = None
    """Makes the answer repeatable, independently of concurrent requests. -1: as not given."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """Whether choices contain `token_ids` and `prompt_token_ids`, as vLLM's do."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(stop for stop in given if stop)


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: Messages
    continue_final_message: bool = False
    """Go on with the last message, which is the assistant's, as vLLM does; the answer is what
    follows it. Without this such a message is refused."""
    add_generation_prompt: bool | None = None
    """vLLM's: false with continue_final_message, else true. null: so."""
    max_tokens: MaxTokens | None = None
    """Longest answer. null: `generation.max_new_tokens` of the run's config."""
    max_completion_tokens: MaxTokens | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    """Of the sampled tokens, at the sampling temperature (1 where that is 0), before top-p."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @field_validator("add_generation_prompt")
    @classmethod
    def _opens_or_continues(cls, opens: bool | None, info: ValidationInfo) -> bool | None:
        if opens is not None and opens == info.data.get("continue_final_message"):
            raise ValueError("must be the opposite of continue_final_message")
        return opens


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    """Text or token ids, one or several. Text gets the BOS token, ids are taken as they are."""
    max_tokens: MaxTokens = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """How many of the likeliest tokens to list besides each sampled one."""

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, all as text or all as token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: str | list) -> str | list:
        if not isinstance(prompt, str) and not len(prompt) >= 1:
            raise ValueError("give at least one prompt")
        return prompt


class ScoreRequest(Request):
    """Body of /v1/score."""

    model: Name = "reward"
    messages: Messages | None = None
    """One conversation that ends with an answer; or `conversations`."""
    conversations: Annotated[list[Messages], Field(min_length=1, max_length=64)] | None = None


class TokenKlRequest(Request):
    """Body of /v1/token_kl."""

    model: Name | None = None
    """The model that gave the answer. null: the run's last stage."""
    reference: Name | None = None
    """The model that it is compared with. null: what PPO starts from, sft or base."""
    messages: Messages
    """A conversation that ends with the answer."""


class LoadAdapter(Request):
    """Body of /v1/load_lora_adapter, as vLLM documents it."""

    lora_name: AdapterName
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    load_inplace: bool = False
    """Whether it may replace a loaded adapter of the same name."""


class UnloadAdapter(Request):
    """Body of /v1/unload_lora_adapter, as vLLM documents it."""

    lora_name: AdapterName
    lora_int_id: int | None = None
    """Accepted and not needed, as in vLLM."""


class Vote(Request):
    """Body of /v1/votes: which of two answers is better."""

    messages: Messages
    """The conversation that both answer; it ends with the user."""
    answers: Annotated[list[str], Field(min_length=2, max_length=2)]
    models: Annotated[list[Name], Field(min_length=2, max_length=2)]
    """The models that gave them."""
    verdict: Literal["a", "b", "tie", "both_bad"]
    reason: Annotated[str, StringConstraints(max_length=2000)] = ""

    @field_validator("messages")
    @classmethod
    def _full_turns(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        for number, message in enumerate(messages):
            if not message.plain()["content"].strip():
                raise ValueError(f"message {number} is empty, and so would be its turn in training")
        return messages

    @field_validator("answers")
    @classmethod
    def _not_empty(cls, answers: list[str]) -> list[str]:
        for answer in answers:
            if not answer.strip():
                raise ValueError("an answer is empty, so there is nothing to compare")
        return answers
