"""Terminal chat with a run: lines in, streamed answers out, history and system prompt kept.

`converse` needs no model and no terminal: it takes lines and a function that answers. `chat` loads
a run and connects the two.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from chatllama.progress import printable
from chatllama.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

    from chatllama.chat_format import Message
    from chatllama.loading import LoadedRun
    from chatllama.roles import Role
    from chatllama.sampling import Sampling

ChatRole = Literal["base", "sft", "policy"]
ACTING: "dict[ChatRole, Role]" = {"base": "base", "sft": "reference", "policy": "policy"}
HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt (without TEXT: the one of the config)
/role NAME     let base, sft or policy answer
/help          show this
/quit          leave (also Ctrl-D)"""

Answer = Callable[["list[Message]", ChatRole], Iterator[str]]


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

    Raises:
        ValueError: a setting out of range, or no finished run in `run_dir`.
    """
    _check_settings(temperature, top_p, max_new_tokens)
    run = RunFolder(run_dir)
    if not run.config.is_file():
        raise ValueError(f"{run_dir} is not a run folder: {run.config} is missing")
    role = role or ("policy" if run.policy_adapter.is_dir() else "sft")

    import torch

    from chatllama.loading import load_run
    from chatllama.sampling import Sampling

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    loaded = load_run(run)
    longest = max_new_tokens or loaded.config.generation.max_new_tokens
    sampling = Sampling(longest, temperature=temperature, top_p=top_p)
    answer = model_answer(loaded, sampling, generator)
    if sys.stdin.isatty():
        print(f"{run.root}, answered by {role}. /help lists the commands.")
    converse(_lines(), answer, Conversation(role, system))


def model_answer(loaded: "LoadedRun", sampling: "Sampling", generator: "torch.Generator") -> Answer:
    """A function that streams a model's answer to a conversation as text.

    Where conversation and answer do not fit the model's positions, the oldest exchanges are left
    out, and a note says so.

    Args:
        loaded: model with its roles, tokenizer and chat layout.
        sampling: how to choose tokens.
        generator: CPU generator of the random numbers.
    """
    from chatllama.chat_format import end_of_turn_ids, render
    from chatllama.generate import stream
    from chatllama.roles import acting_as, autocast
    from chatllama.text_stream import stream_text

    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    stop_ids = end_of_turn_ids(tokenizer, loaded.chat)
    room = model.llama.config.max_position_embeddings - sampling.max_new_tokens

    def count(messages: "list[Message]") -> int:
        return len(render(tokenizer, loaded.chat, messages, add_generation_prompt=True).ids)

    def answer(messages: "list[Message]", role: ChatRole) -> Iterator[str]:
        kept = fit(messages, count, room)
        if len(kept) < len(messages):
            _note(f"(the oldest {len(messages) - len(kept)} messages no longer fit)")
        prompt = render(tokenizer, loaded.chat, kept, add_generation_prompt=True).ids
        with acting_as(model, ACTING[role]), autocast(model):
            ids = stream(model.llama, prompt, sampling, stop_ids, generator)
            yield from stream_text(tokenizer, ids)

    return answer


def fit(
    messages: "Sequence[Message]", count: "Callable[[list[Message]], int]", room: int
) -> "list[Message]":
    """The longest ending of a conversation, system prompt included, of at most `room` tokens.

    Args:
        messages: perhaps a system message, then user and assistant in turn, a user message last.
        count: tokens of such a conversation.
        room: tokens at hand.

    Raises:
        ValueError: the last message alone does not fit.
    """
    head = [m for m in messages[:1] if m["role"] == "system"]
    turns = list(messages[len(head) :])
    while (tokens := count([*head, *turns])) > room:
        if len(turns) <= 2:
            raise ValueError(
                f"this message takes {tokens} tokens and {room} are left beside the answer; "
                "shorten it or lower --max-new-tokens"
            )
        turns = turns[2:]
    return [*head, *turns]


def converse(lines: Iterator[str], answer: Answer, conversation: Conversation) -> None:
    """Answers line after line, on stdout, until the lines end or one says /quit.

    Ctrl-C during an answer ends that answer only. What goes wrong with one line is told, and the
    conversation goes on.

    Args:
        lines: what the user types.
        answer: streams the answer to a conversation.
        conversation: the state; changed in place.
    """
    for line in lines:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        if not text:
            continue
        if text.startswith("/"):
            _note(_command(text, conversation))
            continue
        conversation.turns.append({"role": "user", "content": text})
        try:
            reply = _show(answer(conversation.messages(), conversation.role))
        except ValueError as error:
            _note(str(error))
            conversation.turns.pop()
            continue
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


def _command(text: str, conversation: Conversation) -> str:
    """Obeys a slash command; gives the line to print."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            return HELP
        case "/reset":
            conversation.turns.clear()
            return "(forgotten)"
        case "/system":
            conversation.system = rest or None
            return "(system prompt set)" if rest else "(system prompt of the config)"
        case "/role":
            if rest not in get_args(ChatRole):
                return f"/role {rest}: choose {', '.join(get_args(ChatRole))}"
            conversation.role = rest  # pyright: ignore[reportAttributeAccessIssue]
            return f"({rest} answers)"
    return f"{name} is no command; /help lists them"


def _lines() -> Iterator[str]:
    """Lines from the terminal, with editing and history, or from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


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
