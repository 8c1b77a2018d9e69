"""OpenAI's client and the server's schema: null, unused arguments, messages that are sent back."""

import time
from typing import Any, get_type_hints

import pytest
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatParams,
)
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from pydantic import ValidationError

from chatllama.serving.errors import of_validation
from chatllama.serving.schema import (
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    ScoreRequest,
    TokenKlRequest,
    UnloadAdapter,
    Vote,
)

VOTE = {"answers": ["a", "b"], "models": ["x", "y"], "verdict": "a"}
PART = {"type": "text", "text": "a"}
ASK = [{"role": "user", "content": "hi"}]
# What openai-python 2.x declares for chat.completions.create; the installed version is read below.
VERSION_2 = [
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
    "max_completion_tokens", "max_tokens", "metadata", "modalities", "n", "parallel_tool_calls",
    "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_retention",
    "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop",
    "store", "stream", "stream_options", "temperature", "tool_choice", "tools", "top_logprobs",
    "top_p", "user", "verbosity", "web_search_options"
]  # fmt: skip


def refused(body: dict[str, Any], cls: Any = ChatRequest) -> Any:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return of_validation(errors).detail


def test_null_is_not_given_for_every_argument_of_two_major_versions_of_the_client() -> None:
    chat = {"messages", "model"} ^ get_type_hints(ChatParams).keys()
    assert {"store", "metadata", "prediction"} <= chat
    for name in {*VERSION_2, *chat, "an_argument_of_the_next_version"}:
        asked = ChatRequest.model_validate({"messages": ASK, "model": "base", name: None})
        assert asked == ChatRequest.model_validate({"messages": ASK, "model": "base"}), name
    for name in get_type_hints(TextParams).keys() - {"prompt"}:
        CompletionRequest.model_validate({"prompt": "a", name: None})
    every = dict.fromkeys([*VERSION_2, *chat])
    ChatRequest.model_validate({"messages": ASK, **every})


@pytest.mark.parametrize(
    ("cls", "body"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": "a", "cache_control": None}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [PART | {"annotations": None}]}]}),
        (ChatRequest, {"messages": ASK, "stream": True, "stream_options": {"include_usage": None}}),
        (LoadAdapter, {"lora_name": "a", "lora_path": "b", "load_inplace": None, "base": None}),
        (Vote, {"messages": ASK, **VOTE, "reason": None, "at": None}),
        (CompletionRequest, {"prompt": "a", "stop": None, "logprobs": None, "vllm_xargs": None}),
        (ScoreRequest, {"messages": ASK, "conversations": None, "model": None, "user": None}),
        (TokenKlRequest, {"messages": ASK, "reference": None, "model": None, "n": None}),
        (UnloadAdapter, {"lora_name": "a", "lora_int_id": None, "base": None}),
    ],
)  # fmt: skip
def test_null_is_not_given_at_any_place(cls: Any, body: dict[str, Any]) -> None:
    cls.model_validate(body)


@pytest.mark.parametrize(
    "extra",
    [
        {"store": True, "metadata": {"a": "b"}, "user": "me"},
        {"seed": -1}, {"seed": -(2**63)}, {"stop": ""}, {"stop": ["", "x"]},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"prompt_cache_key": "k", "safety_identifier": "s", "prompt_cache_retention": "24h"},
        {"continue_final_message": False, "add_generation_prompt": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": None},
        {"prediction": {"type": "content", "content": "a"}, "parallel_tool_calls": False},
        {"prompt_cache_options": {"mode": "explicit"}, "response_format": {"type": "text"}},
    ],
)  # fmt: skip
def test_what_does_not_change_the_answer_is_accepted(extra: dict[str, Any]) -> None:
    asked = ChatRequest.model_validate({"messages": ASK, **extra})
    assert "" not in asked.stops


@pytest.mark.parametrize(
    "extra",
    [
        {}, {"annotations": []}, {"tool_calls": [], "audio": None}, {"reasoning_content": None},
        {"name": "Anna", "refusal": None},
        {"reasoning_content": "", "reasoning": "", "refusal": "", "id": "msg_1"},
    ],
)  # fmt: skip
def test_a_message_of_the_client_can_be_sent_back_as_it_is(extra: dict[str, Any]) -> None:
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": "yes", **extra})
    asked = ChatRequest.model_validate({"messages": [*ASK, message.model_dump(), *ASK]})
    assert asked.messages[1].plain() == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"metadata": "no object"}, "metadata"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x", None]}, "stop"),
        ({"banana-split": 1}, "banana-split"),
        ({"temperature": 1e-39}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"top_k": 9223372036854775808}, "top_k"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"n": 129}, "n"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "tool_calls"),
        ({"continue_final_message": 1}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)  # fmt: skip
def test_errors_name_their_parameter(extra: dict[str, Any], param: str) -> None:
    detail = refused({"messages": ASK, **extra})
    assert detail.param is not None and detail.param.startswith(param)
    assert param in detail.message
    assert "[" not in detail.param and not {"str", "int"} & set(detail.param.split("."))


@pytest.mark.parametrize("value", [0, 1e-4, 0.7, 1, 100])
def test_useful_temperatures_are_accepted(value: float) -> None:
    ChatRequest.model_validate({"messages": ASK, "temperature": value})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [None] * 200_000},
        {"prompt": [[1, "x"]] * 50_000},
        {"prompt": [1.5] * 200_000},
        {"prompt": "a", "stop": [5] * 200_000},
    ],
)
def test_many_wrong_parts_are_refused_at_the_first(body: dict[str, Any]) -> None:
    started = time.process_time()
    detail = refused(body, CompletionRequest)
    assert len(detail.message) < 600
    assert time.process_time() - started < 0.5
