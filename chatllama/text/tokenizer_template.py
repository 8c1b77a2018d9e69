"""The tokenizer's chat template (Jinja), cut into the same segments as our layouts.

The template only writes text. Where answers start and end is found by rendering prefixes of the
conversation, and checked: the mask and the prompt are right, or the template is refused.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerFast

from chatllama.text.chat_templates import Segment
from chatllama.text.encoding import control_tokens, text_encoders
from chatllama.text.template_process import rendered

_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.{,200}?)\1\s*\)")
_PRIVATE_USE = range(0xE000, 0xF900)


def template_segments(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Any],
    prompt: bool,
    date: str | None,
    last_answer_only: bool,
) -> list[Segment]:
    """Segments of the text that the tokenizer's `chat_template` writes for checked messages.

    Text after the last answer's end-of-turn token is left out, so that a finished conversation
    ends there. `{% generation %}` tags are allowed and not needed. `prompt` opens an answer after
    the last user message. `date` (YYYY-MM-DD) stands for the day of the template's strftime_now.
    With `last_answer_only` answers before the last message are context, which the template may
    rewrite (Qwen3's drops their thoughts): such a turn is then marked as no answer.

    Raises:
        ValueError: the template refuses the conversation or exceeds its limits, rewrites an answer,
            does not write prompts as prefixes of the whole, or ends an answer without a control
            token.
    """
    names = sorted(control_tokens(tokenizer), key=len, reverse=True)
    controls = _control_pattern(tokenizer, names)
    mark, escaped = _escape(messages, names)
    answers = [i for i, message in enumerate(escaped) if message["role"] == "assistant"]
    template = frozen_template(tokenizer.get_chat_template(), date)
    text, *openings = rendered(
        template,
        tokenizer.special_tokens_map,
        [(escaped, prompt), *((escaped[:index], True) for index in answers)],
    )
    spans: list[tuple[int, int]] = []
    for index, opening in zip(answers, openings, strict=True):
        try:
            spans.append(_answer_span(text, opening, escaped[index]["content"], index, controls))
        except ValueError:
            if not last_answer_only or index == len(messages) - 1:
                raise
    if spans and messages[-1]["role"] == "assistant":
        text = text[: spans[-1][1]]
    bare = not text_encoders(tokenizer).prefixes_every_segment
    escapes = re.compile(f"{mark}(\\d+){mark}")
    segments = []
    for position, s in enumerate(_cut(text, spans, controls)):
        written = s.text if s.control else escapes.sub(lambda at: names[int(at[1])], s.text)
        continues = s.continues or (bare and position > 0)
        segments.append(replace(s, text=written, continues=continues))
    return segments


def frozen_template(template: str, date: str | None) -> str:
    """The template with a day in the place of the clock; ValueError where that cannot be done."""
    if date is None:
        return template
    day = datetime.fromisoformat(date)

    def written(call: re.Match[str]) -> str:
        escaped = call[2].encode("ascii", "backslashreplace")  # as Jinja reads its strings
        return json.dumps(day.strftime(escaped.decode("unicode-escape")), ensure_ascii=False)

    frozen = _CLOCK.sub(written, template)
    if found := re.search(r"strftime_now(?!\s+is\b).{,40}", frozen):
        raise ValueError(
            f"the tokenizer's chat template reads the clock in a way that cannot be frozen: "
            f"{found[0]!r}; write the format into the call, as in strftime_now('%d %b %Y')"
        )
    return frozen


def _answer_span(
    text: str, opening: str, answer: str, index: int, controls: re.Pattern[str]
) -> tuple[int, int]:
    """Start and end of the answer, its end-of-turn token included, in the whole text."""
    where = f"the tokenizer's chat template: message {index}"
    if not text.startswith(opening):
        raise ValueError(
            f"{where} is not preceded by the prompt that the template writes for it, so what is "
            "sampled would not follow what was trained; choose another chat.template"
        )
    end = controls.search(text, len(opening))
    if end is None:
        raise ValueError(f"{where} is not ended by a special token, so no answer could end")
    if answer.strip() not in text[len(opening) : end.start()]:
        raise ValueError(
            f"{where} is not written as it is after the prompt (generation prompt missing, or the "
            f"template changes answers): {text[len(opening) : len(opening) + 80]!r}"
        )
    return len(opening), end.end()


def _cut(text: str, spans: list[tuple[int, int]], controls: re.Pattern[str]) -> Iterator[Segment]:
    """Segments between control tokens and answer boundaries, in order."""
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    after_text = False
    for start, stop in pairwise(edges):
        answer = (start, stop) in spans
        position = start
        for found in controls.finditer(text, start, stop):
            if found.start() > position:
                yield Segment(text[position : found.start()], False, answer, after_text)
            yield Segment(found.group().strip(), True, answer)
            position, after_text = found.end(), False
        if stop > position:
            yield Segment(text[position:stop], False, answer, after_text)
            after_text = True


def _control_pattern(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> re.Pattern[str]:
    """Finds control tokens as the tokenizer does, with the blanks that it strips around them."""
    tokens = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    before = {name: r"\s*" if tokens[name].lstrip else "" for name in names}
    after = {name: r"\s*" if tokens[name].rstrip else "" for name in names}
    return re.compile("|".join(before[name] + re.escape(name) + after[name] for name in names))


def _escape(messages: Sequence[Any], names: list[str]) -> tuple[str, list[dict[str, str]]]:
    """The mark around the numbers that replace special tokens in texts, and the messages so."""
    everything = "".join(message["content"] for message in messages)
    mark = next((chr(c) for c in _PRIVATE_USE if chr(c) not in everything), None)
    if mark is None:
        raise ValueError("the messages use every private-use character of Unicode")
    pattern = re.compile("|".join(re.escape(name) for name in names))
    escaped = [
        pattern.sub(lambda found: f"{mark}{names.index(found.group())}{mark}", message["content"])
        for message in messages
    ]
    roles = [message["role"] for message in messages]
    return mark, [{"role": r, "content": text} for r, text in zip(roles, escaped, strict=True)]
