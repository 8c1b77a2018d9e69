"""The curve of over-optimisation: estimates and fits by hand, and every figure of the page."""

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from test_figures import assert_of_the_files, numbers_of

from chatllama.reporting.overoptimisation import Point, best_of_n, fit, measured_curves, verdict_of
from chatllama.reporting.page import write_report
from chatllama.runs.folder import RunFolder


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices_of_n_samples(n: int) -> None:
    draw = np.random.default_rng(1)
    proxy, gold = draw.normal(size=(2, 4, 5))
    found = best_of_n(proxy, gold, n)
    for prompt in range(4):
        chosen = [max(each, key=lambda i: proxy[prompt, i]) for each in combinations(range(5), n)]
        assert found.proxy[prompt] == pytest.approx(fmean(proxy[prompt, i] for i in chosen))
        assert found.gold[prompt] == pytest.approx(fmean(gold[prompt, i] for i in chosen))
    # log 2 - 1/2 and log 5 - 4/5 nats
    assert found.kl[0] == pytest.approx({1: 0.0, 2: 0.1931, 3: 0.4319, 5: 0.8094}[n], abs=1e-4)


def points(name: str, golds: list[float], kls: list[float], noise: float = 0.0) -> list[Point]:
    draw = np.random.default_rng(0)
    own = [g + noise * (each - each.mean()) for g in golds for each in [draw.normal(size=300)]]
    return [
        Point(i, [kl] * 300, list(gold), [2.0 * i] * 300)
        for i, (kl, gold) in enumerate(
            zip(kls, (np.broadcast_to(each, 300) for each in own), strict=True), start=name != "ppo"
        )
    ]


def test_fits_recover_what_was_planted() -> None:
    kls = [0.0, 0.25, 1.0, 4.0, 9.0]
    # d = 0, .5, 1, 2, 3: 1 + d (2 - .5 d), and 1 + d (2 - .8 log d).
    found = fit(points("best_of_n", [1.0, 1.875, 2.5, 3.0, 2.5], kls), "best_of_n")
    assert found is not None
    assert (found["alpha"], found["beta"], found["peak"]) == pytest.approx((2.0, 0.5, 2.0))
    golds = [1.0, 2.277259, 3.0, 3.890965, 4.363331]
    found = fit(points("ppo", golds, kls), "ppo")
    assert found is not None
    assert (found["alpha"], found["beta"]) == pytest.approx((2.0, 0.8), abs=1e-5)
    assert found["peak"] is None  # exp(1.5) = 4.5 lies beyond the last distance, 3
    assert fit(points("ppo", golds[:3], kls[:3]), "ppo") is None  # two points, two numbers
    assert fit(points("ppo", golds[:4], [0.0, -0.1, 1.0, 4.0]), "ppo") is None


def test_errors_of_a_fit_are_those_of_its_linear_estimate() -> None:
    kls = [0.0, 0.25, 1.0, 4.0, 9.0]
    planted = points("best_of_n", [1.0, 1.875, 2.5, 3.0, 2.5], kls, noise=0.5)
    found = fit(planted, "best_of_n")
    assert found is not None
    # At fixed distances alpha is a mean over prompts of a fixed combination of their golds.
    d = np.sqrt(kls[1:])
    each = np.linalg.pinv(np.stack([d, -d * d], 1)) @ [
        np.subtract(point.gold, planted[0].gold) for point in planted[1:]
    ]
    for row, name in zip(each, ("alpha", "beta"), strict=True):
        assert found[f"{name}_se"] == pytest.approx(stdev(row) / math.sqrt(300), rel=0.1)


@pytest.mark.parametrize(
    ("golds", "word"),
    [
        ([1.0, 2.0, 1.0], "Over-optimised: from step 1 to 2 gold changes by -1.000"),
        ([1.0, 2.0, 3.0], "No over-optimisation seen"),
        ([1.0, 3.0, 2.99], "No over-optimisation that is more than chance"),
    ],
)
def test_the_turn_is_told(golds: list[float], word: str) -> None:
    ppo = points("ppo", golds, [0.0, 1.0, 2.0], noise=0.5)
    assert word in verdict_of(measured_curves("g", 1, ppo, ppo)["turn"])
    fallen = [Point(p.label, p.kl, p.gold, [-p.label] * 300) for p in ppo]
    if "Over" in word:
        assert "the proxy with it" in verdict_of(measured_curves("g", 1, ppo, fallen)["turn"])


@pytest.mark.slow
def test_every_figure_of_the_page_is_that_of_the_file(tmp_path: Path) -> None:
    kls = [0.0, 0.3, 1.1, 4.2, 9.3]
    best = points("best_of_n", [1.0, 1.9, 2.6, 3.1, 2.4], kls, noise=0.4)
    ppo = points("ppo", [1.0, 2.2, 2.9, 2.5, 1.7], [k * 1.3 for k in kls], noise=0.4)
    run = RunFolder(tmp_path)
    run.config.write_text("run_dir: x\nbackbone: {path: m}\n")
    run.overoptimisation.write_text(json.dumps(measured_curves("m:gold", 64, best, ppo)))
    page = write_report(run).read_text()
    section = page.partition('<section id="overoptimisation">')[2].partition("</section>")[0]
    found = json.loads(run.overoptimisation.read_text())
    for name, label in (("best_of_n", "n"), ("ppo", "step")):
        for point in found[name]:
            row = [f"{point[label]}", f"{point['kl']:.3f}", f"{math.sqrt(point['kl']):.3f}"]
            row += [f"{point[k]:.3f} ± {point[f'{k}_se']:.3f}" for k in ("gold", "proxy")]
            assert f"<tr><td>{'</td><td>'.join(row)}</td></tr>" in section
        form = found["fits"][name]
        assert f"alpha {form['alpha']:.3f} ± {form['alpha_se']:.3f}, beta" in section
        assert f"beta {form['beta']:.3f} ± {form['beta_se']:.3f}" in section
    turn = found["turn"]
    assert f"gold changes by {turn['gold_change']:+.3f} ± {turn['gold_change_se']:.3f}" in section
    assert "300 held-out prompts, 64 samples" in section and "m:gold" in section
    assert_of_the_files(section, list(numbers_of(found)))  # and it shows no other
    assert section.count("<svg") == 2 and "<script" not in page
