"""The report's section on the reward model, from what the RM doctor writes."""

import re
from pathlib import Path

import numpy as np
from datasets import Dataset

from chatllama.config import RewardSection
from chatllama.report import write_report
from chatllama.report_doctor import doctor_body
from chatllama.reward_models import doctor_path
from chatllama.run_folder import RunFolder, write_json
from trainers.preference_doctor import examine_data
from trainers.reward_data import Preferences
from trainers.reward_doctor import PaddingError, diagnosis, examine_model


def examples(count: int) -> Dataset:
    rng = np.random.default_rng(count)
    return Dataset.from_list(
        [
            {
                "answer_ids": [[1, n, *rng.integers(5, 90, rng.integers(2, 9)).tolist(), 2]] * 2,
                "ranks": [0, 1],
                "ratings": [0.0, 0.0],
                "prompt_length": 2,
                "where": f"<script>f:{n}",
            }
            for n in range(count)
        ]
    )


def test_the_section_shows_figures_warnings_and_plots(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    assert doctor_body(run) == ""
    data = Preferences(examples(60), examples(50), {"too <long>": 3})
    found = examine_data(data)
    write_json(doctor_path(run), diagnosis(found))
    assert "accuracy of words alone" in doctor_body(run) and "<svg" not in doctor_body(run)

    scores = [x for n in range(50) for x in ((1.0, 0.0) if n % 10 else (0.0, 1.0))]
    model = examine_model(
        data.held_out, [scores, scores], RewardSection(), 0.95, PaddingError(1e-6, 1e-3)
    )
    write_json(doctor_path(run), diagnosis(found, model))
    run.config.write_text("seed: 0\n")
    page = write_report(run).read_text(encoding="utf-8")
    section = page.split("Reward model check")[1].split("</section>")[0]
    assert section.count("<svg") == 3 and "#010203" not in section
    for expected in (
        "0.900 (0.786–0.957)",  # noqa: RUF001  45 of 50, by Wilson's formula
        "<strong>few_held_out</strong>: 50 held-out prompts",
        "Bayes limit</th><td>0.950",
        "says 0.73, is 0.90",
        "0.900, 0.900",
        "shortened</th><td>3<",
    ):
        assert expected in section, expected
    assert "<script>" not in page
    assert re.search(r"<h2>Reward model check</h2>", page)
