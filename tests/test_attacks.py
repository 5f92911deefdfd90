"""Membership attacks as functions of numbers, each against its definition written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

import fastlur
from fastlur.attacks import SPREAD, LikelihoodRatio, auc, auc_interval, likelihood_ratio, membership


def pairs(lower, higher):
    """ψ of every pair: 1 where the higher one is higher, ½ where they are equal; shape (lower, higher)."""
    return np.array([[(y > x) + 0.5 * (y == x) for y in higher] for x in lower], float)


def delong(lower, higher, level):
    """DeLong's interval by its definition over all pairs."""
    won = pairs(lower, higher)
    m, n = won.shape
    rows = ((won.mean(1) - won.mean()) ** 2).sum() / (m - 1)
    columns = ((won.mean(0) - won.mean()) ** 2).sum() / (n - 1)
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(rows / m + columns / n)
    return won.mean() - half, won.mean() + half


class TestAUC:
    @pytest.mark.parametrize("ties", [False, True])
    def test_it_and_its_interval_are_those_of_all_pairs(self, ties):
        random = np.random.default_rng(0)
        for m, n, level in itertools.product((2, 17, 40), (3, 25), (0.5, 0.95)):
            lower, higher = random.normal(0, 1, m), random.normal(0.3, 2, n)
            if ties:
                lower, higher = lower.round(), higher.round()
            assert auc(lower, higher) == pytest.approx(pairs(lower, higher).mean())
            low, high = delong(lower, higher, level)
            assert auc_interval(lower, higher, level) == pytest.approx((max(low, 0), min(high, 1)))

    def test_the_interval_covers_the_truth_as_often_as_it_says(self):
        """Two Gaussians a distance δ apart: the AUC is Φ(δ/√2)."""
        random, truth = np.random.default_rng(1), stats.norm.cdf(0.8 / math.sqrt(2))
        found = [auc_interval(random.normal(0, 1, 60), random.normal(0.8, 1, 90)) for _ in range(800)]
        covered = np.mean([low <= truth <= high for low, high in found])
        assert 0.925 < covered < 0.975

    def test_it_stays_within_0_and_1_and_too_few_values_say_nothing(self):
        assert auc_interval(np.arange(3.0), np.array([0.5, 1.5, 8, 9]))[1] == 1.0
        assert auc_interval(np.array([8.0, 9, 0.5]), np.array([0.0, 1, 2, 3]))[0] == 0.0
        assert auc_interval(np.arange(5.0), np.array([1.0])) == (0.0, 1.0)
        assert auc_interval(np.array([1.0]), np.arange(5.0)) == (0.0, 1.0)
        assert auc_interval(np.arange(5.0), np.arange(5.0, 9.0)) == (1.0, 1.0)


class TestMembership:
    @pytest.mark.parametrize("sizes", [(200, 200), (500, 60), (40, 300)])
    def test_the_border_is_that_of_a_balanced_logistic_regression(self, sizes):
        """Its ridge-penalised optimum by a general minimiser, on the standardised number."""
        random = np.random.default_rng(2)
        member, stranger = random.beta(8, 2, sizes[0]), random.beta(4, 3, sizes[1])
        x, y = np.concatenate([member, stranger]), np.repeat([1.0, -1.0], sizes)
        weight, z = np.repeat([len(x) / 2 / size for size in sizes], sizes), (x - x.mean()) / x.std()
        cost = lambda w: 0.5 * w[0] ** 2 + (weight * np.logaddexp(0, -y * (w[0] * z + w[1]))).sum()
        slope, intercept = optimize.minimize(cost, [0.0, 0.0], tol=1e-10).x
        border = x.mean() - x.std() * intercept / slope
        asked = np.linspace(0, 1, 2001)
        assert membership(member, stranger, asked) == pytest.approx(100 * (asked < border).mean(), abs=0.1)

    def test_which_side_is_the_larger_one_is_learned(self):
        small, large = np.array([0.0, 0.1, 0.2]), np.array([2.0, 2.1, 2.2])
        assert membership(small, large, np.array([0.0, 2.2, 2.2, 2.2])) == 75
        assert membership(large, small, np.array([0.0, 2.2, 2.2, 2.2])) == 25


@pytest.fixture
def shadows():
    """Log-odds under 12 shadow models of 9 items, each in 6 of them at random, and those under the model attacked."""
    random = np.random.default_rng(3)
    inside = np.stack([random.permutation(np.arange(12) < 6) for _ in range(9)], axis=1)
    said = random.normal(1, 2, 9) + random.normal(0, 1, (12, 9)) * random.uniform(0.5, 2, 9) + 2 * inside
    return random.normal(2, 3, 9), said, inside


class TestLikelihoodRatio:
    @pytest.mark.parametrize("pooled", [False, True])
    def test_online_it_is_the_log_of_the_ratio_of_two_densities(self, shadows, pooled):
        asked, said, inside = shadows
        density = []
        for side in (inside, ~inside):
            columns = [said[side[:, i], i] for i in range(9)]
            spread = [np.std(column, ddof=1) for column in columns]
            if pooled:
                away = np.concatenate([column - column.mean() for column in columns])
                spread = [math.sqrt((away**2).sum() / (len(away) - 9))] * 9
            means = [column.mean() for column in columns]
            density.append(stats.norm.logpdf(asked, means, spread))
        found = likelihood_ratio(asked, said, inside, pooled=pooled)
        np.testing.assert_allclose(found, density[0] - density[1], rtol=1e-10)

    @pytest.mark.parametrize("pooled", [False, True])
    def test_offline_it_is_how_unlikely_such_sureness_is_without_the_item(self, shadows, pooled):
        asked, said, _ = shadows
        spread = said.std(0, ddof=1)
        if pooled:
            spread = np.full(9, math.sqrt((spread**2).mean()))  # as many shadows for each
        found = likelihood_ratio(asked, said, np.zeros_like(said, bool), pooled=pooled)
        np.testing.assert_allclose(found, -stats.norm.logsf(asked, said.mean(0), spread), rtol=1e-10)

    def test_the_surer_the_more_like_a_member_and_finite_however_sure(self, shadows):
        _, said, inside = shadows
        sure = np.array([-1e3, -10.0, 0, 1, 3, 10, 100, 1e3, 1e6])
        same = np.repeat(said[:, :1], 9, axis=1), np.repeat(inside[:, :1], 9, axis=1)
        offline = likelihood_ratio(sure, same[0], np.zeros_like(inside))
        assert (np.diff(offline) >= 0).all() and (np.diff(offline)[2:] > 0).all() and np.isfinite(offline).all()
        online = likelihood_ratio(sure, *same)
        assert np.isfinite(online).all()

    def test_shadows_that_all_say_the_same_are_not_divided_by_zero(self):
        said = np.zeros((4, 2))
        found = likelihood_ratio(np.array([0.0, 2 * SPREAD]), said, np.zeros((4, 2), bool))
        np.testing.assert_allclose(found, -stats.norm.logsf([0, 2]), rtol=1e-10)

    @pytest.mark.parametrize(
        ("inside", "pooled", "said"),
        [
            ([[1, 1], [1, 0]], True, "1 of 2 items have fewer than 1 shadow models without them"),
            ([[0, 1], [0, 0]], True, "1 of 2 items have fewer than 1 shadow models with them.*leave these items out"),
            ([[0, 1], [1, 0]], False, "2 of 2 items have fewer than 2 shadow models without them"),
            ([[0, 0]], False, "fewer than 2 shadow models without"),
        ],
    )
    def test_an_item_without_shadows_to_compare_it_with_is_refused(self, inside, pooled, said):
        with pytest.raises(fastlur.ArgumentError, match=said):
            likelihood_ratio(np.zeros(2), np.zeros(np.shape(inside)), np.array(inside, bool), pooled=pooled)

    def test_shapes_that_do_not_fit_are_refused(self):
        for shapes in (((3,), (2, 4), (2, 4)), ((4,), (2, 4), (4, 2)), ((1, 4), (2, 4), (2, 4)), ((4,), (4,), (4,))):
            with pytest.raises(fastlur.ArgumentError, match=r"must be \(n,\), \(models, n\)"):
                likelihood_ratio(*(np.zeros(shape) for shape in shapes))


class TestWhatItIsWorth:
    scores, members = np.array([3.0, 1, 2, 2, 0, 5, 2]), np.array([True, False, True, False, False, True, True])

    def test_its_auc_is_that_of_members_over_strangers(self):
        found = LikelihoodRatio(self.scores, online=True, shadows=4)
        inside, outside = self.scores[self.members], self.scores[~self.members]
        assert found.auc(self.members) == pytest.approx(pairs(outside, inside).mean())
        assert found.auc_interval(self.members, 0.8) == auc_interval(outside, inside, 0.8)

    @pytest.mark.parametrize("allowed", [0.0, 0.01, 0.2, 0.34, 0.5, 0.99, 1.0])
    def test_true_positives_are_the_most_that_any_threshold_finds(self, allowed):
        random = np.random.default_rng(5)
        scores, members = random.normal(0, 1, 60).round(1), random.random(60) < 0.5
        best = 0.0
        for border in [-np.inf, *scores]:
            called = scores > border
            if called[~members].mean() <= allowed + 1e-12:
                best = max(best, called[members].mean())
        found = LikelihoodRatio(scores, online=True, shadows=4).true_positives(members, allowed)
        assert found == pytest.approx(best)

    @pytest.mark.parametrize("members", [[True] * 7, [False] * 7, [True, False]])
    def test_a_truth_that_compares_nothing_is_refused(self, members):
        found = LikelihoodRatio(self.scores, online=True, shadows=4)
        for ask in (found.auc, found.auc_interval, found.true_positives):
            with pytest.raises(fastlur.ArgumentError, match="members: must be"):
                ask(members)
