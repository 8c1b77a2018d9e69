import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatllama.config.model import BackboneSection, ChatSection
from chatllama.config.schema import Config
from chatllama.generation.sampling import Sampling
from chatllama.inference import chat_model
from chatllama.inference.chat import Conversation, chat, converse
from chatllama.inference.chat_model import ChatModel, Compared, fit, mean_kl
from chatllama.inference.load import LoadedRun
from chatllama.inference.options import ChatOptions, GenerationRole
from chatllama.inference.terminal_input import coloured, join_lines

if TYPE_CHECKING:
    from chatllama.text.chat_format import Message


def said(*texts: str) -> "list[Message]":
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


class _Echo:
    """Answers with the number of messages and the role; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], GenerationRole]] = []
        self.sampling = Sampling(12, temperature=0.7, top_p=0.9)
        self.num_tokens = 2

    roles: tuple[GenerationRole, ...] = ("base", "sft", "policy")
    find: Any = ChatModel.find

    def compare(self, messages: "list[Message]") -> Iterator[Compared]:
        self.asked.append((list(messages), "base"))
        yield Compared("base", "b\x1b", 3, None, 0.5)
        yield Compared("sft", "s", 4, -1.25, None)

    def answer(self, messages: "list[Message]", role: GenerationRole) -> Iterator[str]:
        self.asked.append((list(messages), role))
        if messages[-1]["content"] == "fail":
            raise ValueError("no such role")
        yield f"{role}:"
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield f"{len(messages)}\x1b[2J"


def Echo() -> Any:
    return _Echo()


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
    assert "role reward: this run has base, sft, policy" in error
    assert "/nonsense is no command" in error and "/reset          forget" in error


def test_compare_shows_every_role_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    echo, conversation = Echo(), Conversation("policy")
    converse(iter(["/compare", "a", "/compare", "/compare b c"]), echo, conversation)
    assert [m["content"] for m in conversation.turns] == ["a", "policy:1\x1b[2J"]
    assert echo.asked[1][0] == said("a")
    assert echo.asked[2][0] == [*conversation.turns, *said("b c")]
    output = capsys.readouterr()
    assert "/compare needs a message" in output.err
    shown = "[base] b\ufffd\n    3 tokens, KL to sft 0.50 nats/token\n"
    assert shown + "[sft] s\n    4 tokens, score -1.25\n" in output.out


def test_compare_on_a_terminal_is_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    converse(iter(["/compare q"]), Echo(), Conversation("policy"))
    lines = capsys.readouterr().out.splitlines()
    assert any("base" in line and "sft" in line for line in lines)
    assert any("b\ufffd" in line and " s " in line for line in lines)


def test_saved_conversations_are_training_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talks.jsonl"
    lines = ["/save", f"/save {file}", "a", f"/save {file}", "/history", f"/save {tmp_path}"]
    converse(iter([*lines, "b", f"/save {file}"]), Echo(), Conversation("sft", "be kind"))
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant"]
    assert len(second["messages"]) == 5 and first["answered_by"] == "sft"
    error = capsys.readouterr().err
    assert "/save needs the name" in error and "nothing has been said" in error
    assert "user: a\nassistant: sft:2" in error and "/save: [Errno 21]" in error


def typed(*lines: str) -> list[str]:
    """Messages made of lines; "^C" stands for Ctrl-C."""
    rest = iter(lines)

    def read(prompt: str) -> str | None:
        line = next(rest, None)
        if line == "^C":
            raise KeyboardInterrupt
        return line

    return list(join_lines(read))


def test_messages_of_several_lines() -> None:
    quotes = '"""'
    assert typed("a", quotes, "b ", "", f"c{quotes}", "d\\", "e") == ["a", "b \n\nc", "d\ne"]
    assert typed(f"{quotes}one line{quotes}", f"{quotes}x", "y", quotes) == ["one line", "x\ny"]
    assert typed(quotes, "unfinished") == ["\nunfinished"] and typed("a\\") == ["a"]


@pytest.mark.slow
def test_a_pasted_text_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    program = (
        "from chatllama.inference.terminal_input import read_messages\n"
        "for message in read_messages(): print('read', repr(message), flush=True)"
    )
    master, slave = pty.openpty()
    (tmp_path / "inputrc").write_text("set enable-bracketed-paste off\n")  # as before readline 8.1
    environment = {**os.environ, "TERM": "xterm", "INPUTRC": str(tmp_path / "inputrc")}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=slave, stdout=slave, env=environment
    ) as process:
        os.close(slave)
        keys = [b"\x1b[200~def f():\r    return 1\r\r# end\x1b[201~\r", b"next\r", b"\x04"]
        shown, sent = b"", 0
        with contextlib.suppress(OSError):  # the terminal is gone with the process
            while select.select([master], [], [], 20)[0] and (block := os.read(master, 1024)):
                shown += block
                if shown.count(b"you> ") > sent < len(keys):  # it is reading keys by now
                    os.write(master, keys[sent])
                    sent += 1
        process.kill()
    os.close(master)
    assert sent == 3 and b"\x1b[?2004h" in shown  # asks the terminal to mark what is pasted
    assert b"read 'def f():\\n    return 1\\n\\n# end'" in shown
    assert b"read 'next'" in shown and b"\x1b[1;36m" in shown


def test_ctrl_c_drops_the_message_being_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("^C", "a", '"""b', "^C", "c") == ["a", "c"]
    assert capsys.readouterr().err.count("Ctrl-D or /quit leaves") == 2


def test_a_refused_message_leaves_the_history_alone(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation("policy")
    converse(iter(["fail", "a"]), Echo(), conversation)
    assert [m["content"] for m in conversation.turns] == ["a", "policy:1\x1b[2J"]
    assert "no such role" in capsys.readouterr().err


def test_ctrl_c_ends_only_the_answer() -> None:
    conversation = Conversation("base")
    converse(iter(["stop", "go on"]), Echo(), conversation)
    assert [m["content"] for m in conversation.turns][:3] == ["stop", "base:", "go on"]


def test_an_answer_is_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    echo, conversation = Echo(), Conversation("base")
    converse(iter(["/continue", "stop", "/continue", "/continue", "b"]), echo, conversation)
    first, more = "base:", "base:2\x1b[2J"
    assert [m["content"] for m in conversation.turns][:2] == ["stop", first + 2 * more]
    asked = [messages for messages, _ in echo.asked]
    assert asked[1:3] == [said("stop", first), said("stop", first + more)]
    assert "there is no answer yet" in capsys.readouterr().err


def test_an_answer_is_given_again_or_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    echo, conversation = Echo(), Conversation("sft")
    lines = ["/regenerate", "/undo", "a", "b", "/role base", "/regenerate", "/undo", "/undo"]
    converse(iter(lines), echo, conversation)
    answer = "sft:1\x1b[2J"
    assert echo.asked[2] == (said("a", answer, "b"), "base")  # as asked first, by another role
    assert conversation.turns == []
    errors = capsys.readouterr().err
    assert "/regenerate: there is no answer yet" in errors and "/undo: nothing has" in errors
    assert errors.endswith("(taken back: b)\n(taken back: a)\n")
    converse(iter(["a", "b", "/undo", "c"]), echo, conversation)
    assert echo.asked[-1][0] == said("a", "base:1\x1b[2J", "c")


def test_a_refused_regeneration_keeps_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation("sft", turns=said("fail", "kept"))
    converse(iter(["/regenerate"]), Echo(), conversation)
    assert conversation.turns == said("fail", "kept")
    assert "no such role" in capsys.readouterr().err


def test_sampling_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    lines = ["temperature 0", "top_p 0.5", "max_new_tokens 7", ""]
    converse(iter([f"/set {line}" for line in lines]), echo, Conversation("sft"))
    assert echo.sampling == Sampling(7, temperature=0.0, top_p=0.5)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "(temperature 0, top_p 0.9, max_new_tokens 12)"
    assert shown[-1] == "(temperature 0, top_p 0.5, max_new_tokens 7)"
    wrong = ["temperature -1", "temperature hot", "temperature nan", "temperature", "top_p 0",
             "max_new_tokens 0", "max_new_tokens 1.5", "heat 1"]  # fmt: skip
    converse(iter([f"/set {line}" for line in wrong]), echo, Conversation("sft"))
    assert echo.sampling == Sampling(7, temperature=0.0, top_p=0.5)
    errors = capsys.readouterr().err
    assert errors.count("/set ") == len(wrong) and "--" not in errors
    assert "/set temperature -1: must be 0, or between" in errors
    assert "/set max_new_tokens 1.5: must be a whole number" in errors
    assert "/set heat: give one of temperature, top_p, max_new_tokens" in errors


def test_a_terminal_shows_name_colour_and_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    clock = iter([10.0, 10.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    converse(iter(["a"]), Echo(), Conversation("policy"))
    assert capsys.readouterr().out == (
        "\x1b[1;32mpolicy> \x1b[0mpolicy:1\ufffd[2J\n\x1b[2m(2 tokens, 4 tokens/s)\x1b[0m\n"
    )
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert coloured("a", "1") == "a"


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


def test_a_real_model_answers_in_its_role(tiny_llama_dir: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from chatllama.config.model import LoraSection
    from chatllama.generation.decoding_batch import DecodingBatch
    from chatllama.model.roles import Adapter, RoleModel, acting_as
    from chatllama.text.chat_format import render
    from chatllama.text.encoding import decode, encode
    from chatllama.text.tokenizer import load_tokenizer

    llama = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    model = RoleModel(
        llama, {"reference": Adapter(LoraSection()), "policy": Adapter(LoraSection())}
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B.policy" in name:
            torch.nn.init.normal_(parameter)
    cfg = Config(run_dir="r", backbone=BackboneSection(path="b"))
    loaded = LoadedRun(model, load_tokenizer(str(tiny_llama_dir)), ChatSection(), cfg, [])
    chat_of_run = ChatModel(loaded, Sampling(12, temperature=0.0), torch.Generator())
    assert chat_of_run.roles == ("base", "sft", "policy")
    base, sft, policy = (
        "".join(chat_of_run.answer(said("Hi"), role)) for role in chat_of_run.roles
    )
    assert base == sft != policy
    assert 1 <= chat_of_run.num_tokens <= 12
    found = re.search("[ -~]", base)
    assert found
    start, stop = found.start(), found[0]
    asked: list[int] = []
    step = DecodingBatch.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingBatch, "step", lambda self: asked.append(1) or step(self))
        stopping = ChatModel(loaded, chat_of_run.sampling, torch.Generator(), [stop])
        assert "".join(stopping.answer(said("Hi"), "base")) == base[:start]
        assert len(asked) < 11  # the text goes no further, nor does the sampling
    assert next(iter(stopping.compare(said("Hi")))).text == base[:start].strip()
    begun = said("Hi", "the river ")
    more = "".join(chat_of_run.answer(begun, "base"))
    prompt = render(loaded.tokenizer, loaded.chat, begun, continue_final_message=True).ids
    writer: Any = llama
    plain = writer.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    text = decode(loaded.tokenizer, [*prompt, *plain[0, len(prompt) :].tolist()])
    assert more and text.endswith("the river" + more)
    with pytest.MonkeyPatch.context() as patch:
        ids = encode(loaded.tokenizer, " a house", continues=True)
        patch.setattr(chat_model, "stream", lambda *_: iter(ids))
        assert "".join(chat_of_run.answer(begun, "base")) == " a house"
        assert "".join(chat_of_run.answer(said("Hi"), "base")) == "a house"
    compared = list(chat_of_run.compare(said("Hi")))
    assert [answer.role for answer in compared] == list(chat_of_run.roles)
    assert compared[0].text == compared[1].text == base.strip()
    assert compared[0].kl == 0.0 and compared[1].kl is None and (compared[2].kl or 0) > 0.01
    assert model.acting == "base"
    long = "the river and a garden " * 15
    with pytest.raises(ValueError, match="shorten it"):
        list(chat_of_run.answer(said(long), "base"))

    ids = [1, 20, 30, 40, 50]
    with torch.no_grad():
        logits = []
        for role in ("policy", "reference"):
            with acting_as(model, role):
                logits.append(model.llama(torch.tensor([ids])).logits[0, 1:4])
    p, q = (torch.distributions.Categorical(logits=each) for each in logits)
    expected = float(torch.distributions.kl_divergence(p, q).mean())
    assert mean_kl(model, "policy", "reference", ids[:2], ids[2:]) == pytest.approx(
        expected, rel=1e-4
    )


def test_after_full_fine_tuning_there_is_no_base() -> None:
    model: Any = types.SimpleNamespace(lora={"policy": None})
    model.eval = lambda: model
    chat_of_run = ChatModel.__new__(ChatModel)
    cfg = Config(run_dir="r", backbone=BackboneSection(path="b"), lora=None)
    chat_of_run.loaded, chat_of_run.model = types.SimpleNamespace(config=cfg), model  # type: ignore[assignment]
    assert chat_of_run.roles == ("sft", "policy")


def test_chat_reads_lines_from_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loading: Any = types.ModuleType("chatllama.inference.load")
    loading.load_run = lambda run, cfg, **_: types.SimpleNamespace(config=cfg)
    monkeypatch.setitem(sys.modules, "chatllama.inference.load", loading)
    echo = Echo()
    monkeypatch.setattr(ChatModel, "chosen", lambda *_: echo)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))
    (tmp_path / "config.yaml").write_text("run_dir: r\nbackbone: {path: b}\n")
    chat(tmp_path, ChatOptions(system="s"))
    assert echo.asked[0][1] == "sft"  # no policy in this run yet
    assert capsys.readouterr().out == "sft:2\ufffd[2J\n"  # no prompt signs, no banner
    with pytest.raises(ValueError, match="role ema: this run has base, sft, policy"):
        chat(tmp_path, ChatOptions(role="ema"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be 0, or between"),
        ({"temperature": 1e-39}, "--temperature 1e-39: must be 0, or between"),
        ({"seed": 2**70}, "--seed 1180591620717411303424: must be between"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0.0: must be above 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be between 1"),
        ({"stops": ("a", "")}, r"--stop \('a', ''\): an empty string"),
        ({}, "is not a run folder"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat(tmp_path, ChatOptions(**settings))
