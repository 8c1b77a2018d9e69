import math

import pytest

from chatllama.reporting.statistics import mean_and_error, wilson_interval


def test_mean_and_error_by_hand():
    # deviations -2, 0, 2: variance 8 / 2 = 4; error sqrt(4 / 3)
    assert mean_and_error([1.0, 3.0, 5.0]) == (3.0, pytest.approx(math.sqrt(4 / 3)))
    assert mean_and_error([4.0, 4.0]) == (4.0, 0.0)


def test_one_value_has_no_known_error():
    assert mean_and_error([2.5]) == (2.5, math.inf)


def test_wilson_interval_as_published():
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, count) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_is_symmetric_and_stays_inside():
    for count in (1, 2, 50):
        for wins in (0, 0.5, count / 2, count):
            low, high = wilson_interval(wins, count)
            assert 0 <= low <= wins / count <= high <= 1
            mirrored = wilson_interval(count - wins, count)
            assert mirrored == pytest.approx((1 - high, 1 - low))


def test_wilson_interval_narrows_with_numbers_and_widens_with_z():
    narrow, wide = wilson_interval(80, 100), wilson_interval(8, 10)
    assert wide[0] < narrow[0] and narrow[1] < wide[1]
    surer = wilson_interval(8, 10, z=2.58)
    assert surer[0] < wide[0] and wide[1] < surer[1]
