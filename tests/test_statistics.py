"""Means, intervals and paired differences, against scipy, exact tests and simulation."""

import itertools

import numpy as np
import pytest
from scipy import special, stats

from condconv.tools.studies import statistics

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_an_interval_is_students(count):
    values = RANDOM.normal(3, 2, count)
    found = statistics.estimate(values)
    low, high = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose((found.low, found.high), (low, high), rtol=1e-9)
    assert found.count == count
    np.testing.assert_allclose(found.deviation, np.std(values, ddof=1))


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_a_paired_difference_is_that_of_the_t_test(count):
    values, baseline = RANDOM.normal(1, 1, count), RANDOM.normal(0, 1, count)
    found = statistics.paired_difference(values, baseline)
    reference = stats.ttest_rel(values, baseline)
    interval = reference.confidence_interval(0.95)
    np.testing.assert_allclose(found.p_value, reference.pvalue, rtol=1e-9)
    np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), rtol=1e-9)


def test_the_other_way_round_only_the_sign_changes():
    values, baseline = RANDOM.normal(1, 1, 6), RANDOM.normal(0, 1, 6)
    there = statistics.paired_difference(values, baseline)
    back = statistics.paired_difference(baseline, values)
    np.testing.assert_allclose(
        [back.mean, back.low, back.high], -np.array([there.mean, there.high, there.low])
    )
    assert back.p_value == there.p_value


def test_of_one_value_there_is_no_interval():
    found = statistics.paired_difference([0.75], [0.5])
    assert (found.count, found.mean) == (1, 0.25)
    assert found.deviation is found.low is found.high is found.p_value is None


@pytest.mark.parametrize(("by", "p_value"), [(0.25, 0.0), (0.0, 1.0)])
def test_equal_differences_leave_no_doubt(by, p_value):
    found = statistics.paired_difference([0.5 + by, 0.25 + by, by], [0.5, 0.25, 0])
    assert (found.mean, found.low, found.high, found.p_value) == (by, by, by, p_value)


def test_what_has_no_partner_is_refused():
    with pytest.raises(ValueError, match="as many values on both sides, not 2 and 3"):
        statistics.paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="one value at least"):
        statistics.estimate([])
    with pytest.raises(ValueError, match="7 examples are not images of 2 views each"):
        statistics.difference_by_image(np.ones((1, 7)), np.ones((1, 7)), views=2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws = RANDOM.normal(0.8, 0.1, (2000, 3))
    found = [statistics.estimate(values) for values in draws]
    covered = np.mean([each.low <= 0.8 <= each.high for each in found])
    assert abs(covered - 0.95) < 0.02  # four standard errors


def clustered(images: int, views: int, shift: float = 0.0) -> np.ndarray:
    """Returns a run on hard and easy images, whose views are right or wrong alike."""
    chance = np.clip(RANDOM.beta(0.5, 0.3, images) + shift, 0, 1)
    return (RANDOM.random((images, views)) < chance[:, None]).reshape(1, -1)


def test_views_of_an_image_are_not_taken_for_independent_images():
    """With no difference, p is below 1/20 once in twenty times; counting views, far oftener."""
    pairs = [(clustered(60, 10), clustered(60, 10)) for _ in range(400)]
    by_image = [statistics.difference_by_image(*pair, views=10).p_value for pair in pairs]
    by_view = [statistics.difference_by_image(*pair).p_value for pair in pairs]
    assert 0.015 < np.mean(np.less(by_image, 0.05)) < 0.095
    assert np.mean(np.less(by_view, 0.05)) > 0.3


def test_single_views_agree_with_mcnemars_exact_test():
    right = RANDOM.random(400) < 0.8
    flipped = np.where(RANDOM.random(400) < 0.12, ~right, right)
    gained, lost = np.sum(flipped & ~right), np.sum(right & ~flipped)
    exact = stats.binomtest(int(gained), int(gained + lost)).pvalue
    found = statistics.difference_by_image([flipped], [right])
    assert found.mean == pytest.approx((gained - lost) / 400)
    assert found.p_value == pytest.approx(exact, abs=0.05)


def test_few_images_agree_with_all_permutations_of_their_signs():
    ours, theirs = clustered(12, 10, 0.1), clustered(12, 10)
    found = statistics.difference_by_image(ours, theirs, views=10)
    differences = (ours.astype(int) - theirs).reshape(12, 10).mean(axis=1)
    signs = np.array(list(itertools.product((1, -1), repeat=12)))
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    assert found.mean == pytest.approx(differences.mean())
    assert found.p_value == pytest.approx(np.mean(extreme), abs=0.06)


def test_runs_of_several_seeds_are_averaged_on_each_image():
    ours, theirs = RANDOM.random((3, 30)) < 0.7, RANDOM.random((2, 30)) < 0.6
    found = statistics.difference_by_image(ours, theirs)
    reference = stats.ttest_rel(ours.mean(axis=0), theirs.mean(axis=0))
    np.testing.assert_allclose(found.p_value, reference.pvalue)


def test_the_quantile_is_the_tables():
    assert special.stdtrit(2, 0.975) == pytest.approx(4.302653)  # two degrees of freedom
    found = statistics.estimate([1.0, 2.0, 3.0])
    assert found.high == pytest.approx(2 + 4.302653 / np.sqrt(3))
