"""`chatllama eval --translation`: known scores, and a run's answers beside their references."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatllama import cli
from chatllama.inference.evaluation.translation import translation_scores
from chatllama.inference.prompt_files import Prompt
from data.cli import read_requests
from data.reading.translation import TEMPLATES, request

GERMAN = ["Die Katze sass auf der Matte.", "Guten Tag.", "Es regnet."]
ENGLISH = ["the cat sat on the red mat", "Good day to you all.", "It rains again in May."]


def test_scores_by_hand() -> None:
    scores = translation_scores(["the cat sat on the mat"], ENGLISH[:1], "en")
    # n-grams 6/6, 4/5, 3/4, 2/3: (.4) ** (1/4) = .7953; six words for seven: exp(-1/6) = .8465
    assert scores["bleu"]["score"] == pytest.approx(67.32, abs=0.01)
    assert scores["bleu"]["plus_minus"] is None
    assert "tok:13a" in scores["bleu"]["signature"] and 0 < scores["chrf"]["score"] < 100
    same = translation_scores(ENGLISH, ENGLISH, "en")
    assert [same[name]["score"] for name in ("bleu", "chrf")] == pytest.approx([100, 100])
    assert same["bleu"]["plus_minus"] == 0


def test_resamples_without_a_match_have_their_place_in_the_interval() -> None:
    scores = translation_scores([ENGLISH[0], "x"], ENGLISH[:2], "en")
    assert 0 < scores["bleu"]["score"] < 100
    assert scores["bleu"]["plus_minus"] == pytest.approx(50)  # a quarter of them: 0, another: 100
    assert "tok:13a" in scores["bleu"]["signature"]


def test_words_of_languages_without_spaces() -> None:
    chinese = ["\u6211\u4eec\u660e\u5929\u53bb\u5317\u4eac"]
    scores = translation_scores(["\u6211\u4eec\u660e\u5929\u53bb\u4e0a\u6d77"], chinese, "zh-CN")
    # characters 5/7, 4/6, 3/5, 2/4: (1/7) ** (1/4)
    assert scores["bleu"]["score"] == pytest.approx(61.48, abs=0.01)
    assert "tok:zh" in scores["bleu"]["signature"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with an SFT adapter that answers as `generate` would, without a model."""
    (tmp_path / "run/sft/adapter").mkdir(parents=True)
    config = f"run_dir: {tmp_path}/run\nbackbone: {{path: somewhere}}\n"
    (tmp_path / "run/config.yaml").write_text(config)
    (tmp_path / "news.de").write_text("\n".join(GERMAN) + "\n")
    (tmp_path / "news.en").write_text("\n".join(ENGLISH) + "\n")
    known = {request(de, ["de", "en"], TEMPLATES[0]): en
             for de, en in zip(GERMAN, ENGLISH, strict=True)}  # fmt: skip

    def answer(run: Path, prompts: list[Prompt], options: Any, out: Path) -> None:
        assert options.temperature == 0.0 and options.role == "sft"
        rows = [{"response": known[str(each.content)], "finished": each.id != 1}
                for each in prompts]  # fmt: skip
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr("chatllama.inference.batch.generate_command", answer)
    return tmp_path / "run"


def test_a_run_is_scored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(run), "--translation", str(run.parent / "news"), "--role", "sft"]
    assert cli.main([*command, "--languages", "de", "en"]) == 0
    file = run / "translation/news.3.de-en.sft.scores.json"
    result = json.loads(file.read_text())
    assert (result["sentences"], result["unfinished"], result["empty"]) == (3, 1, 0)
    assert result["bleu"]["score"] == pytest.approx(100)
    told = capsys.readouterr().out
    assert "3 sentences de-en by sft; 1 cut by max_new_tokens, 0 empty" in told
    assert "BLEU 100.0 +- 0.0" in told and str(file) in told
    assert cli.main([*command, "--languages", "de", "en", "--limit", "2"]) == 0
    assert (run / "translation/news.2.de-en.sft.jsonl").is_file()


def test_weights_in_another_form_are_passed_on_and_scored_apart(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | None, str | None]] = []

    def answer(run: Path, prompts: list[Prompt], options: Any, out: Path) -> None:
        asked.append((options.dtype, options.quantization))
        line = json.dumps({"response": "a", "finished": True}) + "\n"
        out.write_text(line * len(prompts))

    monkeypatch.setattr("chatllama.inference.batch.generate_command", answer)
    command = ["eval", str(run), "--translation", str(run.parent / "news")]
    command += ["--languages", "de", "en"]
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0  # the config's own
    assert cli.main([*command, "--dtype", "float16", "--quantization", "nf4"]) == 0
    assert asked == [("bfloat16", None), ("float16", "nf4")]
    scores = [
        json.loads((run / f"translation/news.3.de-en.sft{form}.scores.json").read_text())
        for form in ("", ".float16.nf4")
    ]
    found = [(each["dtype"], each["quantization"]) for each in scores]
    assert found == [("bfloat16", "none"), ("float16", "nf4")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--languages", "de", "xx"], "unknown language 'xx'"),
        (["--languages", "de", "fr"], "news.de is there, but no"),
        (["--languages", "de", "en", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--languages", "de", "en", "--role", "policy"], "--role policy"),
    ],
)
def test_mistakes(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(run), "--translation", str(run.parent / "news"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_pair_without_a_side_stops(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("de\ten\neins\tone\nzwei\t \n")
    with pytest.raises(ValueError, match=r"a\.tsv:3: the translation is empty"):
        read_requests(str(tmp_path / "a.tsv"), ["de", "en"])
    (tmp_path / "a.tsv").write_text("de\tfr\neins\tun\n")
    with pytest.raises(ValueError, match=r"a\.tsv:2: expected 'de' and 'en'"):
        read_requests(str(tmp_path / "a.tsv"), ["de", "en"])
