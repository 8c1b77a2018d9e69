"""Terms of the score on two ranks give what one process gives: functions, a model, a server."""

import json
from pathlib import Path

import pytest
from generation_runs import make_run
from launching import PROJECT, launch
from serving_setup import serving
from test_other_models import save
from workers.terms_worker import WORDS, scores

import chatllama
from chatllama.inference.folders import find_model

FUNCTIONS = Path(__file__).resolve().parents[2] / "functions" / "rewards_of_tests"


@pytest.mark.slow
def test_two_ranks_score_as_one_process(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    adapter = make_run(tmp_path / "run", tiny_tokenizer_dir).reward_adapter
    functions = {"careless": {"processes": 1, "timeout": 1.0, "timeout_score": -1.0}}
    functions |= {"with_column": {}, "batch_beside_the_longest": {}, "batch_later": {}}
    functions |= {"later": {"timeout": 0.3, "timeout_score": -2.0}}
    terms = [{"function": f"{FUNCTIONS}:{name}", **more} for name, more in functions.items()]
    terms += [{"model": save(tmp_path / "gpt2", "gpt2")}]
    run, _ = find_model(adapter)
    with serving(run) as url:
        terms += [{"urls": [url]}]
        (tmp_path / "terms.json").write_text(json.dumps(terms))
        alone, error = scores(terms)
        launch(PROJECT / "tests/workers/terms_worker.py", tmp_path / "terms.json", tmp_path)
    for rank in (0, 1):
        found, said = json.loads((tmp_path / f"out-{rank}.json").read_text())
        for mine, theirs in zip(found, alone, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert said == error and "'bad'" in said and "KeyError" in said
    columns, lengths = list(zip(*alone, strict=True)), tuple(map(len, WORDS))
    assert columns[0] == (*lengths[:-1], -1) and columns[4] == (*lengths[:-1], -2)  # "slow"
    assert columns[1] == tuple(number + length for number, length in enumerate(lengths))
    assert columns[2] == tuple(length - 16 for length in lengths)  # the longest of all ranks' 16
    assert columns[3] == lengths
    judge = chatllama.load(adapter)
    expected = [judge.score("what is it", text) for text in WORDS]
    assert columns[-1] == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) > 3
