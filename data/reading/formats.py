"""Record formats: from the keys of a decoded object to turns, one function a format.

What the turns can be used for is decided in `records.py`; formats that are another one in other
words are converted in `conversions.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from chatllama.config.sources import Format

if TYPE_CHECKING:  # importing it takes seconds
    from chatllama.text.chat_format import Message

Raw = Mapping[str, object]

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "agent", "bot", "chatbot"),
        "assistant",
    ),
}
PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
WEIGHTS = ("weight", "loss_weight", "train", "training")
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
UNTRAINED = "untrained"
"""The key of a message that is not trained on; `records.py` moves it out of the messages."""


class RecordError(ValueError):
    """A malformed file or record; the message begins with its place, `file:line`."""


class Malformed(ValueError):
    """The object does not have its format; `records.py` adds the place."""


class Unusable(ValueError):
    """A well-formed record that cannot be used; the message is the reason to count."""


def conversation(fields: Raw, format: Format, *, prompts_only: bool) -> list[Message]:
    """The turns of a record that is not a pair; with `prompts_only` the answer may be missing."""
    if format == "messages" or (format == "prompts" and "messages" in fields):
        return _with_system(fields, _turns(fields.get("messages"), "messages"))
    if format == "sharegpt":
        return _from_question(
            _with_system(fields, _turns(fields.get("conversations"), "conversations"))
        )
    answer = "output" if format == "alpaca" else "completion"
    prompt = _prompt_under(fields, "instruction" if format == "alpaca" else "prompt")
    if format == "prompts" or (prompts_only and fields.get(answer) is None):
        return prompt
    if format == "alpaca":
        return [*prompt, _message("assistant", string(fields, answer))]
    return prompt + _turns_or_text(fields.get(answer), answer, "assistant")


def _from_question(turns: list[Message]) -> list[Message]:
    """ShareGPT's dialogues may open with the assistant; its turns before the question are cut."""
    begin = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
    return [turn for i, turn in enumerate(turns) if i >= begin or turn["role"] == "system"]


def role_of(turn: object) -> str | None:
    """The role of a turn of a ShareGPT dialogue; None for an unknown one."""
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    return ROLES.get(str(speaker).strip().lower())


def _alpaca_prompt(fields: Raw) -> list[Message]:
    """System, history and instruction; the input follows its instruction after a blank line."""
    system = _system(fields)
    turns = [_message("system", system)] if system else []
    history = fields.get("history")
    for past in checked_list([] if history is None else history, "history"):
        exchange = checked_list(past, "history")
        if len(exchange) != 2:
            raise Malformed(f"history: expected [question, answer], got {shorten(exchange)}")
        turns.append(_message("user", _checked(exchange[0], "history")))
        turns.append(_message("assistant", _checked(exchange[1], "history")))
    parts = (string(fields, "instruction"), string(fields, "input", ""))
    turns.append(_message("user", "\n\n".join(part for part in parts if part.strip())))
    return turns


def _with_system(fields: Raw, turns: list[Message]) -> list[Message]:
    """`turns` after the system prompt that is in a column of its own."""
    system = _system(fields)
    if not system.strip() or (turns and turns[0] == _message("system", system)):
        return turns
    return [_message("system", system), *turns]


def _system(fields: Raw) -> str:
    """The system prompt; Orca's is under `system_prompt`."""
    return string(fields, "system_prompt" if fields.get("system") is None else "system", "")


def _turns_or_text(value: object, name: str, role: str) -> list[Message]:
    """Messages, from a string, from one message, or from a list of them."""
    if isinstance(value, str):
        return [_message(role, _checked(value, name))]
    return _turns([value] if isinstance(value, Mapping) else value, name)


def _turns(value: object, name: str) -> list[Message]:
    return [
        _turn(mapping(turn, f"{name}[{i}]"), f"{name}[{i}]")
        for i, turn in enumerate(checked_list(value, name))
    ]


def _turn(turn: Raw, name: str) -> Message:
    """One message, from `role`/`content` or from `from`/`value`."""
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str):
        raise Malformed(f"{name}: {role_key!r} must name the speaker, got {shorten(role)}")
    name_of_role = role.strip().lower()
    if name_of_role not in ROLES:
        raise Unusable(f"role {role!r} (known: {', '.join(ROLES)})")
    role = ROLES[name_of_role]
    trained = _is_trained(turn, role)
    content = turn.get(content_key)
    if isinstance(content, list):
        parts = [_part(part, name) for part in cast("list[object]", content)]
        content = "".join(parts)
    message = _message(role, _checked(content, f"{name}.{content_key}"))
    return message if trained else cast("Message", {**message, UNTRAINED: True})


def flag(value: object) -> bool | None:
    """True or False of a boolean, of 0 and 1, and of either as text (csv); None for others."""
    return _FLAGS.get(str(value).strip().lower())


def _is_trained(turn: Raw, role: str) -> bool:
    """Whether the marks of a turn leave it in the training.

    Raises:
        Unusable: a mark that cannot be honoured.
    """
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("tool calls")
    trained = True
    for key in (*WEIGHTS, "mask"):
        value = turn.get(key)
        if value is None or value == "":
            continue
        given = flag(value)
        if key == "mask" or given is None or (given and role != "assistant"):
            raise Unusable(f"{key}: {shorten(value)} on a turn of the {role}")
        trained = trained and (given or role != "assistant")
    return trained


def _part(part: object, name: str) -> str:
    """The text of one part of a message whose content is a list."""
    fields = mapping(part, name)
    if fields.get("type") != "text":
        raise Unusable(f"content of type {shorten(fields.get('type'))}, not text")
    return string(fields, "text" if "text" in fields else "value")


def _transcript(fields: Raw, key: str) -> list[Message]:
    """Turns of an Anthropic HH transcript, without the white space around them."""
    text = string(fields, key)
    if not text.startswith(HUMAN):
        raise Malformed(f"{key}: a transcript begins with {HUMAN!r}, got {shorten(text)}")
    turns: list[Message] = []
    for exchange in text.split(HUMAN)[1:]:
        question, *answers = exchange.split(ASSISTANT)
        turns.append(_message("user", question.strip()))
        turns.extend(_message("assistant", answer.strip()) for answer in answers)
    return turns


def pair(fields: Raw, format: Format) -> tuple[list[Message], list[Message]]:
    """Both conversations of a pair; a bare answer is put after the prompt."""
    if format == "hh":
        return _transcript(fields, "chosen"), _transcript(fields, "rejected")
    prompt = _prompt(fields)
    return _side(fields, "chosen", prompt), _side(fields, "rejected", prompt)


def ranking(fields: Raw) -> tuple[list[Message], list[str], list[int], list[float]]:
    """Prompt, answers from best to worst, their ranks and ratings.

    The answers are in `answers` (or in a list under `output`, with an Alpaca prompt), best first.
    `ranks` may give their ties (equal numbers, lower is better); `scores` may rate them (equal
    numbers tie, higher is better, differences are margins). The ranks returned begin at 0.
    """
    prompt = _prompt(fields)
    if prompt is None:
        raise Malformed(f"ranked answers need one of the keys {PROMPT_KEYS}")
    key = "answers" if "answers" in fields else "output"
    answers = [_checked(answer, key) for answer in checked_list(fields.get(key), key)]
    if not answers:
        raise Unusable("no answers")
    if fields.get("ranks") is not None and fields.get("scores") is not None:
        raise Malformed("give `ranks` or `scores`, not both")
    ratings, order = [0.0] * len(answers), [float(i) for i in range(len(answers))]
    if fields.get("ranks") is not None:
        order = _numbers(fields["ranks"], "ranks", len(answers))
    if fields.get("scores") is not None:
        ratings = _numbers(fields["scores"], "scores", len(answers))
        order = [-rating for rating in ratings]
    if order != sorted(order):
        raise Malformed(f"{key}: the answers must go from best to worst, their order is {order}")
    places = sorted(set(order))
    return prompt, answers, [places.index(place) for place in order], ratings


def _prompt(fields: Raw) -> list[Message] | None:
    """The turns under the prompt key that the record has; None if it has none."""
    key = next((key for key in PROMPT_KEYS if fields.get(key) is not None), None)
    return None if key is None else _prompt_under(fields, key)


def _prompt_under(fields: Raw, key: str) -> list[Message]:
    if key == "instruction":
        return _alpaca_prompt(fields)
    return _with_system(fields, _turns_or_text(fields.get(key), key, "user"))


def _side(fields: Raw, key: str, prompt: list[Message] | None) -> list[Message]:
    answer = _turns_or_text(fields.get(key), key, "assistant")
    if len(answer) == 1 and answer[0]["role"] == "assistant":
        if prompt is None:
            raise Malformed(f"an answer alone in {key!r} needs one of the keys {PROMPT_KEYS}")
        return prompt + answer
    if prompt is not None and answer[:-1] != prompt:
        raise Unusable("the conversation does not begin with the prompt")
    return answer


def margin(fields: Raw) -> float:
    """How much better `chosen` is; 0 if the record does not say."""
    value = fields.get("margin")
    return 0.0 if value is None else number(value, "margin")


def _numbers(value: object, name: str, count: int) -> list[float]:
    numbers = [number(each, name) for each in checked_list(value, name)]
    if len(numbers) != count:
        raise Malformed(f"{name}: expected one number for each of {count} answers, got {numbers}")
    return numbers


def is_number(value: object) -> bool:
    """Whether `value` is a number, of a csv also as text."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: object, name: str) -> float:
    """`value`, if it is a finite number; of a csv also as text."""
    made = float(cast(float, value)) if is_number(value) else math.nan
    if not math.isfinite(made):
        raise Malformed(f"{name}: expected a finite number, got {shorten(value)}")
    return made


def shorten(value: object, limit: int = 80) -> str:
    """`value` as Python writes it, cut to `limit` characters."""
    written = repr(value)
    return written if len(written) <= limit else written[: limit - 3] + "..."


def mapping(value: object, name: str) -> Raw:
    """`value`, if it is an object with keys."""
    if not isinstance(value, Mapping):
        raise Malformed(f"{name}: expected an object with keys, got {shorten(value)}")
    return cast(Raw, value)


def keys_of(fields: Raw) -> list[str]:
    """The keys of an object, for errors."""
    return sorted(map(str, fields))


def objects(value: object, name: str) -> list[Raw]:
    """`value`, if it is a list of objects."""
    return [mapping(each, f"{name}[{i}]") for i, each in enumerate(checked_list(value, name))]


def checked_list(value: object, name: str) -> list[object]:
    """`value`, if it is a list."""
    if not isinstance(value, list):
        raise Malformed(f"{name}: expected a list, got {shorten(value)}")
    return cast("list[object]", value)


def _checked(value: object, name: str) -> str:
    """`value`, if it is text that can be encoded."""
    if not isinstance(value, str):
        raise Malformed(f"{name}: expected a string, got {shorten(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise Unusable("half of a surrogate pair in the text")
    return value


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of a JSON text; a duplicate key is an error."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is twice in one object")
    return made


def string(fields: Raw, key: str, default: str | None = None) -> str:
    """`fields[key]`; `default` if the key is missing or null, or an error if that is None."""
    value = fields.get(key)
    if value is None and default is not None:
        return default
    if key not in fields:
        hint = "or say which column holds what, as in `format: {prompt: question, completion: a}`"
        raise Malformed(f"key {key!r} is missing; the record has {keys_of(fields)}; {hint}")
    return _checked(value, key)


def _message(role: str, content: str) -> Message:
    return cast("Message", {"role": role, "content": content})
