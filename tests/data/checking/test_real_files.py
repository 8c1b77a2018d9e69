"""The data check on every file of the real test data, for every stage: nothing is lost unsaid."""

from pathlib import Path
from typing import Any

import pytest

from chatllama.config.schema import Config
from data.checking import records
from data.checking.check import examine
from data.checking.report import StageSource

pytestmark = pytest.mark.usefixtures("data_cache")

STAGES = ("sft", "reward", "ppo")
USABLE: dict[str, tuple[int, int, int]] = {
    "fastchat/dummy_conversation.json": (500, 0, 500),
    "fastchat/mt_bench_question.jsonl": (0, 0, 80),
    "fastchat/vicuna_question.jsonl": (0, 0, 80),
    "hellaswag/hellaswag_val_first1000.jsonl": (0, 0, 0),
    "hh_rlhf/harmless-base-first1800.jsonl.gz": (1791, 1791, 1795),
    "ja_instruction/data.jsonl": (669, 0, 669),
    "ko_chatbot/ChatbotData.csv": (11823, 0, 11823),
    "llama_factory/alpaca_en_demo.json": (999, 0, 999),
    "llama_factory/alpaca_zh_demo.json": (1000, 0, 1000),
    "llama_factory/c4_demo.jsonl": (0, 0, 0),
    "llama_factory/dpo_en_demo.json": (300, 300, 300),
    "llama_factory/dpo_zh_demo.json": (300, 300, 300),
    "llama_factory/kto_en_demo.json": (150, 1, 300),
    "llama_factory/v1_sft_demo.jsonl": (500, 0, 500),
    "llama_factory/wiki_demo.txt": (0, 0, 0),
    "oasst/oaast_rm_zh.json": (775, 772, 775),
    "reviews/nsmc_first20000.jsonl": (0, 0, 0),
    "reviews/rt-polarity.neg": (0, 0, 0),
    "self_instruct/seed_tasks.jsonl": (175, 0, 175),
    "self_instruct/user_oriented_instructions.jsonl": (252, 0, 252),
    "sharegpt/dpo_zh_500.jsonl": (500, 500, 500),
    "sharegpt/sharegpt_zh_1K_format.jsonl": (988, 0, 998),
    "text/cs336_tinystories_sample.txt": (0, 0, 0),
}
"""Records that SFT, the reward model and PPO can use, in the format that is recognised."""


def check(stage: str, **source: Any) -> tuple[int, StageSource | None, str]:
    """Exit code, the source, and everything that is said of it."""
    config = Config.model_validate(
        {"run_dir": "r", "backbone": {"path": "b"}, stage: {"data": [source]}}
    )
    report = examine(config, None, (stage,)).report
    said = "\n".join(
        "\n".join([each.source, each.message, *each.examples]) for each in report.findings
    )
    return report.exit_code, report.sources[0] if report.sources else None, said


@pytest.mark.parametrize("name", USABLE)
def test_every_file_is_read_or_refused_with_words(
    name: str, testdata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Has tests of its own, and takes minutes here.
    monkeypatch.setattr(records, "near_duplicates", lambda count, text: [])
    for stage, usable in zip(STAGES, USABLE[name], strict=True):
        code, source, said = check(stage, path=str(testdata / name))
        assert source is not None and source.num_usable == usable, said
        assert code in (0, 1) and "Traceback" not in said
        assert usable or (code == 1 and name in said)


@pytest.mark.parametrize(("part", "usable"), [("dev", 285), ("test", 1842)])
def test_tables_without_a_header(part: str, usable: int, testdata: Path) -> None:
    columns = ["question", "A", "B", "C", "D", "answer"]
    mapping = {"prompt": "question", "completion": "answer"}
    folder = str(testdata / "mmlu" / part / "*.csv")
    code, source, said = check("sft", path=folder, columns=columns, format=mapping)
    assert source is not None and source.num_usable == source.num_records == usable
    assert code == 0, said
