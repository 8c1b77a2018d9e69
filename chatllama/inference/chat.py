"""Terminal chat with a run: lines in, streamed answers out, history and system prompt kept.

`converse` needs no terminal: it takes messages and a chat model. `chat` loads a run and connects
the two; the model is in `chat_model.py`, reading lines in `terminal_input.py`.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from chatllama.inference.folders import find_model
from chatllama.inference.options import ChatOptions, GenerationRole, default_role
from chatllama.inference.terminal_input import read_messages
from chatllama.runtime.command_line import printable, tell
from chatllama.runtime.declared_options import check_limits
from chatllama.runtime.jsonl import append_lines

if TYPE_CHECKING:  # importing them takes seconds
    from chatllama.inference.chat_model import ChatModel, Compared
    from chatllama.text.chat_format import Message

HELP = '''\
/role NAME      let another role answer; the conversation stays
/compare TEXT   all roles answer TEXT, with reward score and KL; the conversation stays as it is
/compare        the same for your last message
/continue       go on with the last answer, which Ctrl-C or --max-new-tokens ended
/system TEXT    set the system prompt (without TEXT: the one of the config)
/history        show the conversation
/save FILE      add the conversation to a JSONL file (format `messages`, which SFT reads)
/reset          forget the conversation
/help           show this
/quit           leave (also Ctrl-D)
"""             begins a message of several lines, """ ends it; a \\ at the end of a line goes on
Ctrl-C          stop the answer, or drop the line being typed'''


@dataclass
class Conversation:
    """The messages so far, and the role that answers next."""

    role: GenerationRole
    system: str | None = None
    turns: "list[Message]" = field(default_factory=list)

    def messages(self) -> "list[Message]":
        """The turns, after the system prompt if one is set."""
        if self.system is None:
            return list(self.turns)
        return [{"role": "system", "content": self.system}, *self.turns]


def chat(run_dir: Path, options: ChatOptions | None = None) -> None:
    """Talks with what `find_model` opens until the input ends; ValueError if it cannot begin."""
    options = options or ChatOptions()
    check_limits(options)
    run, cfg = find_model(run_dir)
    role = options.role or default_role(run)

    from chatllama.config.schema import with_weights
    from chatllama.inference.chat_model import ChatModel, describe_model
    from chatllama.inference.load import load_run

    cfg = with_weights(cfg, options.dtype, options.quantization)
    loaded = load_run(run, cfg, trust_remote_code=options.trust_remote_code)
    model = ChatModel.chosen(loaded, options)
    conversation = Conversation(model.find(role), options.system)
    if sys.stdin.isatty():
        quantization = loaded.config.backbone.quantization
        print(f"{run.root}: {describe_model(loaded.model, quantization)}")
        print(f"Roles: {', '.join(model.roles)}; {role} answers. /help lists the commands.")
    converse(read_messages(), model, conversation)


def converse(messages: Iterator[str], model: "ChatModel", conversation: Conversation) -> None:
    """Answers message after message, on stdout, until they end or one says /quit.

    Ctrl-C during an answer ends that answer only. An error in one message is printed, and the
    conversation goes on. `conversation` is changed in place.
    """
    for message in messages:
        text = message.strip()
        if text in ("/quit", "/exit"):
            return
        if not text:
            continue
        try:
            if text.startswith("/"):
                _run_command(text, model, conversation)
            else:
                _reply(text, model, conversation)
        except ValueError as error:
            tell(str(error))


def _reply(text: str, model: "ChatModel", conversation: Conversation) -> None:
    """Answers a message and remembers both, unless it is refused."""
    conversation.turns.append({"role": "user", "content": text})
    try:
        reply = _show(model.answer(conversation.messages(), conversation.role))
    except ValueError:
        conversation.turns.pop()
        raise
    conversation.turns.append({"role": "assistant", "content": reply})


def _continue(model: "ChatModel", conversation: Conversation) -> None:
    """Adds what follows the last answer to it."""
    if not conversation.turns or not conversation.turns[-1]["content"].strip():
        raise ValueError("/continue: there is no answer yet to go on with")
    more = _show(model.answer(conversation.messages(), conversation.role))
    text = conversation.turns.pop()["content"].rstrip() + more
    conversation.turns.append({"role": "assistant", "content": text})


def _show(chunks: Iterator[str]) -> str:
    """Prints an answer as it is streamed; returns its text."""
    text = ""
    with contextlib.suppress(KeyboardInterrupt):
        for chunk in chunks:
            text += chunk
            print(printable(chunk), end="", flush=True)
    print(flush=True)
    return text


def _run_command(text: str, model: "ChatModel", conversation: Conversation) -> None:
    """Runs a slash command; raises ValueError if it cannot."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            tell(HELP)
        case "/reset":
            conversation.turns.clear()
            tell("(forgotten)")
        case "/system":
            conversation.system = rest or None
            tell("(system prompt set)" if rest else "(system prompt of the config)")
        case "/role":
            conversation.role = model.find(rest)
            tell(f"({rest} answers)")
        case "/history":
            for message in conversation.messages():
                tell(f"{message['role']}: {message['content']}")
        case "/save":
            _save(rest, conversation)
        case "/continue":
            _continue(model, conversation)
        case "/compare":
            _compare(rest, model, conversation)
        case _:
            raise ValueError(f"{name} is no command; /help lists them")


def _save(file: str, conversation: Conversation) -> None:
    """Adds the conversation to a file, as one line."""
    if not file:
        raise ValueError("/save needs the name of a file: /save talks.jsonl")
    if not conversation.turns:
        raise ValueError("nothing has been said yet")
    line = {"messages": conversation.messages(), "answered_by": conversation.role}
    try:
        append_lines(Path(file).expanduser(), [line])
    except OSError as error:
        raise ValueError(f"/save: {error}") from error
    tell(f"(added to {file})")


def _compare(text: str, model: "ChatModel", conversation: Conversation) -> None:
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
        answers += model.compare(messages)
    show_compared(answers)


def show_compared(answers: "list[Compared]") -> None:
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


def _numbers(answer: "Compared") -> str:
    parts = [f"{answer.num_tokens} tokens"]
    if answer.score is not None:
        parts.append(f"score {answer.score:+.2f}")
    if answer.kl is not None:
        parts.append(f"KL to {answer.start} {answer.kl:.2f} nats/token")
    return ", ".join(parts)
