"""Chat templates that rewrite earlier turns: context in every door that needs no loss mask."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chatllama.config.loader import load_config
from chatllama.config.model import ChatSection
from chatllama.inference.answerer import Answerer
from chatllama.inference.load import LoadedRun
from chatllama.serving.service import Service
from chatllama.serving.settings import ServerSettings
from chatllama.text.chat_format import contract_hash, render
from chatllama.text.detokenizing import TokenTexts
from chatllama.text.tokenizer import load_tokenizer

# Our own, in the manner of Qwen3: thoughts stay in the last turn alone, which always has some.
QWEN3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if loop.last and '</think>' not in m.content %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}Q: {{ m.content }}\nA:{% endif %}{% endfor %}"
)
THOUGHTS = {
    "thoughts": ["Hello", "<think>Who?</think>Anna.", "And?"],
    "twice": ["Hello", "<think>Who?</think>Anna.", "And?", "<think>x</think>No.", "Why?"],
    "one of two": ["Hello", "Anna.", "And?", "<think>x</think>No.", "Why?"],
}


def talk(texts: list[str]) -> list[Any]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def loaded(tmp_path: Path, tiny_tokenizer_dir: Path) -> LoadedRun:
    """A run without a model, whose tokenizer has the template."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_tokenizer_dir, folder)
    (folder / "chat_template.jinja").write_text(QWEN3)
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path}/run\nbackbone: {{path: {folder}}}\n")
    chat = ChatSection(template="tokenizer", date="2026-01-02")
    model: Any = None
    return LoadedRun(model, load_tokenizer(folder), chat, load_config(tmp_path / "c.yaml"), [])


def service(loaded: LoadedRun) -> Service:
    made = object.__new__(Service)
    made.run, made.texts = loaded, TokenTexts(loaded.tokenizer)
    made.settings, made.max_positions = ServerSettings(run=Path("runs/x")), 500
    return made


@pytest.mark.parametrize("kind", THOUGHTS)
def test_prompts_are_what_the_template_writes(kind: str, loaded: LoadedRun) -> None:
    messages = talk(THOUGHTS[kind])
    plain = AutoTokenizer.from_pretrained(loaded.tokenizer.name_or_path)

    def written(messages: list[Any], asks: bool) -> list[int]:
        text = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        return plain(text, add_special_tokens=False).input_ids

    asked = Answerer(loaded, "base").render(messages)
    assert plain.decode(asked) == plain.decode(written(messages, True))
    assert "<think>" not in plain.decode(asked)
    assert service(loaded).check_prompt(messages) == asked
    # What stop strings cut, what is scored, and what is continued: the last turn is marked.
    answered = [*messages, {"role": "assistant", "content": "Well."}]
    whole = Answerer(loaded, "base").render(answered, add_generation_prompt=False)
    assert plain.decode(whole) == plain.decode(written(answered, False))
    begun = Answerer(loaded, "base").render([*messages, talk(["", "Wel"])[1]])
    assert plain.decode(begun).endswith("<think>\n\n</think>\n\nWel")
    prompt, answer = service(loaded)._conversation([Given(each) for each in answered])  # type: ignore[list-item]
    assert prompt == asked and plain.decode(answer).endswith("\n\nWell.</s>")


class Given(dict[str, str]):
    """A message of a request."""

    def plain(self) -> dict[str, str]:
        return dict(self)


@pytest.mark.parametrize("kind", THOUGHTS)
def test_training_is_refused_what_its_mask_cannot_be_right_for(
    kind: str, loaded: LoadedRun
) -> None:
    answered = [*talk(THOUGHTS[kind]), {"role": "assistant", "content": "Well."}]
    with pytest.raises(ValueError, match="the template changes answers"):
        render(loaded.tokenizer, loaded.chat, answered)
    made = render(loaded.tokenizer, loaded.chat, answered, last_answer_only=True)
    end = len(made.mask) - made.mask[::-1].index(False)
    assert str(loaded.tokenizer.decode(made.ids[end:])).endswith("Well.</s>")
    assert contract_hash(loaded.tokenizer, loaded.chat)  # the template itself can be used


@pytest.mark.parametrize("answer", ["<think>Hm.</think>Yes.", "</think>", "a</think> b</think>c"])
def test_a_last_answer_that_is_rewritten_is_refused_everywhere(
    answer: str, loaded: LoadedRun
) -> None:
    # As DeepSeek-R1's: no turn keeps its thoughts.
    template = QWEN3.replace("m.content if loop.last else ", "")
    loaded.tokenizer.chat_template = template
    answered = [*talk(["Hello", "Anna.", "And?"]), {"role": "assistant", "content": answer}]
    with pytest.raises(ValueError, match="message 3 is not written as it is"):
        render(loaded.tokenizer, loaded.chat, answered, last_answer_only=True)


REWRITING = {"short": "m.content[:3]", "upper": "m.content | upper", "dropped": "'...'"}


@pytest.mark.parametrize("kind", REWRITING)
def test_templates_that_rewrite_any_earlier_answer_have_a_contract(
    kind: str, loaded: LoadedRun
) -> None:
    """Chat, generate and serve compare contracts before they render anything."""
    earlier = f"m.content if loop.last else {REWRITING[kind]}"
    template = QWEN3.replace("m.content if loop.last else m.content.split('</think>')[-1]", earlier)
    assert template != QWEN3
    plain = contract_hash(loaded.tokenizer, loaded.chat)
    loaded.tokenizer.chat_template = template
    assert contract_hash(loaded.tokenizer, loaded.chat) != plain
    messages = talk(["Hello", "Anna is here.", "And?"])
    asked = loaded.tokenizer.decode(Answerer(loaded, "base").render(messages))
    assert "Anna is here" not in str(asked)
