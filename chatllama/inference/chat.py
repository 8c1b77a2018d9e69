"""Terminal chat with a run: lines in, streamed answers out, history and system prompt kept.

`converse` needs no terminal: it takes messages and a chat model. `chat` loads a run and connects
the two; the model is in `chat_model.py`, reading lines in `terminal_input.py`.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatllama.inference.folders import find_model
from chatllama.inference.introduction import example_prompts, what_it_knows
from chatllama.inference.options import ChatOptions, GenerationRole, default_role
from chatllama.inference.terminal_input import BOLD, DIM, GREEN, coloured, read_messages
from chatllama.runtime.command_line import printable, tell
from chatllama.runtime.declared_options import check_limits
from chatllama.runtime.jsonl import append_lines
from chatllama.runtime.waiting import doing

if TYPE_CHECKING:  # importing them takes seconds
    from chatllama.inference.chat_model import ChatModel, Compared
    from chatllama.text.chat_format import Message

HELP = '''\
/role NAME      let another role answer; the conversation stays
/compare TEXT   all roles answer TEXT, with reward score and KL; the conversation stays as it is
/compare        the same for your last message
/continue       go on with the last answer, which Ctrl-C or max_new_tokens ended
/regenerate     answer the last message again, by the role that answers now
/undo           take the last message and its answer back
/set KEY VALUE  temperature, top_p or max_new_tokens; /set alone shows them
/system TEXT    set the system prompt (without TEXT: the one of the config)
/history        show the conversation
/save FILE      add the conversation to a JSONL file (format `messages`, which SFT reads)
/reset          forget the conversation
/help           show this
/quit           leave (also Ctrl-D)
"""             begins a message of several lines, """ ends it; a \\ at the end of a line goes on
                a text pasted into the terminal stays one message
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

    with doing("loading libraries"):
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
        if knows := what_it_knows(loaded.config):
            print(knows)
        if prompts := example_prompts(run):
            print(coloured("Prompts that training has not seen:", BOLD))
            print("\n".join(printable(f"  {prompt}") for prompt in prompts))
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
        reply = _show(model, conversation)
    except ValueError:
        conversation.turns.pop()
        raise
    conversation.turns.append({"role": "assistant", "content": reply})


def _continue(model: "ChatModel", conversation: Conversation) -> None:
    """Adds what follows the last answer to it."""
    if not conversation.turns or not conversation.turns[-1]["content"].strip():
        raise ValueError("/continue: there is no answer yet to go on with")
    more = _show(model, conversation)
    text = conversation.turns.pop()["content"].rstrip() + more
    conversation.turns.append({"role": "assistant", "content": text})


def _regenerate(model: "ChatModel", conversation: Conversation) -> None:
    """Puts another answer in the place of the last, unless it is refused."""
    if not conversation.turns:
        raise ValueError("/regenerate: there is no answer yet")
    last = conversation.turns.pop()
    try:
        reply = _show(model, conversation)
    except ValueError:
        conversation.turns.append(last)
        raise
    conversation.turns.append({"role": "assistant", "content": reply})


def _undo(conversation: Conversation) -> None:
    """Forgets the last message and its answer."""
    if not conversation.turns:
        raise ValueError("/undo: nothing has been said yet")
    message = conversation.turns[-2]["content"]
    del conversation.turns[-2:]
    tell(f"(taken back: {message})")


def _set(rest: str, model: "ChatModel") -> None:
    """Changes a setting of the sampling, from the next answer on; without words, shows all."""
    name, _, value = rest.partition(" ")
    kinds = {"temperature": float, "top_p": float, "max_new_tokens": int}
    if rest:
        if name not in kinds:
            raise ValueError(f"/set {name}: give one of {', '.join(kinds)}")
        try:
            changed = {name: kinds[name](value)}
        except ValueError:
            kind = "whole number" if kinds[name] is int else "number"
            raise ValueError(f"/set {name} {value}: must be a {kind}") from None
        try:
            check_limits(ChatOptions(**changed))
        except ValueError as error:  # it names the option
            raise ValueError(f"/set {name} {value}: {str(error).partition(': ')[2]}") from None
        model.sampling = replace(model.sampling, **changed)
    tell("(" + ", ".join(f"{name} {getattr(model.sampling, name):g}" for name in kinds) + ")")


def _show(model: "ChatModel", conversation: Conversation) -> str:
    """Prints an answer as it is streamed, on a terminal with name and speed; returns its text."""
    is_terminal, text, start = sys.stdout.isatty(), "", time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        for chunk in model.answer(conversation.messages(), conversation.role):
            if is_terminal and not text:
                print(coloured(f"{conversation.role}> ", GREEN), end="")
            text += chunk
            print(printable(chunk), end="", flush=True)
    print(flush=True)
    if is_terminal:
        speed = model.num_tokens / max(time.monotonic() - start, 1e-9)
        print(coloured(f"({model.num_tokens} tokens, {speed:.0f} tokens/s)", DIM), flush=True)
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
        case "/regenerate":
            _regenerate(model, conversation)
        case "/undo":
            _undo(conversation)
        case "/set":
            _set(rest, model)
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
