"""Bodies of the server's requests: OpenAI's API, vLLM's for adapters, and ours.

Unknown arguments are refused by name. Those of OpenAI's and vLLM's that are not supported are
accepted with the value that changes nothing, which many clients send, and refused with others.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from chatllama.text.chat_format import Message

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
StopIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)]
MaxTokens = Annotated[int, Field(ge=1)]
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128

# Arguments that are not supported, each with the values that change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), (None, 0)),
    **dict.fromkeys(("repetition_penalty", "best_of"), (None, 1)),
    **dict.fromkeys(("store", "echo", "use_beam_search", "ignore_eos"), (None, False)),
    **dict.fromkeys(("logit_bias", "metadata"), (None, {})),
    **dict.fromkeys(("tools", "functions"), (None, [])),
    **dict.fromkeys(("tool_choice", "function_call"), (None, "none", "auto")),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "service_tier": (None, "auto", "default"),
    "suffix": (None, ""),
    "skip_special_tokens": (None, True),
}


class Request(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Request):
    """A part of a message in OpenAI's list form."""

    type: Literal["text"]
    text: str


class ChatMessage(Request):
    """One message; the null fields are those of OpenAI's responses, so they can be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None

    def plain(self) -> Message:
        """The message of the chat contract."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class StreamOptions(Request):
    """What a stream contains besides text."""

    include_usage: bool = False
    """Whether a last chunk gives the number of tokens."""


class GenerationRequest(Request):
    """What chat and completion have in common."""

    model: Name | None = None
    """base, sft, policy or a loaded adapter. null: the run's last stage."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    """0 or -1: all tokens."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    """Answers to each prompt."""
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    """Ends an answer and is not in it."""
    stop_token_ids: StopIds | None = None
    """Ends an answer, besides the end of turn."""
    seed: Seed | None = None
    """Makes the answer repeatable, independently of concurrent requests."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """Whether choices contain `token_ids` and `prompt_token_ids`, as vLLM's do."""
    user: str | None = None
    """For the client's own records; not used."""

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, body: Any) -> Any:
        return without_neutral(body)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_tokens: MaxTokens | None = None
    """Longest answer. null: `generation.max_new_tokens` of the run's config."""
    max_completion_tokens: MaxTokens | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    """Of the sampled tokens, at the sampling temperature (1 where that is 0), before top-p."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
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
    reference: Name = "sft"
    """The model that it is compared with."""
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

    @field_validator("answers")
    @classmethod
    def _not_empty(cls, answers: list[str]) -> list[str]:
        for answer in answers:
            if not answer.strip():
                raise ValueError("an answer is empty, so there is nothing to compare")
        return answers


def without_neutral(body: Any) -> Any:
    """The body without unsupported arguments that change nothing; others raise ValueError."""
    if not isinstance(body, dict):
        return body
    for name, values in NEUTRAL.items():
        if name not in body:
            continue
        given = body[name]
        same = any(type(given) is type(v) and given == v for v in values) or (
            isinstance(given, float) and not isinstance(given, bool) and given in values
        )
        if not same:
            raise ValueError(f"{name}: not supported by this server")
    return {name: value for name, value in body.items() if name not in NEUTRAL}
