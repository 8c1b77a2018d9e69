"""Chat layouts in Jinja and Go against the segments that the model is trained on."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tiny_gguf import CHATML, byte_level_tokenizer
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.schema import GenerationSection
from chatllama.exporting.reference_outputs import CONVERSATIONS
from chatllama.exporting.templates import jinja_template, modelfile, own_layout
from chatllama.text.chat_format import Message, _segments, render
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

LAYOUTS = ["llama2", "llama3", "alpaca", "vicuna", "chatml"]
MORE: tuple[list[Message], ...] = (
    *CONVERSATIONS,
    [{"role": "system", "content": ""}, {"role": "user", "content": "  spaces \n"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}],
    [{"role": "user", "content": ""}],
)


@pytest.fixture(scope="module")
def tokenizer(
    tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the control tokens of llama3 and chatml."""
    folder = tmp_path_factory.mktemp("tokens")
    base = load_tokenizer(tiny_tokenizer_dir)
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
    base.add_special_tokens({"additional_special_tokens": names})  # type: ignore[arg-type]
    save_tokenizer(base, folder)
    return load_tokenizer(folder)


def written(
    tokenizer: PreTrainedTokenizerFast, chat: ChatSection, messages: Any, asks: bool | None = None
) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=jinja_template(tokenizer, chat),
            add_generation_prompt=messages[-1]["role"] == "user" if asks is None else asks,
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("system", [None, "", 'Say "no"\\ {{ 1 }}\n日本'])
def test_jinja_writes_the_text_of_training(
    tokenizer: PreTrainedTokenizerFast, layout: Any, system: str | None
) -> None:
    chat = ChatSection(template=layout, system=system)
    for messages in MORE:
        asks = messages[-1]["role"] == "user"
        expected = "".join(part.text for part in _segments(tokenizer, chat, messages, asks))
        assert written(tokenizer, chat, messages) == expected


def either(make: Callable[[], str]) -> str | None:
    """The text, or None where the conversation is refused."""
    try:
        return make()
    except (ValueError, TemplateError):
        return None


INVALID: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
    [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
    [{"role": "system", "content": ["a"]}, {"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}],
    [{"role": "user"}],
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jinja_refuses_what_training_refuses(
    tokenizer: PreTrainedTokenizerFast, layout: Any
) -> None:
    luck, refused = random.Random(5), 0
    chat = ChatSection(template=layout)
    roles = ["user", "assistant"] * 6 + ["system", "tool", "developer", "User", None]
    texts: list[Any] = ["a", " b\n", ""] * 6 + [None, 1, ["a"], [{"type": "text", "text": "a"}]]
    made = [[("user", "assistant")[i % 2] for i in range(luck.randrange(1, 5))] for _ in range(300)]
    conversations = list(INVALID)
    for number, order in enumerate(made):
        if number % 3 == 0:
            order[luck.randrange(len(order))] = luck.choice(roles)  # type: ignore[call-overload]
        if number % 2 == 0:
            order.insert(0, "system")
        found = [{"role": role, "content": luck.choice(texts)} for role in order]
        conversations.append(found)
    for messages in conversations:
        for asks in (True, False):

            def ours(messages: Any = messages, asks: bool = asks) -> str:
                render(tokenizer, chat, messages, add_generation_prompt=asks)
                return "".join(p.text for p in _segments(tokenizer, chat, messages, asks))

            def theirs(messages: Any = messages, asks: bool = asks) -> str:
                return written(tokenizer, chat, messages, asks)

            expected = either(ours)
            assert either(theirs) == expected, messages
            refused += expected is None
    assert 100 < refused < 500


@pytest.mark.parametrize("layout", ["llama2", "vicuna"])
def test_plain_tokenisation_of_it_gives_the_ids_of_training(
    tokenizer: PreTrainedTokenizerFast, layout: Any
) -> None:
    chat = ChatSection(template=layout)
    for messages in CONVERSATIONS:
        asks = messages[-1]["role"] == "user"
        expected = render(tokenizer, chat, messages, add_generation_prompt=asks).ids
        text = written(tokenizer, chat, messages)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_the_tokenizers_own_template_gets_the_configs_system_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    messages = CONVERSATIONS[0]
    plain = written(tokenizer, ChatSection(template="tokenizer"), messages)
    assert plain == "user=Write a note about the garden.;"
    chat = ChatSection(template="tokenizer", system="Be it")
    assert written(tokenizer, chat, messages) == "system=Be it;" + plain
    with_system = [{"role": "system", "content": "x"}, *messages]
    assert written(tokenizer, chat, with_system) == "system=x;" + plain


# --- Ollama --------------------------------------------------------------------------------------


def test_modelfile(tokenizer: PreTrainedTokenizerFast) -> None:
    section = GenerationSection(temperature=0.5, top_k=7, top_p=0.9)
    text = modelfile(tokenizer, ChatSection(template="llama3"), section, "model.gguf", 512)
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{- if .System }}<|start_header_id|>')
    lines = text.splitlines()
    assert 'PARAMETER stop "<|eot_id|>"' in lines and 'PARAMETER stop "</s>"' in lines
    assert "PARAMETER temperature 0.5" in lines and "PARAMETER top_k 7" in lines
    assert "PARAMETER num_ctx 512" in lines and not any(x.startswith("SYSTEM") for x in lines)
    vicuna = modelfile(tokenizer, ChatSection(template="vicuna"), section, "m.gguf", 512)
    assert 'SYSTEM """A chat between a curious user' in vicuna
    with pytest.raises(ValueError, match="would end SYSTEM"):
        modelfile(tokenizer, ChatSection(system='a"""b'), section, "m.gguf", 512)


@pytest.mark.parametrize(
    ("bos", "adds_bos", "opening"),
    [
        ("<|end|>", False, "<|end|>"),
        ("<|end|>", True, ""),
        ("<|im_start|>", False, ""),
        (None, False, ""),
    ],
)
def test_ollama_writes_the_bos_that_llama_cpp_does_not_add(
    bos: str | None, adds_bos: bool, opening: str, tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(tmp_path, bos=bos, adds_bos=adds_bos)
    section = GenerationSection()
    text = modelfile(tokenizer, ChatSection(template="chatml"), section, "m.gguf", 9)
    assert text.splitlines()[1] == f'TEMPLATE """{opening}{{{{- if .System }}}}<|im_start|>system'


@pytest.mark.parametrize("bos", ["<|im_start|>", "<|end|>", None])
@pytest.mark.parametrize("system", [None, "", 'Say "no"\\ {{ 1 }}\n日本'])
def test_jinja_of_chatml_opens_once(bos: str | None, system: str | None, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path, bos=bos)
    chat = ChatSection(template="chatml", system=system)
    for messages in MORE:
        asks = messages[-1]["role"] == "user"
        expected = "".join(part.text for part in _segments(tokenizer, chat, messages, asks))
        assert written(tokenizer, chat, messages) == expected
        assert "<|im_start|><|im_start|>" not in expected


NAMED = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\nYou are Tiny, a model.<|im_end|>\n' }}{%- endif -%}"
)
DATED = "{{ '<|im_start|>system\nToday: 1 May<|im_end|>\n' }}"
NO_SYSTEM = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('none') }}{%- endif -%}"
SPACED = CHATML.replace("m['role'] + '\\n'", "m['role'] + ' \\n'")


@pytest.mark.parametrize(
    ("template", "given", "expected"),
    [
        (CHATML, None, ""),
        (NAMED + CHATML, None, "You are Tiny, a model."),
        (NAMED + CHATML, "Mine.", "Mine."),
        (DATED + CHATML, None, None),
        (NO_SYSTEM + CHATML, None, None),
        (SPACED, None, None),
    ],
    ids=["plain", "named", "given", "dated", "no system", "spaced"],
)
def test_a_template_that_is_one_of_ours_is_found(
    template: str, given: str | None, expected: str | None, tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    tokenizer.chat_template = template
    chat = ChatSection(template="tokenizer", system=given)
    found = own_layout(tokenizer, chat)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found == ChatSection(template="chatml", system=expected)
        text = modelfile(tokenizer, found, GenerationSection(), "m.gguf", 9)
        assert (f'SYSTEM """{expected}"""' in text) == bool(expected)


def test_auto_is_the_template_that_it_comes_to(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    auto, llama2 = ChatSection(), ChatSection(template="llama2")
    assert own_layout(tokenizer, auto) == llama2
    assert jinja_template(tokenizer, auto) == jinja_template(tokenizer, llama2)


def test_our_own_layouts_stay_themselves(tokenizer: PreTrainedTokenizerFast) -> None:
    for layout in LAYOUTS:
        chat = ChatSection.model_validate({"template": layout, "system": "s"})
        assert own_layout(tokenizer, chat) is chat


GO = """package main
import ("encoding/json"; "os"; "text/template")
type M struct { Role, Content string }
type D struct { System string; Messages []M }
func main() {
  var in struct { Templates []string; Data []D }
  json.NewDecoder(os.Stdin).Decode(&in)
  for _, t := range in.Templates { for _, d := range in.Data {
    template.Must(template.New("t").Parse(t)).Execute(os.Stdout, d)
    os.Stdout.WriteString("\\x00")
  } }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="no Go toolchain to run the template with")
def test_ollamas_template_writes_the_text_of_training(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    conversations: list[list[Message]] = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
    ]
    chats = [ChatSection(template=layout, system="") for layout in LAYOUTS]  # type: ignore[arg-type]
    section = GenerationSection()
    texts = [modelfile(tokenizer, chat, section, "m.gguf", 9).split('"""')[1] for chat in chats]
    data = [
        {
            "System": m[0]["content"] if m[0]["role"] == "system" else "",
            "Messages": [{"Role": x["role"], "Content": x["content"]} for x in m],
        }
        for m in conversations
    ]
    (tmp_path / "main.go").write_text(GO)
    output = subprocess.run(
        ["go", "run", "main.go"],
        input=json.dumps({"Templates": texts, "Data": data}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    expected = []
    for chat in chats:
        for messages in conversations:
            text = "".join(part.text for part in _segments(tokenizer, chat, messages, True))
            # llama.cpp puts BOS in front by itself.
            expected.append(text.removeprefix(str(tokenizer.bos_token)))
    assert output[:-1] == expected
