"""The examples run, and do what they say."""

import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_runs import make_run

from chatllama.config.sources import ColumnMapping, DataSource
from data.reading.source import read_source
from trainers.ppo.rewards import Scorer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_each_is_about_twenty_lines_and_says_how_it_is_used() -> None:
    for name in ("load_and_answer.py", "reward_function.py", "data_format.py"):
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        code = text.split('"""', maxsplit=2)[2]
        assert sum(bool(line.strip()) for line in code.splitlines()) <= 20, name
        assert name in text or f"examples.{name.removesuffix('.py')}:" in text


def test_every_role_of_a_run_answers(
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", tiny_tokenizer_dir)
    run_example("load_and_answer.py", run.root, "Anna paints", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    starts = [line.partition(" (score ")[0] for line in lines if " (score " in line]
    assert starts == ["base", "sft", "policy", "ema"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [("A note to Rosa.", 0.0), ("One. Two! Three?", -2.0), ("word " * 25, -0.5), (" ... ", -2.0)],
)
def test_the_reward_function_is_a_term_of_the_score(response: str, expected: float) -> None:
    from ppo_runs import ppo_config, sample_of

    rewards = [{"function": "examples.reward_function:brevity", "weight": 0.5}]
    cfg = ppo_config("base", "run", ppo={"rewards": rewards})
    scorer = Scorer(cfg, [])
    terms = scorer.term_scores(torch.zeros(1, 0), [sample_of("a prompt", response)])
    scores = scorer.total(terms)
    assert scores.tolist() == pytest.approx([0.5 * expected])


def test_a_log_becomes_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "support.log", tmp_path / "support.jsonl"
    log.write_text(
        "Eva: It rains: why?\nBot: Clouds.\nEva: Thanks!\nBot: Bye.\n\nJo: Hi\nBot: Hi!\n"
    )
    run_example("data_format.py", log, out, monkeypatch=monkeypatch)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows, report = read_source(DataSource(path=str(out), format="messages"), "sft")
    assert report.num_kept == 2
    assert rows[0]["messages"] == [
        {"role": "user", "content": "It rains: why?"},
        {"role": "assistant", "content": "Clouds."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "Bye."},
    ]


def test_columns_of_other_names_need_no_code(tmp_path: Path, data_cache: None) -> None:
    table = tmp_path / "faq.csv"
    table.write_text("frage,antwort\nWhat is it?,A tulip.\n")
    columns = ColumnMapping(prompt="frage", completion="antwort")
    rows, _ = read_source(DataSource(path=str(table), format=columns), "sft")
    assert [m["content"] for m in rows[0]["messages"]] == ["What is it?", "A tulip."]


SMALL = """
    backbone.from_scratch.steps=20 backbone.from_scratch.hidden_size=32 sft.steps=2
    backbone.from_scratch.num_layers=1 reward.epochs=0.01 ppo.steps=2 ppo.rollout_batch_size=16
    ppo.minibatch_size=16 ppo.microbatch_size=16 ppo.warmup_steps=1 evaluation.num_prompts=8
    generation.max_new_tokens=8
"""


@pytest.mark.slow
def test_the_notebook_trains_on_a_function_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_cache: None
) -> None:
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.chdir(EXAMPLES)
    cells = json.loads((EXAMPLES / "own_reward.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(bool(line.strip()) for line in "\n".join(code[:3]).splitlines()) <= 15
    names: dict[str, Any] = vars(notebook)
    for source in code:
        exec(source, names)
        if source.startswith("config ="):
            names["settings"] += [f"run_dir={tmp_path}/run", *SMALL.split()]
    rows = names["run"].metrics
    assert {"sft", "reward", "ppo"} == set(rows.stage)
    # The mean of `brief` over a batch: at most 0, and never that of the reward model.
    scores = rows[rows.stage == "ppo"]["ppo/score_mean"]
    assert len(scores) == 2 and all(-2 <= score <= 0 for score in scores)
    assert len(names["answers"]) == 4 and names["run"].roles == ("base", "sft", "policy")
