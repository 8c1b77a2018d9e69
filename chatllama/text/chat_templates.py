"""The layouts of a conversation, as segments of text and control tokens.

Each layout is one generator that reads as the format itself. `chat_format.py` turns segments into
ids and a mask, and checks messages.
"""

from collections.abc import Iterator
from dataclasses import dataclass

LLAMA2_SYSTEM = "<<SYS>>\n{}\n<</SYS>>\n\n"
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Turn = tuple[str, str | None]
"""A user's text and the assistant's answer, None if it is still to come."""


@dataclass(frozen=True)
class Segment:
    """Part of a conversation that is tokenised by itself."""

    text: str
    """Plain text, or the name of a control token."""
    control: bool = False
    """The text names one token of the vocabulary."""
    answer: bool = False
    """Written by the assistant: counts in the loss."""
    continues: bool = False
    """Plain text that follows other text: gets no dummy prefix."""


@dataclass(frozen=True)
class Ends:
    """The tokenizer's tokens around a text: `bos` is "" where it has none."""

    bos: str
    eos: str

    def opening(self) -> Iterator[Segment]:
        """BOS, where there is one."""
        if self.bos:
            yield Segment(self.bos, control=True)


def llama2(turns: list[Turn], system: str, ends: Ends) -> Iterator[Segment]:
    """LLaMA-2-chat: `<s>[INST] question [/INST] answer</s>`, BOS and EOS around every pair.

    Source: `chat_completion` in llama/generation.py of meta-llama/llama. Departure: Meta encodes a
    space between answer and `</s>`; it would be a token that the model must emit before it can
    end, so it is left out. Sampling from the prompt then gives exactly the layout of training.
    """
    for index, (user, answer) in enumerate(turns):
        yield from ends.opening()
        prefix = LLAMA2_SYSTEM.format(system) if system and index == 0 else ""
        yield Segment(f"[INST] {(prefix + user).strip()} [/INST]")
        if answer is not None:
            yield from _spaced_answer(answer, ends)


def alpaca(turns: list[Turn], system: str, ends: Ends, prompt: bool) -> Iterator[Segment]:
    """Stanford Alpaca's headings; further turns repeat them after EOS and an empty line.

    Source: PROMPT_DICT in train.py of tatsu-lab/stanford_alpaca. Departure: a line break ends
    `### Response:`, as most later users of the layout write it.
    """
    yield from ends.opening()
    for index, (user, answer) in enumerate(turns):
        preamble = f"{system}\n\n" if system and index == 0 else "\n\n" if index else ""
        heading = "\n\n### Response:\n" if answer is not None or prompt else ""
        yield Segment(f"{preamble}### Instruction:\n{user}{heading}", continues=index > 0)
        if answer is not None:
            yield Segment(answer, answer=True, continues=True)
            yield Segment(ends.eos, control=True, answer=True)


def vicuna(turns: list[Turn], system: str, ends: Ends, prompt: bool) -> Iterator[Segment]:
    """Vicuna v1.1: `system USER: question ASSISTANT: answer</s>USER: ...`.

    Source: `vicuna_v1.1` in fastchat/conversation.py of lm-sys/FastChat.
    """
    yield from ends.opening()
    for index, (user, answer) in enumerate(turns):
        preamble = f"{system} " if system and index == 0 else ""
        question = f"{preamble}USER: {user}".rstrip()
        yield Segment(question + (" ASSISTANT:" if answer is not None or prompt else ""))
        if answer is not None:
            yield from _spaced_answer(answer, ends)


def llama3(turns: list[Turn], system: str, ends: Ends, prompt: bool) -> Iterator[Segment]:
    """LLaMA-3: a header of control tokens before every message, `<|eot_id|>` after it.

    Source: `ChatFormat` in llama/tokenizer.py of meta-llama/llama3.
    """
    yield from ends.opening()
    for role, text in _flatten(turns, system, prompt):
        yield Segment("<|start_header_id|>", control=True)
        yield Segment(role, continues=True)
        yield Segment("<|end_header_id|>", control=True)
        yield Segment("\n\n", continues=True)
        if text is not None:
            yield Segment(text, answer=role == "assistant", continues=True)
            yield Segment("<|eot_id|>", control=True, answer=role == "assistant")


def chatml(turns: list[Turn], system: str, ends: Ends, prompt: bool) -> Iterator[Segment]:
    """ChatML: `<|im_start|>role`, a line break, the message, `<|im_end|>`.

    The line break after `<|im_end|>` is written when another message follows, so that a finished
    conversation ends with its end-of-turn token: there the reward model scores it.
    """
    yield from ends.opening()
    for index, (role, text) in enumerate(_flatten(turns, system, prompt)):
        if index:
            yield Segment("\n", continues=True)
        yield Segment("<|im_start|>", control=True)
        yield Segment(f"{role}\n", continues=True)
        if text is not None:
            yield Segment(text, answer=role == "assistant", continues=True)
            yield Segment("<|im_end|>", control=True, answer=role == "assistant")


def _spaced_answer(answer: str, ends: Ends) -> Iterator[Segment]:
    """An answer whose first token carries the space after the prompt."""
    if answer:
        yield Segment(f" {answer}", answer=True, continues=True)
    yield Segment(ends.eos, control=True, answer=True)


def _flatten(turns: list[Turn], system: str, prompt: bool) -> Iterator[tuple[str, str | None]]:
    """Role and text of every message; text None for the answer to come, if `prompt`."""
    if system:
        yield "system", system
    for user, answer in turns:
        yield "user", user
        if answer is not None or prompt:
            yield "assistant", answer
