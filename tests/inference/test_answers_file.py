"""The file that generate writes: continued, kept apart, never overwritten."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from generation_runs import PROMPTS, answers, before_rewards, make_run

from chatllama.inference import batch as generation_command
from chatllama.inference.answerer import Answerer
from chatllama.inference.prompt_files import Prompt
from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import settings_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture
def without_rewards(run: RunFolder, tmp_path: Path) -> RunFolder:
    return before_rewards(run, tmp_path)


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_samples": 3}, {"best_of": 3}, {}])
@pytest.mark.parametrize("kept_lines", [0, 5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_file_is_continued_to_the_same_bytes(
    run: RunFolder, tmp_path: Path, options: dict[str, Any], kept_lines: int
) -> None:
    out = tmp_path / "a.jsonl"
    answers(run, out, **options)
    whole = out.read_bytes()
    lines = whole.split(b"\n")
    out.write_bytes(b"\n".join([*lines[:kept_lines], lines[kept_lines][:25]]))
    answers(run, out, **options)
    assert out.read_bytes() == whole


def test_a_finished_file_is_left_alone(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "a.jsonl"
    answers(run, out, best_of=2)
    whole, summary = out.read_bytes(), capsys.readouterr().err.splitlines()
    monkeypatch.setattr(generation_command, "_answer_all", None)
    answers(run, out, best_of=2)
    assert out.read_bytes() == whole
    again = capsys.readouterr().err.splitlines()
    told = ("a second", "lineage.json")  # speed, and that the run holds no hashes
    assert again == [line for line in summary if not any(word in line for word in told)]


def test_each_batch_is_written_when_it_is_done(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "a.jsonl", []
    real = Answerer.answer

    def answer(*args: Any) -> Any:
        seen.append(len(out.read_text().splitlines()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Answerer, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        answers(run, out, batch_size=2)
    assert seen == [0, 2, 4] and len(out.read_text().splitlines()) == 4


def test_other_settings_and_prompts_are_refused(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    answers(run, out)
    whole = out.read_bytes()
    for options, message in (
        ({"seed": 1, "top_p": 0.5}, "top_p was 1.0, is 0.5; seed was 0, is 1"),
        ({"stops": ("x",)}, r"stops was \[\], is \['x'\]"),
        ({"prompts": PROMPTS[:3]}, "other prompts"),
        ({"prompts": [*PROMPTS[:5], Prompt(5, "ho", "x")]}, "other prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            answers(run, out, **cast(Any, options))
    assert out.read_bytes() == whole
    answers(run, out, batch_size=2)  # which changes no answer


def test_a_retrained_adapter_is_another_setting(
    run: RunFolder, without_rewards: RunFolder, tmp_path: Path
) -> None:
    import shutil

    answers(without_rewards, tmp_path / "a.jsonl")
    (without_rewards.root / "sft").unlink()
    shutil.copytree(run.policy_adapter, without_rewards.sft_adapter)
    with pytest.raises(ValueError, match=r"made otherwise .adapter was"):
        answers(without_rewards, tmp_path / "a.jsonl")


def test_files_of_others_are_not_touched(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("precious\n")
    with pytest.raises(ValueError, match=r"exists, without a.jsonl.settings.json beside it"):
        answers(run, out)
    assert out.read_text() == "precious\n"
    other = tmp_path / "b.jsonl"
    lines = answers(run, other)
    settings = settings_path(other)
    lines[1]["id"] = 7
    other.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    with pytest.raises(ValueError, match=r"b.jsonl:2: id 7, sample 0 where id 1, sample 0"):
        answers(run, other)
    other.write_text(json.dumps(lines[0]) + "\nnonsense\n")
    with pytest.raises(ValueError, match=r"b.jsonl:2: not JSON"):
        answers(run, other)
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        answers(run, other)
