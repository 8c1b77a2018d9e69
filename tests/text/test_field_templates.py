"""Chat templates as publishers write them: `render` gives apply_chat_template's tokens.

The templates are short ones of our own in the style of each. docs/export.md names the differences:
what a template writes after the end of the last turn is left out, and special tokens that somebody
types stay text.
"""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import byte_level_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.text.chat_format import end_of_turn_ids, render
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

CONTROLS = [
    "<|user|>", "<|assistant|>", "<|system|>", "<|end_of_turn|>", "<start_of_turn>",
    "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<|User|>", "<|Assistant|>",
]  # fmt: skip
PROMPT = "{% if add_generation_prompt %}{{ ASKS }}{% endif %}"
TEMPLATES = {
    # Mistral: control tokens around the question, the system prompt before the first one.
    "mistral": (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\\n\\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set s = '' %}{% set turns = messages %}"
        "{% endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (s if loop.first else '') + m.content + '[/INST]' }}{% else %}"
        "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # Zephyr and TinyLlama: the EOS and a line break end every message.
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
        "{% endfor %}" + PROMPT.replace("ASKS", "'<|assistant|>\\n'")
    ),
    # Gemma: the assistant is called model, blanks are trimmed, no system prompt of its own.
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ (messages[0].content + '\\n' if loop.index0 == 1 and messages[0].role == 'system' "
        "else '') + (m.content | trim) + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
        + PROMPT.replace("ASKS", "'<start_of_turn>model\\n'")
    ),
    # Phi-3: no BOS, a token of its own ends turns, another one the conversation.
    "phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end_of_turn|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    # Llama 3: headers.
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
        "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        + PROMPT.replace("ASKS", "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'")
    ),
    # Qwen: ChatML with a system prompt where none is given.
    "qwen": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + "
        "'<|im_end|>\\n' }}{% endfor %}" + PROMPT.replace("ASKS", "'<|im_start|>assistant\\n'")
    ),
    # SmolLM3 and others: tags around what the assistant writes, for transformers' own mask.
    "generation tags": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        + PROMPT.replace("ASKS", "'<|im_start|>assistant\\n'")
    ),
    # DeepSeek: no line breaks anywhere, the EOS after answers alone.
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
        "{{ '<|Assistant|>' + m.content + eos_token }}{% endif %}{% endfor %}"
        + PROMPT.replace("ASKS", "'<|Assistant|>'")
    ),
}
PARTS = [
    "Anna", "the cat", " ", "\n", "  ", "é🙂", "12", "345", "日本", "\t", ".", "'ll", "x" * 9,
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> dict[str, Path]:
    """Tokenizers with every control token: byte-level BPE with and without BOS, SentencePiece."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {
        "byte level": byte_level_tokenizer(folder / "a", "llama-bpe", "<|end|>", adds_bos=True),
        "no BOS": byte_level_tokenizer(folder / "b", "qwen2", bos=None),
        "sentencepiece": load_tokenizer(tiny_tokenizer_dir),
    }
    for name, tokenizer in made.items():
        names = [*CONTROLS, "<|im_start|>", "<|im_end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": names})  # type: ignore[arg-type]
        save_tokenizer(tokenizer, folder / name)
    return {name: folder / name for name in made}


def conversations(count: int) -> list[list[dict[str, str]]]:
    luck, made = random.Random(6), []
    for _ in range(count):
        texts = [
            "".join(luck.choices(PARTS, k=luck.randint(1, 6))).strip() or "a"
            for _ in range(luck.randint(1, 6))
        ]
        system = [{"role": "system", "content": "Be brief."}] if luck.random() < 0.5 else []
        turns = [
            {"role": ("user", "assistant")[at % 2], "content": text}
            for at, text in enumerate(texts)
        ]
        made.append([*system, *turns])
    return made


@pytest.mark.parametrize("kind", ["byte level", "no BOS", "sentencepiece"])
@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_rendering_is_apply_chat_templates(
    style: str, kind: str, count: int, folders: dict[str, Path]
) -> None:
    tokenizer, plain = load_tokenizer(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    tokenizer.chat_template = plain.chat_template = TEMPLATES[style].replace(
        "{{ bos_token }}", "{{ bos_token }}" if plain.bos_token else ""
    )
    chat = ChatSection(template="tokenizer")
    ends = end_of_turn_ids(tokenizer, chat)
    for messages in conversations(count):
        asks = messages[-1]["role"] == "user"
        rendered = render(tokenizer, chat, messages, add_generation_prompt=asks)  # type: ignore[arg-type]
        text = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        ids = plain(str(text), add_special_tokens=False).input_ids
        assert ids[: len(rendered.ids)] == rendered.ids, text
        rest = plain.decode(ids[len(rendered.ids) :])
        assert rest.strip() in (("",) if asks else ("", plain.eos_token)), text
        assert asks or (rendered.ids[-1] == ends[0] and rendered.mask[-1])
        answers = sum(message["role"] == "assistant" for message in messages)
        assert sum(a and not b for a, b in pairwise([*rendered.mask, False])) == answers


@pytest.mark.parametrize("style", ["generation tags"])
def test_the_mask_of_generation_tags_is_ours(style: str, folders: dict[str, Path]) -> None:
    tokenizer: Any = load_tokenizer(folders["byte level"])
    tokenizer.chat_template = TEMPLATES[style]
    for messages in conversations(60):
        if messages[-1]["role"] != "assistant":
            continue
        rendered = render(tokenizer, ChatSection(template="tokenizer"), messages)  # type: ignore[arg-type]
        theirs = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        count = len(rendered.ids)
        assert theirs["assistant_masks"][:count] == [int(each) for each in rendered.mask]
        assert not any(theirs["assistant_masks"][count:])


def test_every_kind_of_tokenizer_was_there(folders: dict[str, Path]) -> None:
    loaded: dict[str, PreTrainedTokenizerFast] = {n: load_tokenizer(f) for n, f in folders.items()}
    assert loaded["no BOS"].bos_token is None and loaded["byte level"].bos_token == "<|end|>"
    assert all(each.pad_token_id != each.eos_token_id for each in loaded.values())
