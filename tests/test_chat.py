import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatllama import chat as chat_module
from chatllama.chat import ChatRole, Conversation, chat, converse, fit, model_answer

if TYPE_CHECKING:
    from chatllama.chat_format import Message


def said(*texts: str) -> "list[Message]":
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


class Echo:
    """Answers with the number of messages and the role; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], ChatRole]] = []

    def __call__(self, messages: "list[Message]", role: ChatRole) -> Iterator[str]:
        self.asked.append((list(messages), role))
        if messages[-1]["content"] == "fail":
            raise ValueError("no such role")
        yield f"{role}:"
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield f"{len(messages)}\x1b[2J"


def test_history_grows_and_output_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    echo, conversation = Echo(), Conversation("sft", "be kind")
    converse(iter(["  hello \n", "\n", "[bold]more\n"]), echo, conversation)
    assert capsys.readouterr().out == "sft:2\ufffd[2J\nsft:4\ufffd[2J\n"
    system: Message = {"role": "system", "content": "be kind"}
    assert echo.asked[1][0] == [system, *said("hello", "sft:2\x1b[2J", "[bold]more")]


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    echo, conversation = Echo(), Conversation("policy")
    lines = ["a", "/reset", "/system be  brief", "/role base", "b", "/role reward", "/nonsense"]
    converse(iter([*lines, "/system", "/help", "/quit", "never"]), echo, conversation)
    assert echo.asked[0] == (said("a"), "policy")
    assert echo.asked[1] == ([{"role": "system", "content": "be  brief"}, *said("b")], "base")
    assert len(echo.asked) == 2 and conversation.system is None
    error = capsys.readouterr().err
    assert "/role reward: choose base, sft, policy" in error
    assert "/nonsense is no command" in error and "/reset         forget" in error


def test_a_refused_message_leaves_the_history_alone(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation("policy")
    converse(iter(["fail", "a"]), Echo(), conversation)
    assert [m["content"] for m in conversation.turns] == ["a", "policy:1\x1b[2J"]
    assert "no such role" in capsys.readouterr().err


def test_ctrl_c_ends_only_the_answer() -> None:
    conversation = Conversation("base")
    converse(iter(["stop", "go on"]), Echo(), conversation)
    assert [m["content"] for m in conversation.turns][:3] == ["stop", "base:", "go on"]


def test_the_oldest_exchanges_give_way() -> None:
    def words(messages: "list[Message]") -> int:
        return sum(len(m["content"].split()) for m in messages)

    system: Message = {"role": "system", "content": "s"}
    turns = [system, *said("a a", "b b", "c c", "d d", "e")]
    assert fit(turns, words, 10) == turns
    assert fit(turns, words, 9) == [system, *turns[3:]]
    assert fit(turns, words, 2) == [system, turns[5]]
    with pytest.raises(ValueError, match="takes 2 tokens and 1 are left"):
        fit(turns, words, 1)


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    chat: Any


def test_a_real_model_answers_in_its_role(tiny_llama_dir: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from chatllama.config import ChatSection, LoraSection
    from chatllama.roles import Adapter, RoleModel
    from chatllama.sampling import Sampling
    from chatllama.tokenizer import load_tokenizer

    llama = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    model = RoleModel(
        llama, {"reference": Adapter(LoraSection()), "policy": Adapter(LoraSection())}
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B.policy" in name:
            torch.nn.init.normal_(parameter)
    loaded: Any = Loaded(model, load_tokenizer(str(tiny_llama_dir)), ChatSection())
    answer = model_answer(loaded, Sampling(12, temperature=0.0), torch.Generator())
    base, sft, policy = ("".join(answer(said("Hi"), role)) for role in ("base", "sft", "policy"))
    assert base == sft != policy
    assert model.acting == "base"
    long = "the river and a garden " * 15
    with pytest.raises(ValueError, match="shorten it"):
        list(answer(said(long), "base"))


def test_chat_reads_lines_from_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import types

    loading: Any = types.ModuleType("chatllama.loading")
    generation = types.SimpleNamespace(max_new_tokens=8)
    config = types.SimpleNamespace(generation=generation)
    loading.load_run = lambda run: types.SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "chatllama.loading", loading)
    echo = Echo()
    monkeypatch.setattr(chat_module, "model_answer", lambda *args: echo)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))
    (tmp_path / "config.yaml").write_text("")
    chat(tmp_path, system="s")
    assert echo.asked[0][1] == "sft"  # no policy in this run yet
    assert capsys.readouterr().out == "sft:2\ufffd[2J\n"  # no prompt signs, no banner


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0.0: must be above 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be at least 1"),
        ({}, "is not a run folder"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat(tmp_path, **settings)
