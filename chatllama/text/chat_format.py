"""A conversation as token ids and a loss mask: the one contract of SFT, reward, PPO and chat.

`render` is the only way from messages to ids. The layouts are in `chat_templates.py`; this module
turns them into ids, checks messages, and hashes the contract so that a mismatch is refused.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, TypedDict, get_args

from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.text import chat_templates as templates
from chatllama.text.chat_templates import Segment
from chatllama.text.encoding import control_tokens, encode
from chatllama.text.tokenizer_files import has_template
from chatllama.text.tokenizer_template import template_segments

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids."""

    ids: list[int]
    """(T,) token ids, BOS included."""
    mask: list[bool]
    """(T,) True on the assistant's tokens and the token that ends each of its turns."""


_CONTROLS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
_DEFAULT_SYSTEM = {"alpaca": templates.ALPACA_SYSTEM, "vicuna": templates.VICUNA_SYSTEM}
# Conversations of the contract's hash: turns, spaces, line breaks, digits, bytes, special strings.
_HASHED: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hi  there\n 1234"}, {"role": "assistant", "content": "Yes."}],
    [
        {"role": "user", "content": "a</s> [INST] naïve 日本語"},
        {"role": "assistant", "content": "  one\n\ttwo 🙂"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "done"},
    ],
)

_TALK = ("Who wrote this?", "Anna, in 1912.", "And where?", "At home.")
_COMPARED: tuple[list[Message], ...] = tuple(
    [{"role": "assistant" if i % 2 else "user", "content": _TALK[i]} for i in range(length)]
    for length in range(1, 5)
)
"""One question to two exchanges, without the blanks that only some templates keep."""


def settled(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> ChatSection:
    """The section with the template that `auto` comes to with this tokenizer."""
    if chat.template != "auto":
        return chat
    own = has_template(tokenizer.chat_template)
    return chat.model_copy(update={"template": "tokenizer" if own else "llama2"})


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError at the first message that is out of order or not a message.

    In order: at most one system message first, then user and assistant in turn.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    expected: tuple[str, ...] = ("system", "user")
    for index, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {index}: content must be a string")
        role = message.get("role")
        if role not in expected:
            raise ValueError(f"message {index} has role {role!r}; expected {' or '.join(expected)}")
        expected = ("assistant",) if role == "user" else ("user",)
    if len(messages) == 1 and messages[0]["role"] == "system":
        raise ValueError("message 0 is a system message and no user message follows it")


def render(
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    last_answer_only: bool = False,
) -> Rendered:
    """Ids and loss mask of a conversation; ids of a prompt begin those of prompt plus answer.

    Segments are tokenised one by one and control tokens put in as ids, so text never becomes a
    special token and an answer's tokens never merge with its prompt's. Blanks around a message are
    dropped (with `template: tokenizer`: as that template does). The system prompt is the
    conversation's, else `chat.system`, else the layout's own; "" means none.
    `add_generation_prompt` opens the assistant's turn after a last user message;
    `continue_final_message` leaves the assistant's last turn open behind its text, for more of it.
    With any of both, or `last_answer_only`, earlier answers are context: turns that the tokenizer's
    template rewrites are allowed, and outside the mask.

    Raises:
        ValueError: messages out of order (see `check_messages`), a layout whose tokens the
            vocabulary lacks, or a last message that cannot be answered, or not be continued.
    """
    check_messages(messages)
    assert not (add_generation_prompt and continue_final_message)
    if add_generation_prompt and messages[-1]["role"] != "user":
        raise ValueError(
            f"the last message, number {len(messages) - 1}, is the assistant's own: end with the "
            "user, or have it continued (continue_final_message)"
        )
    controls = control_tokens(tokenizer)
    ids: list[int] = []
    mask: list[bool] = []
    last_answer_only = last_answer_only or add_generation_prompt or continue_final_message
    parts = list(_segments(tokenizer, chat, messages, add_generation_prompt, last_answer_only))
    if continue_final_message:
        parts = _unfinished(parts, messages)
    for p in parts:
        new = [controls[p.text]] if p.control else encode(tokenizer, p.text, continues=p.continues)
        ids += new
        mask += [p.answer] * len(new)
    return Rendered(ids, mask)


def _unfinished(parts: list[Segment], messages: Sequence[Message]) -> list[Segment]:
    """The segments up to the end of the last answer's text, without what ends its turn."""
    number, answer = len(messages) - 1, messages[-1]["content"].strip()
    if messages[-1]["role"] != "assistant" or not answer:
        raise ValueError(
            f"continue_final_message: message {number} is "
            f"{'empty' if not answer else 'not the assistant'}, so nothing can be continued"
        )
    texts = [i for i, part in enumerate(parts) if part.answer and not part.control]
    last = texts[-1] if texts else -1
    if answer not in parts[last].text:
        raise ValueError(f"continue_final_message: the chat template rewrites message {number}")
    end = parts[last].text.rindex(answer) + len(answer)
    return [*parts[:last], replace(parts[last], text=parts[last].text[:end])]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> list[int]:
    """Stop tokens of an assistant's turn: the one that `render` writes first, then the EOS."""
    answered = render(tokenizer, chat, _HASHED[1])
    return list(dict.fromkeys([answered.ids[-1], _eos_id(tokenizer)]))


def contract_hash(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> str:
    """16 hex digits that change with the layout, the system prompt and the tokenizer."""
    chat = settled(tokenizer, chat)
    rendered = [render(tokenizer, chat, each, last_answer_only=True) for each in _HASHED]
    return _digest(
        [
            chat.template,
            [[r.ids, r.mask] for r in rendered],
            render(tokenizer, chat, _HASHED[0], add_generation_prompt=True).ids,
            _vocabulary_hash(tokenizer),
            [tokenizer.pad_token_id, end_of_turn_ids(tokenizer, chat)],
        ]
    )


def describe_contract(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> dict[str, Any]:
    """The contract as JSON values, saved beside every adapter."""
    chat = settled(tokenizer, chat)
    own = chat.template == "tokenizer"
    return {
        "template": chat.template,
        "system": chat.system,
        "date": chat.date,
        "hash": contract_hash(tokenizer, chat),
        "vocabulary_hash": _vocabulary_hash(tokenizer),
        "chat_template_hash": _digest(tokenizer.chat_template) if own else None,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "end_of_turn_ids": end_of_turn_ids(tokenizer, chat),
    }


def template_line(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> str:
    """A line that says which chat template is used; a warning where the tokenizer's own differs."""
    name = settled(tokenizer, chat).template
    if name == "tokenizer":
        return "chat template: the tokenizer's own"
    if not has_template(tokenizer.chat_template):
        return f"chat template: {name}; the tokenizer has none of its own"
    own = chat.model_copy(update={"template": "tokenizer"})
    try:
        ours, theirs = (
            [
                render(tokenizer, each, said, add_generation_prompt=len(said) % 2 == 1)
                for said in _COMPARED
            ]
            for each in (chat, own)
        )
    except ValueError as error:
        return f"chat template: {name}; the tokenizer's own cannot be used ({error})"
    if ours == theirs:
        return f"chat template: {name}, which writes the tokens of the tokenizer's own"
    return (
        f"warning: chat.template {name} writes other tokens than the tokenizer's own chat "
        "template. A model that was tuned on its own answers worse under another: set "
        f"chat.template: tokenizer, unless it was tuned on {name}"
    )


def check_contract(
    expected: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    where: str,
) -> None:
    """Raises ValueError, naming every difference, if tokenizer and chat have another contract.

    `expected` is from `describe_contract`, None where there is none; `where` names the path or
    stage that holds it.
    """
    if expected is None:
        raise ValueError(f"{where}: chatllama.json names no chat contract")
    found = describe_contract(tokenizer, chat)
    expected = {"date": found["date"], **expected}  # not recorded by earlier versions
    labels = {
        "date": "chat.date (which can be set in the config)",
        "template": "chat.template",
        "system": "chat.system (system prompt)",
        "vocabulary_hash": "tokenizer (vocabulary)",
        "chat_template_hash": "tokenizer (chat_template)",
        "bos_token_id": "tokenizer (BOS)",
        "eos_token_id": "tokenizer (EOS)",
        "pad_token_id": "tokenizer (padding)",
        "end_of_turn_ids": "end of turn",
    }
    if missing := [key for key in (*labels, "hash") if key not in expected]:
        raise ValueError(f"{where}: the chat contract lacks {', '.join(missing)}")
    differing = [
        f"{label}: {repr(expected[key])[:200]} there, {repr(found[key])[:200]} here"
        for key, label in labels.items()
        if expected[key] != found[key]
    ]
    if not differing and expected["hash"] != found["hash"]:
        differing = ["tokenizer or layout: the same conversations give other token ids"]
    if differing:
        raise ValueError(f"{where} was made under another chat contract: {'; '.join(differing)}")


def _segments(
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    messages: Sequence[Message],
    prompt: bool,
    last_answer_only: bool = False,
) -> Iterable[Segment]:
    chat = settled(tokenizer, chat)
    if chat.template == "tokenizer":
        if not has_template(tokenizer.chat_template):
            raise ValueError(
                "chat.template is 'tokenizer' but this tokenizer has no chat_template; choose "
                f"{_fitting(tokenizer)}"
            )
        if messages[0]["role"] != "system" and chat.system is not None:
            messages = [{"role": "system", "content": chat.system}, *messages]
        return template_segments(tokenizer, messages, prompt, chat.date, last_answer_only)
    if lacking := _lacking(tokenizer, chat.template):
        raise ValueError(
            f"chat.template {chat.template!r} needs the token {lacking[0]!r}, which this tokenizer "
            f"lacks, and the vocabulary is never enlarged: choose {_fitting(tokenizer)}"
        )
    turns, system = _turns(chat, messages)
    _eos_id(tokenizer)
    ends = templates.Ends(opening_bos(tokenizer, chat), str(tokenizer.eos_token))
    assert chat.template != "auto"
    match chat.template:
        case "llama2":
            return templates.llama2(turns, system, ends)
        case "alpaca":
            return templates.alpaca(turns, system, ends, prompt)
        case "vicuna":
            return templates.vicuna(turns, system, ends, prompt)
        case "llama3":
            return templates.llama3(turns, system, ends, prompt)
        case "chatml":
            return templates.chatml(turns, system, ends, prompt)


def _lacking(tokenizer: PreTrainedTokenizerFast, layout: str) -> list[str]:
    """The control tokens of a layout that the vocabulary does not have."""
    return [name for name in _CONTROLS.get(layout, ()) if name not in control_tokens(tokenizer)]


def _fitting(tokenizer: PreTrainedTokenizerFast) -> str:
    """The layouts that can be chosen with this tokenizer, as text."""
    names = [name for name in get_args(ChatSection.model_fields["template"].annotation)
             if not _lacking(tokenizer, name)]  # fmt: skip
    names = [name for name in names if name != "tokenizer" or has_template(tokenizer.chat_template)]
    names.remove("auto")
    return f"{', '.join(names[:-1])} or {names[-1]}"


def opening_bos(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> str:
    """The BOS that opens a conversation in one of our layouts; "" for none.

    None, too, where it is the control token with which the layout's first message begins anyway.
    """
    bos = str(tokenizer.bos_token or "")
    return "" if bos in _CONTROLS.get(chat.template, ())[:1] else bos


def default_system(chat: ChatSection) -> str:
    """System prompt of a conversation without one; "" for none."""
    return chat.system if chat.system is not None else _DEFAULT_SYSTEM.get(chat.template, "")


def _turns(chat: ChatSection, messages: Sequence[Message]) -> tuple[list[templates.Turn], str]:
    """Question and answer pairs without outer blanks, and the system prompt."""
    system = default_system(chat)
    texts = [message["content"].strip() for message in messages]
    if messages[0]["role"] == "system":
        system, *texts = texts
    return list(zip_longest(texts[::2], texts[1::2])), system.strip()


def _eos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    index = tokenizer.eos_token_id
    if not isinstance(index, int):
        raise ValueError("the tokenizer has no EOS token; load it with load_tokenizer")
    return index


def _vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    return _digest(sorted(tokenizer.get_vocab().items()))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
