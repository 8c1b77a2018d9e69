"""The data check finds every planted defect, and none in clean data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from planted_data import LONG, PAIRS, PLANTED_PAIRS, PLANTED_SFT, PROMPTS, SFT, TOPICS, ask
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import data.token_report
from chatllama import cli
from chatllama.config.loader import load_config
from chatllama.config.schema import Config
from chatllama.text.tokenizer import load_tokenizer
from data.checking.check import Examination, examine
from data.checking.clean import write_cleaned
from data.checking.report import MESSAGES
from data.checking.show import _token_texts, page, shown_records
from data.checking.tokens import sequence_problems
from data.token_report import drops

pytestmark = pytest.mark.usefixtures("data_cache")


def write(file: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))
    return file


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[..., Config]:
    """Writes `config.yaml` and loads it; sources are lists of records."""

    def make(**stages: dict[str, Any]) -> Config:
        content: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "backbone": {"path": str(tiny_tokenizer_dir)},
        }
        for stage, section in stages.items():
            content[stage] = dict(section)
            for key in ("data", "eval_data", "decontaminate"):
                if key in section:
                    file = write(tmp_path / f"{stage}_{key}.jsonl", section[key])
                    content[stage][key] = [{"path": str(file)}]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return load_config(tmp_path / "config.yaml")

    return make


def found(examination: Examination) -> dict[str, tuple[str, int]]:
    """Severity and count by check."""
    return {each.check: (each.severity, each.count) for each in examination.report.findings}


def test_clean_data_has_no_finding(
    config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg = config(sft={"data": SFT}, reward={"data": PAIRS}, ppo={"data": PROMPTS})
    report = examine(cfg, tokenizer).report
    assert report.findings == [] and report.exit_code == 0
    assert report.notes == ["chat template: llama2; the tokenizer has none of its own"]
    sft, reward, ppo = report.sources
    assert (sft.num_records, sft.num_usable, sft.share) == (12, 12, 1.0)
    assert sft.scripts == {"Latin": 12} and sft.format == "messages"
    assert sft.num_tokens and 0 < sft.num_trained_tokens < sft.num_tokens
    assert ppo.num_trained_tokens == 0 and reward.num_trained_tokens > 0
    assert max(report.lengths[sft.name]) == sft.lengths["p100"]


def copy(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """The record with another answer."""
    return {"messages": [record["messages"][0], {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(("check", "severity", "record"), PLANTED_SFT)
def test_each_planted_defect_is_found_alone(
    check: str,
    severity: str,
    record: Any,
    config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    cfg = config(
        sft={
            "data": [*SFT, record],
            "max_length": 500,
            "eval_data": [ask("Tell me, who found the harbour?")],
            "decontaminate": [
                {"prompt": "Why does the moon look so large near the horizon at night?"}
            ],
        }
    )
    examination = examine(cfg, tokenizer)
    assert found(examination) == {check: (severity, 1)}
    assert examination.report.exit_code == (severity == "error")
    (finding,) = examination.report.findings
    assert any("sft_data.jsonl:13" in example for example in finding.examples)


@pytest.mark.parametrize(("check", "severity", "record"), PLANTED_PAIRS)
def test_each_planted_defect_of_pairs_is_found(
    check: str,
    severity: str,
    record: Any,
    config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    cfg = config(reward={"data": [*PAIRS, record], "max_length": 500})
    assert found(examine(cfg, tokenizer)) == {check: (severity, 1)}


def test_questions_on_both_sides_of_the_split(
    config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    variants = [ask(f"Tell me about {topic}!", f"{i} times.") for i, topic in enumerate(TOPICS)]
    cfg = config(sft={"data": [*SFT, *variants], "eval_fraction": 0.5})
    findings = found(examine(cfg, tokenizer))
    assert findings.keys() == {"split_leak"} and 2 <= findings["split_leak"][1] <= 10


def test_what_one_stage_evaluates_and_another_trains_on(config: Callable[..., Config]) -> None:
    cfg = config(sft={"data": SFT}, ppo={"data": PROMPTS, "eval_data": [{"prompt": (
        "tell me about the river in spring")}]})  # fmt: skip
    examination = examine(cfg, None)
    assert found(examination) == {"leak_between_stages": ("warning", 1)}
    assert "no tokenizer yet" in examination.report.notes[0]


def test_unreadable_sources_and_bad_mixtures_do_not_stop_the_rest(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = config(sft={"data": SFT})
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    content["sft"]["data"] += [
        {"path": str(tmp_path / "none.jsonl")},
        {"path": str(write(tmp_path / "bad.jsonl", ["{x", "["])), "weight": 1.0},
    ]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(content))
    cfg = load_config(tmp_path / "more.yaml")
    examination = examine(cfg, None)
    checks = found(examination)
    assert checks["unreadable"] == ("error", 1) and checks["malformed"] == ("error", 2)
    assert checks["nothing_usable"] == ("error", 1) and checks["mixture"] == ("error", 1)
    assert len(examination.report.sources) == 2


BOS, EOS = 1, 2
TOKENS: list[tuple[list[int], list[int], list[int], list[str]]] = [
    ([1, 5, 6, 2], [0, 0, 1, 1], [1, 5], []),
    ([1, 5, 6, 2, 1, 5, 7, 2], [0, 0, 1, 1, 0, 0, 1, 1], [1, 5, 6, 2, 1, 5], []),
    ([1, 5, 6], [0, 0, 1], [1, 5], ["label_without_eos"]),
    ([1, 5, 6, 5, 6, 2], [0, 0, 1, 0, 1, 1], [1, 5], ["label_without_eos"]),  # the first answer
    ([1, 5, 6, 2], [0, 0, 1, 0], [1, 5], ["label_without_eos"]),  # the EOS is not trained
    ([1, 5, 6, 2], [0, 0, 0, 0], [1, 5], ["trains_nothing"]),
    ([1, 5, 6, 2], [1, 1, 1, 1], [1, 5], ["trains_everything"]),
    ([1, 1, 5, 6, 2], [0, 0, 0, 1, 1], [1, 1, 5], ["double_bos"]),
    ([1, 5, 6, 2], [0, 0, 1, 1], [1, 4], ["prompt_is_no_prefix"]),
    ([1, 5], [0, 0], [1, 5, 6], ["trains_nothing", "prompt_is_no_prefix"]),
]


@pytest.mark.parametrize(("ids", "mask", "prompt", "expected"), TOKENS)
def test_rules_of_tokens(
    ids: list[int], mask: list[int], prompt: list[int], expected: list[str]
) -> None:
    assert sequence_problems(ids, [bool(each) for each in mask], prompt, BOS, [EOS]) == expected


def test_template_without_eos_is_found_in_every_record(
    config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from chatllama.text.chat_format import Rendered
    from data.checking import tokens as token_checks

    original = token_checks.render

    def broken(*args: Any, **options: Any) -> Rendered:
        rendered = original(*args, **options)
        if options.get("add_generation_prompt"):
            return rendered
        return Rendered([BOS, *rendered.ids[:-1]], [False, *rendered.mask[:-1]])

    monkeypatch.setattr(token_checks, "render", broken)
    checks = found(examine(config(sft={"data": SFT}), tokenizer))
    assert checks["label_without_eos"] == ("error", 12) and checks["double_bos"] == ("error", 12)
    assert checks["prompt_is_no_prefix"] == ("error", 12)


def test_fix_drops_what_breaks_a_rule_of_tokens(
    config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The layout breaks a rule for six of the records, another one for each."""
    from chatllama.text.chat_format import Rendered
    from data.checking import tokens as token_checks

    original = token_checks.render

    def broken(tokenizer: Any, chat: Any, messages: Any, **options: Any) -> Rendered:
        rendered = original(tokenizer, chat, messages, **options)
        asked, opens = messages[0]["content"], options.get("add_generation_prompt")
        if "the night train" in asked:
            raise ValueError("no such token")
        if "seven wooden chairs" in asked and not opens:
            return Rendered(rendered.ids[:-1], rendered.mask[:-1])
        if "snow on a red roof" in asked:
            return Rendered([BOS, *rendered.ids], [False, *rendered.mask])
        if "a letter without stamp" in asked:
            return Rendered(rendered.ids, [False] * len(rendered.ids))
        if "the market at noon" in asked:
            return Rendered(rendered.ids, [True] * len(rendered.ids))
        if "two quiet children" in asked and opens:
            return Rendered([*rendered.ids, 5], [*rendered.mask, False])
        return rendered

    monkeypatch.setattr(token_checks, "render", broken)
    cfg = config(sft={"data": SFT})
    examination = examine(cfg, tokenizer)
    checks = (
        "cannot_be_rendered", "label_without_eos", "double_bos", "trains_nothing",
        "trains_everything", "prompt_is_no_prefix",
    )  # fmt: skip
    assert found(examination) == dict.fromkeys(checks, ("error", 1))
    cleaned = write_cleaned(cfg, tmp_path / "config.yaml", examination, tmp_path / "cleaned")
    assert (cleaned.num_kept, cleaned.num_dropped) == (6, 6)
    dropped = [json.loads(line) for line in cleaned.log.read_text().splitlines()]
    assert [entry["reason"] for entry in dropped] == [MESSAGES[check] for check in checks]
    assert examine(load_config(cleaned.config), tokenizer).report.exit_code == 0


def test_what_becomes_of_long_records(
    config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    two = SFT[0]["messages"] + ask("And then?", LONG)["messages"]
    long = [{"messages": two}, ask("Write at length.", LONG), ask(LONG, "No.")]
    cfg = config(sft={"data": [*SFT, *long], "max_length": 300})
    report = examine(cfg, tokenizer).report
    assert {each.message for each in report.findings if each.check == "truncated"} == {
        "over 300 tokens: lost whole exchanges at the end",
        "over 300 tokens: cut inside the answer",
        "over 300 tokens: left out, no answer within 300 tokens",
    }
    assert report.sources[0].truncated == 3


def test_sequences_beyond_the_models_positions_are_reported(
    config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(vars(tokenizer), "max_positions", 300)
    report = examine(config(sft={"data": [*SFT, ask("At length.", LONG)]}), tokenizer).report
    assert "over 300 tokens: cut inside the answer" in {each.message for each in report.findings}


def test_dropped_characters(
    tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, config: Callable[..., Config]
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    assert not drops(tokenizer, "\u6f22") and not drops(tokenizer, " ")  # byte fallback
    original = data.token_report.encode

    def without_bytes(given: Any, text: str) -> list[int]:
        return [given.unk_token_id] if text == "\u6f22" else original(given, text)

    monkeypatch.setattr(data.token_report, "encode", without_bytes)
    cfg = config(sft={"data": [*SFT, ask("What is \u6f22?", "A \u6f22.")]})
    (finding,) = examine(cfg, tokenizer).report.findings
    assert finding.check == "dropped_character"
    assert finding.examples == ["'\u6f22' (U+6F22), 2 times"]


@pytest.mark.slow
def test_check_command_reports_fixes_and_then_passes(
    config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = [record for _, _, record in PLANTED_SFT]
    pairs = [record for _, _, record in PLANTED_PAIRS]
    config(
        sft={
            "data": [*SFT, *planted],
            "eval_data": [ask("Tell me, who found the harbour?")],
            "decontaminate": [
                {"prompt": "Why does the moon look so large near the horizon at night?"}
            ],
        },
        reward={"data": [*PAIRS, *pairs]},
        ppo={"data": PROMPTS},
    )
    command = ["data", "check", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--fix"])
    assert caught.value.code == 1
    text = capsys.readouterr().out
    assert "malformed record" in text and "sft_data.jsonl:13" in text
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"leak", "duplicate"} <= {finding["check"] for finding in report["findings"]}
    assert (tmp_path / "out/token_lengths.png").read_bytes().startswith(b"\x89PNG")
    dropped = [
        json.loads(line) for line in (tmp_path / "out/cleaned/dropped.jsonl").open(encoding="utf-8")
    ]
    # Of the sft records: 11 that cannot serve, a copy, a leak, a contamination; of the pairs: 4.
    assert len(dropped) == 18 and all(entry["where"] and entry["reason"] for entry in dropped)
    cleaned = str(tmp_path / "out/cleaned/config.yaml")
    assert cli.main(["data", "check", cleaned, "--out", str(tmp_path / "again")]) == 0
    assert ", 0 errors" not in capsys.readouterr().out
    kept = examine(load_config(cleaned), None)
    assert [source.num_usable for source in kept.report.sources] == [18, 1, 14, 12]
    # The records are the same, not only as many.
    first = kept.checked[0].rows[0]
    assert first["messages"] == SFT[0]["messages"]
    assert kept.checked[2].rows["answers"][0] == [PAIRS[0]["chosen"], PAIRS[0]["rejected"]]


@pytest.mark.slow
def test_real_data_is_examined(testdata: Path, tmp_path: Path) -> None:
    content = {
        "run_dir": str(tmp_path / "run"),
        "backbone": {"path": str(testdata / "stories260k/hf")},
        "reward": {"data": [{"path": str(testdata / "llama_factory/dpo_zh_demo.json")}]},
        "ppo": {
            "data": [{"path": str(testdata / "fastchat/mt_bench_question.jsonl")}],
            "decontaminate": [{"path": str(testdata / "fastchat/vicuna_question.jsonl")}],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    cfg = load_config(tmp_path / "config.yaml")
    report = examine(cfg, load_tokenizer(testdata / "stories260k/hf")).report
    checks = {(each.source.split(".")[0], each.check): each.count for each in report.findings}
    assert checks["reward", "broken_text"] == 6  # records with U+FFFD
    assert checks["reward", "duplicate"] == 11
    # Two of MT-Bench's questions are Vicuna's.
    assert checks["ppo", "contamination"] == 2
    assert report.sources[0].scripts["Han"] > 250


def test_show_prints_spaces_and_line_ends_of_byte_level_tokens() -> None:
    words = [
        "\u0120the",
        "\u010a\u010a",
        "\u0109",
        "\u00c3\u00a9",
        "\u00e2",
        "\u0124\u00ac",
        "<|\u0120|>",
    ]
    vocab = {word: number for number, word in enumerate(words[:-1])}
    pipeline = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    pipeline.decoder = decoders.Sequence([decoders.ByteLevel()])
    pipeline.add_special_tokens(words[-1:])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pipeline)
    # The euro sign is the bytes E2 82 AC; GPT-2 writes 09 as U+0109, 20 as U+0120, 82 as U+0124.
    expected = [" the", "\n\n", "\t", "\u00e9", "<0xE2>", "<0x82><0xAC>", "<|\u0120|>"]
    assert _token_texts(range(7), tokenizer) == expected
    assert "prefers-color-scheme: dark" in page([])


def test_show_colours_what_is_trained(
    config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = config(sft={"data": [ask("Is <b> & </s> bold?", "Yes, it is.")], "max_length": 9},
                 reward={"data": PAIRS}, ppo={"data": PROMPTS})  # fmt: skip
    (one,) = shown_records(cfg, tokenizer, "sft", 3)
    trained = "".join(text for text, is_trained, _ in one.tokens if is_trained)
    assert trained.strip() == "Yes, it is.</s>"
    assert one.over == len(one.tokens) - 9
    # </s> in the user's text is no control token; the real one is.
    controls = [text for text, _, control in one.tokens if control]
    assert controls == ["<s>", "</s>"]
    text = page([one])
    assert "&lt;" in text and "<b>" not in text and 'class="t c"' in text
    assert len(shown_records(cfg, tokenizer, "reward", 2)) == 4
    assert shown_records(cfg, tokenizer, "ppo", 1)[0].num_trained == 0
    file = tmp_path / "page.html"
    command = ["data", "show", str(tmp_path / "config.yaml"), "--n", "2"]
    assert cli.main([*command, "--html", str(file), "--stage", "ppo"]) == 0
    assert file.read_text().startswith("<!doctype html>")
    assert cli.main([*command, "sft.max_length=100"]) == 0
    assert "Yes" in capsys.readouterr().out
    assert cli.main(["data", "show", str(tmp_path / "config.yaml"), "sft.data=[]"]) == 2
