"""Records that tokenizer or chat template cannot write as they are: counted, in every stage."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import PreTrainedTokenizerFast

from chatllama.config.loader import load_config
from chatllama.config.model import ChatSection
from chatllama.config.sources import DataSource
from chatllama.text.tokenizer import load_tokenizer
from data.checking.check import examine
from data.checking.show import shown_records
from data.mixture import load_mixture
from data.tokenize import NOT_RENDERED, tokenize, tokenize_text

pytestmark = pytest.mark.usefixtures("data_cache")

LETTERS = ("漢", "é", "🙂")
Kind = Literal["sft", "preferences", "prompts"]
KINDS: tuple[Kind, ...] = ("sft", "preferences", "prompts")
STAGES: dict[str, str] = {"sft": "sft", "preferences": "reward", "prompts": "ppo"}
TEMPLATES = {
    # As Qwen3's: earlier answers lose what they thought.
    "thoughts": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}Q: {{ m.content }}\nA:{% endif %}{% endfor %}",
    # As Mistral's: the system prompt stands before the last question, wherever that is.
    "system": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ m.content }}{{ eos_token }}{% elif m.role == 'user' %}"
    "{% if loop.index0 + 2 >= messages | length and messages[0].role == 'system' %}"
    "{{ messages[0].content }}{% endif %}Q: {{ m.content }}\nA:{% endif %}{% endfor %}",
    # Earlier answers are cut short.
    "cut": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ m.content if loop.last else m.content[:9] }}{{ eos_token }}"
    "{% else %}Q: {{ m.content }}\nA:{% endif %}{% endfor %}",
}


def turns(*contents: str) -> list[Any]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": each} for i, each in enumerate(contents)]


def write(file: Path, prompts: list[list[Any]], kind: str, answers: tuple[str, str]) -> DataSource:
    """A file with a record of the kind for every prompt."""
    better, worse = ({"role": "assistant", "content": each} for each in answers)
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"messages": [*p, better]} for p in prompts],
        "preferences": [{"chosen": [*p, better], "rejected": [*p, worse]} for p in prompts],
        "prompts": [{"messages": p} for p in prompts],
    }
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
    return DataSource(path=str(file))


def check_command(tmp_path: Path, kind: str, source: DataSource, backbone: Path, chat: Any) -> Any:
    """What `data check` says of a source."""
    stage = STAGES[kind]
    content = {
        "run_dir": str(tmp_path / "run"),
        "backbone": {"path": str(backbone)},
        "chat": chat,
        stage: {"data": [{"path": source.path}]},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    tokenizer = load_tokenizer(backbone)
    return examine(load_config(tmp_path / "config.yaml"), tokenizer, (stage,)).report


@pytest.fixture(params=["unk", "nothing"])
def without_fallback(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer_dir: Path
) -> Path:
    """A folder with a tokenizer that writes <unk>, or nothing, for unknown letters."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir, folder)
    (folder / "tokenizer.model").unlink()
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    pipeline["model"]["byte_fallback"] = False
    if request.param == "nothing":
        pipeline["model"]["unk_token"] = None
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_characters_without_a_token_are_counted(
    kind: Kind, without_fallback: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(without_fallback)
    prompts = [turns("the river"), *(turns(f"the {char} market") for char in LETTERS)]
    source = write(tmp_path / "a.jsonl", prompts, kind, ("a house", "a forest"))
    rows = load_mixture([source], [], 0.0, 0, kind).train
    examples, report = tokenize(rows, kind, tokenizer, ChatSection(), 200)
    assert len(examples) == 4 and "lost" not in examples.column_names
    assert sorted(report.lost) == sorted(LETTERS)
    assert "3 with characters that this tokenizer cannot write, such as '" in report.summary()
    if kind == "prompts":
        found = check_command(tmp_path, kind, source, without_fallback, {}).findings
        dropped = [each for each in found if each.check == "dropped_character"]
        assert [example for each in dropped for example in each.examples] == [
            f"'{char}' (U+{ord(char):04X}), 1 times" for char in LETTERS
        ]


def test_characters_of_answers_and_of_plain_text_count_too(
    without_fallback: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = load_tokenizer(without_fallback)
    source = write(tmp_path / "a.jsonl", [turns("the river")], "sft", ("a ß house 漢", ""))
    rows = load_mixture([source], [], 0.0, 0, "sft").train
    assert tokenize(rows, "sft", bare, ChatSection(), 200)[1].lost == ["ß漢"]
    text = load_mixture([text_source(tmp_path, "the é river " * 20)], [], 0.0, 0, "text").train
    pieces, report = tokenize_text(text, bare, 20)
    assert len(pieces) > 1 and report.lost == ["é"] and pieces.column_names == ["input_ids"]
    # With byte fallback nothing is lost.
    turns_report = tokenize(rows, "sft", tokenizer, ChatSection(), 200)[1]
    for report in (turns_report, tokenize_text(text, tokenizer)[1]):
        assert report.lost == [] and "cannot write" not in report.summary()


def text_source(folder: Path, text: str) -> DataSource:
    (folder / "a.txt").write_text(text)
    return DataSource(path=str(folder / "a.txt"), format="text")


REFUSING = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
LEFT_OUT: dict[str, tuple[str, str]] = {
    **{name: ("sft", template) for name, template in TEMPLATES.items()},
    "refused answers": ("preferences", REFUSING + TEMPLATES["cut"]),
    "refused prompts": ("prompts", REFUSING + TEMPLATES["cut"]),
}


def with_template(folder: Path, tokenizer_dir: Path, template: str) -> PreTrainedTokenizerFast:
    shutil.copytree(tokenizer_dir, folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def as_text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of ids, without the space that SentencePiece has after a control token."""
    return str(tokenizer.decode(ids)).replace("s> ", "s>")


def long_conversation(name: str) -> list[Any]:
    system = [{"role": "system", "content": "Be brief."}] if name == "system" else []
    thought = "<think>Hm, water.</think>It is wet."
    return [*system, *turns("the river", thought, "the market")]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["preferences", "prompts"])
def test_turns_that_a_template_rewrites_are_context_where_no_mask_is_needed(
    name: str, kind: Kind, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    folder, chat = tmp_path / "tokenizer", ChatSection(template="tokenizer", date="2026-01-02")
    tokenizer = with_template(folder, tiny_tokenizer_dir, TEMPLATES[name])
    prompt = long_conversation(name)
    source = write(tmp_path / "a.jsonl", [prompt], kind, ("yes", "no"))
    rows = load_mixture([source], [], 0.0, 0, kind).train
    examples, report = tokenize(rows, kind, tokenizer, chat, 200)
    example: dict[str, Any] = examples[0]
    assert report.left_out == {}
    found = check_command(tmp_path, kind, source, folder, chat.model_dump()).findings
    assert not [each for each in found if each.check == "cannot_be_rendered"]
    shown = shown_records(load_config(tmp_path / "config.yaml"), tokenizer, STAGES[kind], 3)
    opened = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    if kind == "prompts":
        assert as_text(tokenizer, example["input_ids"]) == opened
        assert len(shown[0].tokens) == len(example["input_ids"])
        return
    for ids, text, one in zip(example["answer_ids"], ("yes", "no"), shown, strict=True):
        assert as_text(tokenizer, ids[: example["prompt_length"]]) == opened
        assert as_text(tokenizer, ids) == f"{opened}{text}</s>"
        assert len(one.tokens) == len(ids)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_template_rewrites_is_left_out_counted_and_named(
    name: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    folder, chat = tmp_path / "tokenizer", ChatSection(template="tokenizer", date="2026-01-02")
    kind: Any = LEFT_OUT[name][0]
    tokenizer = with_template(folder, tiny_tokenizer_dir, LEFT_OUT[name][1])
    prompts = [turns("a garden"), long_conversation(name), turns("a house")]
    source = write(tmp_path / "a.jsonl", prompts, kind, ("yes", "no"))
    rows = load_mixture([source], [], 0.0, 0, kind).train
    examples, report = tokenize(rows, kind, tokenizer, chat, 200)
    assert len(examples) == 2 and report.left_out == {NOT_RENDERED: 1}
    place = f"{source.path}:2: the tokenizer's chat template"
    place += ": message" if name in TEMPLATES else " refuses this: too long"
    assert f"1 left out: {NOT_RENDERED}\n  {place}" in report.summary()
    with pytest.raises(ValueError, match=r"no record can be used \(0 of 1 .*\n.*a\.jsonl:2: "):
        tokenize(rows.filter(lambda row: ":2" in row["where"]), kind, tokenizer, chat, 200)
    found = check_command(tmp_path, kind, source, folder, chat.model_dump()).findings
    cfg, stage = load_config(tmp_path / "config.yaml"), STAGES[kind]
    shown = shown_records(cfg, tokenizer, stage, 3)
    reasons = [one.title for one in shown if not one.tokens]
    assert {reason.split(", ")[0] for reason in reasons} == {f"{stage}.data {source.path}:2"}
    assert all(f"left out: {place.split(': ', 1)[1]}" in reason for reason in reasons)
    (error,) = (each for each in found if each.check == "cannot_be_rendered")
    assert error.severity == "error" and error.examples[0].startswith(place)


def test_a_template_that_no_record_can_have_is_no_fault_of_the_records(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [turns("the river")], "sft", ("yes", ""))
    rows = load_mixture([source], [], 0.0, 0, "sft").train
    llama3, own = ChatSection(template="llama3"), ChatSection(template="tokenizer")
    for chat, words in ((llama3, "needs the token"), (own, "no chat_template")):
        with pytest.raises(ValueError, match=words) as caught:
            tokenize(rows, "sft", tokenizer, chat, 200)
        assert "no record can be used" not in str(caught.value)
