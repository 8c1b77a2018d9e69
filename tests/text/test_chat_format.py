"""The chat contract: layouts by hand, prompts as prefixes, masks, special strings, the hash."""

import json
import random
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
import pytest
import sentencepiece
from tiny_gguf import byte_level_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from chatllama.config.model import ChatSection
from chatllama.exporting.templates import jinja_template
from chatllama.text.chat_format import (
    Message,
    Rendered,
    check_contract,
    check_messages,
    contract_hash,
    describe_contract,
    end_of_turn_ids,
    render,
    template_line,
)
from chatllama.text.chat_templates import ALPACA_SYSTEM, VICUNA_SYSTEM
from chatllama.text.encoding import decode, encode
from chatllama.text.tokenizer import load_tokenizer
from chatllama.text.tokenizer_template import frozen_template

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% elif m.role == 'system' %}"
    "{{ raise_exception('no system here') }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DAY = "2024-01-02"
LAYOUTS = ["llama2", "llama3", "alpaca", "vicuna", "chatml", "own chatml", "own llama2"]


def conversation(*texts: str, system: str | None = None) -> list[Message]:
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for index, text in enumerate(texts):
        messages.append({"role": "assistant" if index % 2 else "user", "content": text})
    return messages


@pytest.fixture(scope="module")
def tokenizer(
    tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer as a publisher would ship it with the tokens of LLaMA-3 and ChatML."""
    folder = tmp_path_factory.mktemp("with_turn_tokens")
    shutil.copy(tiny_tokenizer_dir / "tokenizer.model", folder)
    names = ["im_start", "im_end", "start_header_id", "end_header_id", "eot_id"]
    added = {300 + index: {"content": f"<|{name}|>"} for index, name in enumerate(names)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return load_tokenizer(folder)


def chat_for(layout: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ChatSection:
    if layout.startswith("own"):
        tokenizer.chat_template = CHATML if layout == "own chatml" else LLAMA2
        return ChatSection(template="tokenizer", **options)
    return ChatSection.model_validate({"template": layout} | options)


def answers_of(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> list[str]:
    """Decoded runs of masked ids; each must end with an end-of-turn token."""
    runs: list[list[int]] = [[]]
    for index, counts in zip(rendered.ids, rendered.mask, strict=True):
        if counts:
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [decode(tokenizer, run).strip() for run in runs if run]


def test_llama2_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatSection(template="llama2", system="quiet")
    rendered = render(tokenizer, chat, conversation(" Anna ", " paints\n", "who?", "Victor"))
    first = encode(tokenizer, "[INST] <<SYS>>\nquiet\n<</SYS>>\n\nAnna [/INST]")
    second = encode(tokenizer, "[INST] who? [/INST]")
    paints, victor = encode(tokenizer, "paints"), encode(tokenizer, "Victor")
    assert rendered.ids == [1, *first, *paints, 2, 1, *second, *victor, 2]
    lengths = [
        (1 + len(first), False), (len(paints) + 1, True),
        (1 + len(second), False), (len(victor) + 1, True),
    ]  # fmt: skip
    assert rendered.mask == [counts for length, counts in lengths for _ in range(length)]


def meta_llama2(
    sp: sentencepiece.SentencePieceProcessor, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Ids as llama/generation.py of meta-llama/llama makes them; second: without the last space.

    Meta encodes `answer ` with a space before EOS, which we leave out on purpose.
    """
    if messages[0]["role"] == "system":
        system, user, *rest = messages
        text = f"<<SYS>>\n{system['content']}\n<</SYS>>\n\n{user['content']}"
        messages = [{"role": "user", "content": text}, *rest]
    theirs: list[int] = []
    ours: list[int] = []
    for user, answer in zip(messages[::2], messages[1::2], strict=True):
        text = f"[INST] {user['content'].strip()} [/INST] {answer['content'].strip()}"
        theirs += [1, *sp.encode(text + " "), 2]
        ours += [1, *sp.encode(text), 2]
    return theirs, ours


@pytest.mark.slow
def test_llama2_equals_metas_construction_on_real_conversations(testdata: Path) -> None:
    folder = testdata / "llama_tokenizer"
    tokenizer = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    rows: list[dict[str, str]] = []
    for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json"):
        rows += json.loads((testdata / "llama_factory" / name).read_text("utf-8"))
    checked = 0
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        texts = [first["instruction"], first["output"], second["instruction"], second["output"]]
        system = first["input"].strip() or None
        if not all(text.strip() for text in texts):
            continue
        messages = conversation(*texts, system=system)
        rendered = render(tokenizer, ChatSection(template="llama2"), messages)
        theirs, ours = meta_llama2(reference, messages)
        assert rendered.ids == ours
        space = tokenizer.convert_tokens_to_ids("▁")
        ends = [index for index, token in enumerate(theirs) if token == 2]
        assert all(theirs[end - 1] == space for end in ends)
        assert len(theirs) == len(ours) + len(ends)
        checked += 1
    assert checked > 900


def test_alpaca_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(
        tokenizer, ChatSection(template="alpaca"), conversation("Anna?", "yes", "who", "me")
    )
    text = f"{ALPACA_SYSTEM}\n\n### Instruction:\nAnna?\n\n### Response:\n"
    again = "\n\n### Instruction:\nwho\n\n### Response:\n"
    assert rendered.ids == [
        1, *encode(tokenizer, text), *encode(tokenizer, "yes", continues=True), 2,
        *encode(tokenizer, again, continues=True), *encode(tokenizer, "me", continues=True), 2,
    ]  # fmt: skip
    bare = render(tokenizer, ChatSection(template="alpaca", system=""), conversation("Anna?"))
    assert bare.ids == [1, *encode(tokenizer, "### Instruction:\nAnna?")]


def test_vicuna_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(
        tokenizer, ChatSection(template="vicuna"), conversation("Anna?", "yes", "who", "me")
    )
    assert rendered.ids == [
        1, *encode(tokenizer, f"{VICUNA_SYSTEM} USER: Anna? ASSISTANT:"),
        *encode(tokenizer, "yes"), 2,
        *encode(tokenizer, "USER: who ASSISTANT:"), *encode(tokenizer, "me"), 2,
    ]  # fmt: skip


def test_llama3_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    def text(value: str) -> list[int]:
        return encode(tokenizer, value, continues=True)

    rendered = render(
        tokenizer, ChatSection(template="llama3"), conversation("Anna?", "yes", system="quiet")
    )
    start, end, eot = 302, 303, 304
    assert rendered.ids == [
        1, start, *text("system"), end, *text("\n\n"), *text("quiet"), eot,
        start, *text("user"), end, *text("\n\n"), *text("Anna?"), eot,
        start, *text("assistant"), end, *text("\n\n"), *text("yes"), eot,
    ]  # fmt: skip
    num_answer = len(text("yes")) + 1
    assert rendered.mask == [False] * (len(rendered.ids) - num_answer) + [True] * num_answer
    assert end_of_turn_ids(tokenizer, ChatSection(template="llama3")) == [304, 2]


def test_chatml_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    def text(value: str) -> list[int]:
        return encode(tokenizer, value, continues=True)

    chat = ChatSection(template="chatml")
    rendered = render(tokenizer, chat, conversation("Anna?", "yes"))
    assert rendered.ids == [
        1, 300, *text("user\n"), *text("Anna?"), 301, *text("\n"),
        300, *text("assistant\n"), *text("yes"), 301,
    ]  # fmt: skip
    assert end_of_turn_ids(tokenizer, chat) == [301, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_are_prefixes_and_the_mask_is_the_answers(
    tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    chat = chat_for(layout, tokenizer)
    ends = end_of_turn_ids(tokenizer, chat)
    rng = random.Random(0)
    parts = [
        "Anna", " ", "\n", "  ", "</s>", "<s>", "<|im_end|>", "<|eot_id|>", "é🙂", "[/INST]", "a",
        "\t", "\ue000", "1", "\u2581", "USER:", "<unk>", "\x00", "<|im_start|>",
    ]  # fmt: skip
    for _ in range(150):
        texts = ["".join(rng.choices(parts, k=rng.randint(0, 6))) for _ in range(6)]
        system = None if layout == "own llama2" or rng.random() < 0.5 else texts.pop()
        texts = texts[: 2 * rng.randint(1, len(texts) // 2)]
        messages = conversation(*texts, system=system)
        whole = render(tokenizer, chat, messages)
        assert len(whole.ids) == len(whole.mask)
        prompt_end = 0
        first = 0 if system is None else 1
        for index in range(first + 1, len(messages), 2):
            prompt = render(tokenizer, chat, messages[:index], add_generation_prompt=True)
            upto = render(tokenizer, chat, messages[: index + 1])
            assert whole.ids[: len(prompt.ids)] == prompt.ids
            assert whole.mask[: len(prompt.mask)] == prompt.mask
            assert not any(prompt.mask[prompt_end:])
            assert whole.ids[: len(upto.ids)] == upto.ids
            assert all(upto.mask[len(prompt.mask) :])
            assert upto.ids[-1] == ends[0]
            answer = upto.ids[len(prompt.ids) :]
            assert not set(answer[:-1]) & {*ends, 0, 1, 2, *range(300, 305)}
            text = decode(tokenizer, answer).replace("\u2581", " ")
            assert text.strip() == messages[index]["content"].replace("\u2581", " ").strip()
            prompt_end = len(upto.mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bos_once_and_no_special_token_from_text(
    tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    nasty = "<s></s><unk><|im_start|><|im_end|><|eot_id|><|start_header_id|>"
    chat = chat_for(layout, tokenizer)
    plain = render(tokenizer, chat, conversation("a", "b", "c", "d"))
    rendered = render(tokenizer, chat, conversation(nasty, nasty, nasty, nasty))
    special = set(range(3)) | set(range(300, 305))
    assert [i for i in rendered.ids if i in special] == [i for i in plain.ids if i in special]
    num_bos = 2 if "llama2" in layout else 1
    assert rendered.ids.count(1) == num_bos
    assert rendered.ids[0] == 1
    assert answers_of(tokenizer, rendered) == [nasty, nasty]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_ids_decode_to_the_answers(tokenizer: PreTrainedTokenizerFast, layout: str) -> None:
    rendered = render(
        tokenizer, chat_for(layout, tokenizer), conversation("x", "Anna\n paints", "y", "é 🙂")
    )
    assert answers_of(tokenizer, rendered) == ["Anna\n paints", "é 🙂"]


def test_own_template_gives_transformers_ids_and_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = conversation("Anna walks", "the market", "who?", "Victor", system="quiet")
    theirs: Any = tokenizer.apply_chat_template(
        cast(Any, messages),
        chat_template=CHATML,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = render(tokenizer, chat_for("own chatml", tokenizer), messages)
    assert 1 <= len(theirs["input_ids"]) - len(ours.ids) <= 2  # the last line break is left out
    assert ours.ids == theirs["input_ids"][: len(ours.ids)]
    assert [int(counts) for counts in ours.mask] == theirs["assistant_masks"][: len(ours.ids)]


def test_own_llama2_template_equals_plain_tokenisation(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = conversation("Anna walks", "the market", "who?", "Victor")
    ours = render(tokenizer, chat_for("own llama2", tokenizer), messages)
    text = tokenizer.apply_chat_template(cast(Any, messages), tokenize=False)
    assert isinstance(text, str)
    assert ours.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat_template"),
        ("{{ messages[-1].content + eos_token }}", "not preceded by the prompt"),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "not ended by a special"),
        (CHATML.replace("{% if add_generation_prompt", "{% if false"), "generation prompt missing"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "changes answers"),
        ("{{ raise_exception('only poems') }}", "only poems"),
        ("{{ strftime_now(form) }}", "cannot be frozen"),
        ("{% set clock = strftime_now %}{{ clock('%d') }}", "cannot be frozen"),
    ],
)
def test_own_templates_that_cannot_be_masked_are_refused(
    tokenizer: PreTrainedTokenizerFast, template: str | None, reason: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason):
        render(tokenizer, ChatSection(template="tokenizer", date=DAY), conversation("a", "b"))


@pytest.mark.parametrize("layout", ["llama2", "llama3", "alpaca", "vicuna", "chatml", "own chatml"])
def test_system_prompt_of_the_conversation_wins(
    tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    configured = chat_for(layout, tokenizer, system="loud")
    plain = chat_for(layout, tokenizer)
    asked = conversation("Anna")
    with_system = conversation("Anna", system="quiet")
    assert render(tokenizer, configured, asked) == render(
        tokenizer, plain, conversation("Anna", system="loud")
    )
    assert render(tokenizer, configured, with_system) == render(tokenizer, plain, with_system)
    assert render(tokenizer, plain, asked) != render(tokenizer, plain, with_system)
    silent = conversation("Anna", system="")
    assert render(tokenizer, configured, silent) == render(tokenizer, plain, silent)


def test_layouts_that_need_absent_tokens_are_refused(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    for layout, token in (("llama3", "start_header_id"), ("chatml", "im_start")):
        with pytest.raises(ValueError, match=rf"{layout}.*<\|{token}\|>.*never enlarged"):
            render(tokenizer, chat_for(layout, tokenizer), conversation("a"))


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ([], "at least one"),
        (["system"], "no user message follows"),
        (["assistant"], "message 0 has role 'assistant'; expected system or user"),
        (["user", "user"], "message 1 has role 'user'; expected assistant"),
        (["user", "assistant", "assistant"], "message 2 has role 'assistant'; expected user"),
        (["user", "system"], "message 1 has role 'system'"),
        (["system", "system"], "message 1 has role 'system'; expected user"),
        (["user", "tool"], "message 1 has role 'tool'"),
    ],
)
def test_bad_role_order_is_refused(roles: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_messages([{"role": role, "content": "x"} for role in roles])


def test_content_must_be_text_and_prompts_end_with_the_user(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    wrong: Any = [{"role": "user", "content": None}]
    with pytest.raises(ValueError, match="message 0: content must be a string"):
        check_messages(wrong)
    with pytest.raises(ValueError, match=r"number 1, is the assistant's own: .*continue_final_"):
        render(tokenizer, ChatSection(), conversation("a", "b"), add_generation_prompt=True)


BEGUN = ["Yes", " It is 4:\n\n- one ", "a</s> [INST] b <|im_end|>", "\U0001f642", "a a", "user"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_last_answer_is_left_open_for_more_of_it(
    layout: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = chat_for(layout, tokenizer)
    for talk in (conversation("a"), conversation("a", "a a", "user")):
        prompt = render(tokenizer, chat, talk, add_generation_prompt=True).ids
        for begun in BEGUN:
            whole = [*talk, *conversation("", begun)[1:]]
            opened = render(tokenizer, chat, whole, continue_final_message=True)
            size = len(prompt)
            assert opened.ids[:size] == prompt and all(opened.mask[size:])
            text = decode(tokenizer, [*encode(tokenizer, "b"), *opened.ids[size:]])
            assert text[1:].strip() == begun.strip() and not text[-1].isspace()
            closed = render(tokenizer, chat, whole).ids
            if layout != "own chatml":  # which keeps blanks at an answer's end
                assert closed[:-1][: len(opened.ids)] == opened.ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("texts", "reason"),
    [(("a",), "message 0 is not the assistant"), (("a", "b", "c"), "message 2 is not the assist"),
     (("a", " \n"), "message 1 is empty")],
)  # fmt: skip
def test_what_cannot_be_continued_is_refused(
    texts: tuple[str, ...], reason: str, layout: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = chat_for(layout, tokenizer)
    with pytest.raises(ValueError, match=reason):
        render(tokenizer, chat, conversation(*texts), continue_final_message=True)


# As Llama-3.x's templates write the day.
DATED = (
    "{%- if strftime_now is defined -%}{%- set day = strftime_now('FORMAT') -%}{%- else -%}"
    "{%- set day = '26 Jul 2024' -%}{%- endif -%}<|im_start|>system\nToday: {{ day }}<|im_end|>\n"
) + CHATML


class OtherDay(datetime):
    """A clock that is years away."""

    @classmethod
    def now(cls, tz: Any = None) -> "OtherDay":
        return cls(2031, 5, 7, 23, 59)


@pytest.mark.parametrize(
    ("form", "written"),
    [("%d %b %Y", "02 Jan 2024"), ("%A %Y", "Tuesday 2024"), ("%Y-%m-%d %H", "2024-01-02 00")],
)
def test_the_day_of_a_template_is_the_configs_whatever_the_clock_says(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, form: str, written: str
) -> None:
    tokenizer.chat_template = DATED.replace("FORMAT", form)
    chat = ChatSection(template="tokenizer", date="2024-01-02")
    messages = conversation("Anna", "Victor")
    before = render(tokenizer, chat, messages)
    assert f"Today: {written}" in decode(tokenizer, before.ids)
    contract = describe_contract(tokenizer, chat)
    assert contract["date"] == "2024-01-02"
    exported = jinja_template(tokenizer, chat)
    monkeypatch.setattr(chat_template_utils, "datetime", OtherDay)
    assert render(tokenizer, chat, messages) == before
    check_contract(contract, tokenizer, chat, "here")
    text = tokenizer.apply_chat_template(
        cast(Any, messages), chat_template=exported, tokenize=False
    )
    assert f"Today: {written}" in cast(str, text)
    live = ChatSection(template="tokenizer")
    assert render(tokenizer, live, messages) != before
    with pytest.raises(ValueError, match=r"chat\.date .*'2024-01-02' there, None here"):
        check_contract(contract, tokenizer, live, "here")
    check_contract({k: v for k, v in contract.items() if k != "date"}, tokenizer, chat, "older")


@pytest.mark.parametrize(
    "call",
    ["strftime_now('%d %b %Y')", 'strftime_now( "%A" )', "strftime_now(\n'%H:%M')",
     r"strftime_now('%d\n%m')", r"strftime_now('%d o\'clock \\')", 'strftime_now("🙂 é %Y")'],
)  # fmt: skip
def test_a_frozen_day_is_written_as_the_template_writes_it(call: str) -> None:
    template = "{{ " + call + " }} and {{ " + call + " }}"
    live = jinja2.Template(template).render(strftime_now=datetime.fromisoformat(DAY).strftime)
    frozen = frozen_template(template, DAY)
    assert "strftime_now" not in frozen and jinja2.Template(frozen).render() == live


@pytest.mark.parametrize(
    ("bos", "opening"), [("<|im_start|>", []), ("<|end|>", ["<|end|>"]), (None, [])]
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_chatml_opens_once_where_its_first_token_is_the_bos(
    bos: str | None, opening: list[str], adds_bos: bool, tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(tmp_path, bos=bos, adds_bos=adds_bos)
    chat = ChatSection(template="chatml")
    rendered = render(tokenizer, chat, conversation("a", "b", system="s"))
    pieces = tokenizer.convert_ids_to_tokens(rendered.ids)
    assert pieces[: len(opening) + 2] == [*opening, "<|im_start|>", "s"]  # "system" in bytes
    assert pieces.count("<|im_start|>") == 3
    own = render(tokenizer, ChatSection(template="tokenizer"), conversation("a", "b", system="s"))
    assert rendered.ids[len(opening) :] == own.ids
    other = render(tokenizer, ChatSection(template="alpaca"), conversation("a"))
    assert (other.ids[0] == tokenizer.bos_token_id) == (bos is not None)


def test_layouts_that_fit_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain = byte_level_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"choose llama2, alpaca, vicuna, chatml or tokenizer$"):
        render(plain, ChatSection(template="llama3"), conversation("a"))
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"no chat_template; choose llama2, .*, vicuna or chatml$"):
        render(plain, ChatSection(template="tokenizer"), conversation("a"))
    bare = byte_level_tokenizer(tmp_path)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"choose llama2, alpaca, vicuna or chatml$"):
        render(bare, ChatSection(template="llama3"), conversation("a"))


def test_contract_names_what_differs(
    tokenizer: PreTrainedTokenizerFast, tiny_tokenizer_dir: Path
) -> None:
    chat = ChatSection(template="llama2", system="quiet")
    contract = json.loads(json.dumps(describe_contract(tokenizer, chat)))
    check_contract(contract, tokenizer, chat, "runs/x/sft/adapter")
    assert contract["hash"] == contract_hash(tokenizer, chat)
    other = load_tokenizer(tiny_tokenizer_dir)
    cases = [
        (
            tokenizer,
            ChatSection(template="vicuna", system="quiet"),
            "chat.template: 'llama2' there",
        ),
        (tokenizer, ChatSection(template="llama2", system="loud"), "chat.system"),
        (tokenizer, ChatSection(template="llama2"), "'quiet' there, None here"),
        (other, chat, "tokenizer \\(vocabulary\\)"),
    ]
    for other_tokenizer, other_chat, reason in cases:
        assert contract_hash(other_tokenizer, other_chat) != contract["hash"]
        with pytest.raises(ValueError, match=rf"^runs/x/sft/adapter .*{reason}"):
            check_contract(contract, other_tokenizer, other_chat, "runs/x/sft/adapter")
    with pytest.raises(ValueError, match="lacks system"):
        check_contract(
            {k: v for k, v in contract.items() if k != "system"}, tokenizer, chat, "here"
        )
    with pytest.raises(ValueError, match="give other token ids"):
        check_contract(contract | {"hash": "0"}, tokenizer, chat, "here")
    tokenizer.chat_template = CHATML
    own = ChatSection(template="tokenizer")
    contract = describe_contract(tokenizer, own)
    tokenizer.chat_template = CHATML + "{# another #}"
    with pytest.raises(ValueError, match="tokenizer \\(chat_template\\)"):
        check_contract(contract, tokenizer, own, "here")


def test_auto_takes_the_tokenizers_own_template_or_llama2(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages, auto = conversation("Anna?", "yes"), ChatSection()
    for own, name in ((CHATML, "tokenizer"), (None, "llama2"), ({"rag": CHATML}, "llama2")):
        tokenizer.chat_template = own
        named = ChatSection.model_validate({"template": name})
        assert render(tokenizer, auto, messages) == render(tokenizer, named, messages)
        assert describe_contract(tokenizer, auto) == describe_contract(tokenizer, named)
        assert describe_contract(tokenizer, auto)["template"] == name
        assert contract_hash(tokenizer, auto) == contract_hash(tokenizer, named)


@pytest.mark.parametrize(
    ("own", "template", "expected"),
    [
        (None, "auto", "chat template: llama2; the tokenizer has none of its own"),
        (CHATML, "auto", "chat template: the tokenizer's own"),
        ("ours", "vicuna", "chat template: vicuna, which writes the tokens of the tokenizer's own"),
        # With SentencePiece it has a space after the control token, which ours has not.
        (CHATML, "chatml", "warning: chat.template chatml writes other tokens than"),
        (CHATML, "vicuna", "warning: chat.template vicuna writes other tokens than"),
        (CHATML, "llama2", "unless it was tuned on llama2"),
        ("no turns", "alpaca", "chat template: alpaca; the tokenizer's own cannot be used"),
    ],
)
def test_the_line_about_the_template_warns_where_the_tokenizers_own_differs(
    tokenizer: PreTrainedTokenizerFast, own: str | None, template: str, expected: str
) -> None:
    chat = ChatSection.model_validate({"template": template})
    tokenizer.chat_template = jinja_template(tokenizer, chat) if own == "ours" else own
    line = template_line(tokenizer, chat)
    assert expected in line
    assert line.startswith("warning") == ("other tokens" in line or "tuned on" in line)
