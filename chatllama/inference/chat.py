"""Terminal chat with a run: lines in, streamed answers out, history and system prompt kept.

`converse` needs no model and no terminal: it takes messages and a speaker. `chat` loads a run and
connects the two; who speaks is in `chat_speaker.py`, the lines in `chat_lines.py`.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from chatllama.inference.chat_model import ChatRole, Compared
from chatllama.inference.options import check_stops
from chatllama.inference.terminal_input import read_messages
from chatllama.runs.folder import RunFolder
from chatllama.runtime.command_line import printable

if TYPE_CHECKING:
    from chatllama.text.chat_format import Message

HELP = '''\
/role NAME      let another role answer; the conversation stays
/compare TEXT   all roles answer TEXT, with reward score and KL; the conversation stays as it is
/compare        the same for your last message
/system TEXT    set the system prompt (without TEXT: the one of the config)
/history        show the conversation
/save FILE      add the conversation to a JSONL file (format `messages`, which SFT reads)
/reset          forget the conversation
/help           show this
/quit           leave (also Ctrl-D)
"""             begins a message of several lines, """ ends it; a \\ at the end of a line goes on
Ctrl-C          stop the answer, or drop the line being typed'''


class Speaker(Protocol):
    """Who answers."""

    @property
    def roles(self) -> tuple[ChatRole, ...]:
        """Those that are loaded."""
        ...

    def answer(self, messages: "list[Message]", role: ChatRole) -> Iterator[str]:
        """Streams the answer to a conversation as text."""
        ...

    def compare(self, messages: "list[Message]") -> Iterator[Compared]:
        """Every role's answer to a conversation."""
        ...


@dataclass
class Conversation:
    """What has been said, and who answers next."""

    role: ChatRole
    system: str | None = None
    turns: "list[Message]" = field(default_factory=list)

    def messages(self) -> "list[Message]":
        """The turns, after the system prompt if one is set."""
        if self.system is None:
            return list(self.turns)
        return [{"role": "system", "content": self.system}, *self.turns]


def chat(
    run_dir: Path,
    role: ChatRole | None = None,
    *,
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_new_tokens: int | None = None,
    system: str | None = None,
    seed: int | None = None,
    stops: tuple[str, ...] = (),
    dtype: str | None = None,
    quantization: str | None = None,
) -> None:
    """Talks with a run's model until the input ends.

    Args:
        run_dir: the run's folder.
        role: who answers. None: the policy if there is one, else the SFT model.
        temperature: 0 takes the likeliest token.
        top_p: total probability of the tokens sampled from.
        max_new_tokens: longest answer, in tokens. None: the config's `generation.max_new_tokens`.
        system: system prompt. None: the config's.
        seed: makes the answers repeatable. None: other answers each time.
        stops: strings that end an answer.
        dtype: float32, bfloat16 or float16. None: the config's.
        quantization: none, int8 or nf4. None: the config's.

    Raises:
        ValueError: a setting out of range, no finished run in `run_dir`, or no such role in it.
    """
    _check_settings(temperature, top_p, max_new_tokens)
    check_stops(stops)
    run = RunFolder(run_dir)
    config = run.existing_config()
    role = role or ("policy" if run.policy_adapter.is_dir() else "sft")

    import torch

    from chatllama.config.loader import load_config
    from chatllama.config.schema import with_weights
    from chatllama.generation.sampling import Sampling
    from chatllama.inference.chat_model import ModelSpeaker, describe_model
    from chatllama.inference.load import load_run

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    loaded = load_run(run, with_weights(load_config(config), dtype, quantization))
    longest = max_new_tokens or loaded.config.generation.max_new_tokens
    sampling = Sampling(longest, temperature=temperature, top_p=top_p)
    speaker = ModelSpeaker(loaded, sampling, generator, stops)
    if role not in speaker.roles:
        raise ValueError(_no_role(role, speaker))
    if sys.stdin.isatty():
        quantization = loaded.config.backbone.quantization
        print(f"{run.root}: {describe_model(loaded.model, quantization)}")
        print(f"Roles: {', '.join(speaker.roles)}; {role} answers. /help lists the commands.")
    converse(read_messages(), speaker, Conversation(role, system))


def converse(messages: Iterator[str], speaker: Speaker, conversation: Conversation) -> None:
    """Answers message after message, on stdout, until they end or one says /quit.

    Ctrl-C during an answer ends that answer only. What goes wrong with one message is told, and
    the conversation goes on.

    Args:
        messages: what the user types.
        speaker: answers.
        conversation: the state; changed in place.
    """
    for message in messages:
        text = message.strip()
        if text in ("/quit", "/exit"):
            return
        if not text:
            continue
        try:
            if text.startswith("/"):
                _obey(text, speaker, conversation)
            else:
                _reply(text, speaker, conversation)
        except ValueError as error:
            _note(str(error))


def _reply(text: str, speaker: Speaker, conversation: Conversation) -> None:
    """Answers a message and remembers both, unless it is refused."""
    conversation.turns.append({"role": "user", "content": text})
    try:
        reply = _show(speaker.answer(conversation.messages(), conversation.role))
    except ValueError:
        conversation.turns.pop()
        raise
    conversation.turns.append({"role": "assistant", "content": reply})


def _show(pieces: Iterator[str]) -> str:
    """Prints an answer while it comes; gives its text."""
    text = ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            text += piece
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text


def _obey(text: str, speaker: Speaker, conversation: Conversation) -> None:
    """Follows a slash command.

    Raises:
        ValueError: it cannot be followed; says why.
    """
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            _note(HELP)
        case "/reset":
            conversation.turns.clear()
            _note("(forgotten)")
        case "/system":
            conversation.system = rest or None
            _note("(system prompt set)" if rest else "(system prompt of the config)")
        case "/role":
            conversation.role = _find_role(rest, speaker)
            _note(f"({rest} answers)")
        case "/history":
            for message in conversation.messages():
                _note(f"{message['role']}: {message['content']}")
        case "/save":
            _save(rest, conversation)
        case "/compare":
            _compare(rest, speaker, conversation)
        case _:
            raise ValueError(f"{name} is no command; /help lists them")


def _find_role(name: str, speaker: Speaker) -> ChatRole:
    for role in speaker.roles:
        if role == name:
            return role
    raise ValueError(_no_role(name, speaker))


def _no_role(name: str, speaker: Speaker) -> str:
    return f"role {name or '(none named)'}: this run has {', '.join(speaker.roles)}"


def _save(file: str, conversation: Conversation) -> None:
    """Adds the conversation to a file, as one line."""
    if not file:
        raise ValueError("/save needs the name of a file: /save talks.jsonl")
    if not conversation.turns:
        raise ValueError("nothing has been said yet")
    line = {"messages": conversation.messages(), "answered_by": conversation.role}
    try:
        with Path(file).expanduser().open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ValueError(f"/save: {error}") from error
    _note(f"(added to {file})")


def _compare(text: str, speaker: Speaker, conversation: Conversation) -> None:
    """Shows all roles' answers to `text`, or to the last message; the conversation stays."""
    messages = conversation.messages()
    if text:
        messages = [*messages, {"role": "user", "content": text}]
    else:
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise ValueError("/compare needs a message: /compare TEXT")
    answers: list[Compared] = []
    with contextlib.suppress(KeyboardInterrupt):
        answers += speaker.compare(messages)
    show_compared(answers)


def show_compared(answers: list[Compared]) -> None:
    """Prints answers side by side, on a pipe below each other."""
    if not sys.stdout.isatty():
        for answer in answers:
            print(f"[{answer.role}] {printable(answer.text)}")
            print(f"    {_numbers(answer)}", flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for answer in answers:
        table.add_column(answer.role, ratio=1, overflow="fold")
    if answers:
        table.add_row(*(Text(printable(answer.text)) for answer in answers))
        table.add_section()
        table.add_row(*(Text(_numbers(answer), style="dim") for answer in answers))
        Console(highlight=False).print(table)


def _numbers(answer: Compared) -> str:
    parts = [f"{answer.num_tokens} tokens"]
    if answer.score is not None:
        parts.append(f"score {answer.score:+.2f}")
    if answer.kl is not None:
        parts.append(f"KL to sft {answer.kl:.2f} nats/token")
    return ", ".join(parts)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _check_settings(temperature: float, top_p: float, max_new_tokens: int | None) -> None:
    """Nothing, for settings that can be sampled with.

    Raises:
        ValueError: names the first that cannot.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature {temperature}: must be 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p {top_p}: must be above 0 and at most 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
