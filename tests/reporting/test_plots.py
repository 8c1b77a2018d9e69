import re

import pytest

from chatllama.reporting.plots import PANELS, Panel, draw, draw_bars, step_ticks

SHARE = Panel("Share", "", {"a": "a"}, 1.0)


def ticks(svg: str) -> list[float]:
    """The numbers that a plot's axes show."""
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    return [float(t.replace("\N{MINUS SIGN}", "-")) for t in texts if re.match(r"\W?\d", t)]


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.5, 1.0], [0.97, 0.99]])
def test_a_share_ends_at_one(values: list[float]) -> None:
    lines = [{"step": step, "a": value} for step, value in enumerate(values)]
    shown = draw(SHARE, lines)
    free = draw(Panel("Free", "", {"a": "a"}), lines)
    assert shown is not None and free is not None
    assert max(ticks(shown)) <= 1.0
    if values[-1] == 1.0:
        assert max(ticks(shown)) == 1.0


def test_a_wrong_share_stays_seen() -> None:
    svg = draw(SHARE, [{"step": 0, "a": 0.0}, {"step": 1, "a": 4.0}])
    assert svg is not None and max(ticks(svg)) == 4.0


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(1, 375, [100, 200, 300, 375]), (0, 25, [0, 8, 16, 25]), (1, 3, [1, 2, 3])],
)
def test_the_last_step_has_its_tick(first: float, last: float, expected: list[float]) -> None:
    assert step_ticks(first, last) == expected
    svg = draw(Panel("P", "", {"a": "a"}), [{"step": s, "a": 0.5} for s in (first, last)])
    assert svg is not None and last in ticks(svg)


def test_bars_say_their_values_and_share_no_id_with_curves() -> None:
    rows = {"base": (-3.0, 0.25), "PPO": (2.0, float("inf"))}
    svg = draw_bars("Reward score (raw)", rows)
    assert "base -3.00 ± 0.25; PPO 2.00 ± inf" in svg
    curve = draw(PANELS["ppo"][0], [{"step": 1, "ppo/rm_score_mean": 1.0}])
    assert curve is not None
    ids = [set(re.findall(r'\bid="([^"]+)"', each)) for each in (svg, curve)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
