"""Every figure on the pages is one of the JSON files behind them, rounded, and none is missing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_compare import make_run
from test_page import SUMMARY

from chatllama.reporting.compare import compare_runs
from chatllama.reporting.page import write_report
from chatllama.runs.folder import RunFolder
from chatllama.runtime.files import write_json

pytestmark = pytest.mark.slow


def numbers_of(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for each in tree:
            yield from numbers_of(each)
    elif isinstance(tree, int | float):
        yield tree


def shown(html: str) -> set[str]:
    """Decimal numbers in the text, without plots, attributes and tooltips."""
    text = re.sub(r"<svg.*?</svg>|<[^>]*>", " ", html, flags=re.DOTALL)
    return set(re.findall(r"(?<![\w.])-?\d+\.\d+(?![\w.])", text.replace("\N{MINUS SIGN}", "-")))


def assert_of_the_files(html: str, values: list[float]) -> None:
    for text in shown(html):
        digits = len(text.partition(".")[2])
        assert any(f"{factor * v:.{digits}f}" == text for v in values for factor in (1, 100)), text


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = make_run(tmp_path / "one", 0.05, [1.123, 2.456, 3.789])
    roles = {
        name: {"gold_mean": 0.3117 + n, "gold_se": 0.0423, "score_mean": -0.717 * n,
               "score_se": 0.0611, "response_length": 17.77 + n, "eos_rate": 0.9871}
        for n, name in enumerate(("base", "sft", "ppo"))
    }  # fmt: skip
    roles["ppo"] |= {"kl": 4.4321, "kl_se": 0.2113, "win_rate": 0.8713, "win_rate_low": 0.8227,
                     "win_rate_high": 0.9084}  # fmt: skip
    write_json(run.summary, roles | {"reward": SUMMARY["reward"]})
    judged = json.loads(run.evaluation.read_text())["judged"]
    write_json(run.evaluation, {"roles": roles, "judged": judged, "samples": []})
    return run


def test_figures_of_the_report_are_those_of_summary_json(run: RunFolder) -> None:
    page = write_report(run).read_text()
    values = list(numbers_of(json.loads(run.summary.read_text())))
    section = page.partition('<section id="results">')[2].partition("</section>")[0]
    # The scale of the win rate has its middle, and the words their 0.5 for a tie.
    assert_of_the_files(section, [*values, 0.5])
    found = shown(section)
    for text in ("2.31", "0.04", "-1.43", "19.8", "4.43", "87.1", "82.3", "90.8"):
        assert text in found, (text, sorted(found))


def test_figures_of_a_comparison_are_those_of_the_runs(run: RunFolder, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", 0.05, [2.5, 2.5, 2.5])
    page = compare_runs([run.root, other.root]).read_text()
    section = page.partition("<h2>Results</h2>")[2].partition("</section>")[0]
    files = [json.loads(path.read_text()) for path in (run.evaluation, other.evaluation)]
    assert_of_the_files(section, [*numbers_of(files), 0.5])  # hours: 1800 s each
    expected = {"2.312", "0.042", "-1.434", "19.770", "0.987", "4.432", "0.211", "0.871"}
    assert expected | {"0.823", "0.908", "2.500"} <= shown(section)
