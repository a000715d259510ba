# Copyright (c) MONAI-JointDiff Contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import unittest

import numpy as np
import torch
from parameterized import parameterized
from scipy import interpolate, stats

from monai_jointdiff.inferers import (
    aggregate,
    count_votes,
    flip_probability,
    mean_errors,
    stratified_timesteps,
    variance_of_draws,
)

NAN = float("nan")


def of_two(differences: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Errors (Q, 2, n) of two classes whose difference is (Q, n), class 1 minus class 0."""
    d = torch.as_tensor(differences).double()
    return torch.stack([torch.zeros_like(d), d], dim=1)


class TestVotes(unittest.TestCase):
    def test_by_hand(self):
        errors = torch.tensor([[[1.0, 2.0, 3.0, NAN], [2.0, 1.0, 4.0, NAN], [3.0, NAN, NAN, NAN]]])
        self.assertEqual(count_votes(errors).tolist(), [[2.0, 1.0, 0.0]])
        self.assertEqual(mean_errors(errors)[0, :2].tolist(), [2.0, 7 / 3])
        self.assertEqual(mean_errors(torch.full((1, 2, 3), NAN)).tolist(), [[float("inf")] * 2])
        scores = aggregate(errors, "majority")[0]
        self.assertEqual((scores.round().tolist()), [2.0, 1.0, float("-inf")])
        self.assertEqual(aggregate(errors, "mean").tolist(), [[-2.0, -7 / 3, float("-inf")]])

    def test_votes_are_argmin_counts(self):
        errors = torch.rand(5, 4, 31, generator=torch.Generator().manual_seed(0))
        expected = [np.bincount(e.numpy().argmin(axis=0), minlength=4).tolist() for e in errors]
        self.assertEqual(count_votes(errors).tolist(), expected)

    def test_ties(self):
        """Equal errors share the vote; of equally many votes the smaller mean error wins."""
        errors = torch.tensor([[[1.0, 1.0, 9.0], [1.0, 2.0, 1.0], [1.0, 3.0, 2.0]]])
        self.assertEqual(count_votes(errors).tolist(), [[4 / 3, 4 / 3, 1 / 3]])
        self.assertEqual(int(aggregate(errors, "majority").argmax()), 1)
        same = torch.ones(2, 2, 5)
        self.assertEqual(count_votes(same).tolist(), [[2.5, 2.5]] * 2)
        self.assertGreater(float(flip_probability(same, 51, "majority")[:, 1].min()), 0.4)

    def test_infinite_error_is_no_missing_one(self):
        errors = torch.tensor([[[float("inf"), 1.0], [2.0, 2.0]]])
        self.assertEqual(mean_errors(errors).tolist(), [[float("inf"), 2.0]])

    def test_unknown_rule(self):
        with self.assertRaisesRegex(ValueError, "aggregate: rule must be one of.*got 'median'"):
            aggregate(torch.rand(1, 2, 3), "median")


class TestFlipProbability(unittest.TestCase):
    @parameterized.expand([(3, 1, 5), (4, 2, 11), (10, 9, 101), (25, 0, 26), (8, 3, 500)])
    def test_majority_is_beta_binomial(self, ahead, behind, total):
        """scipy's own distribution, summed over the outcomes in which the one behind draws level or overtakes."""
        votes = torch.tensor([0.0] * ahead + [1.0] * behind)
        errors = torch.stack([votes, 1 - votes])[None]  # class 0 has the smaller error in the first draws
        left = total - ahead - behind
        x = np.arange(left + 1)
        mass = stats.betabinom.pmf(x, left, behind + 1, ahead + 1)
        expected = mass[behind + x >= ahead + left - x].sum()
        flips = flip_probability(errors, total, "majority")
        self.assertEqual(float(flips[0, 0]), 1.0)
        self.assertAlmostEqual(float(flips[0, 1]), expected, places=10)

    def test_mean_is_students_t(self):
        """The predictive distribution of the mean of R further differences, written out with scipy."""
        generator = torch.Generator().manual_seed(1)
        difference = 0.2 + torch.randn(12, generator=generator).double()
        errors = torch.stack([torch.zeros(12).double(), difference])[None]
        n, left = 12, 39
        mean, std = float(difference.mean()), float(difference.std())
        leader = 0 if mean > 0 else 1
        further = stats.t(n - 1, loc=abs(mean), scale=std * np.sqrt(1 / n + 1 / left))
        expected = further.cdf(-n * abs(mean) / left)  # the sum of all falls below zero
        flips = flip_probability(errors, n + left, "mean")
        self.assertAlmostEqual(float(flips[0, 1 - leader]), expected, places=10)

    @parameterized.expand([("majority",), ("mean",)])
    def test_nothing_flips_after_the_last_draw(self, rule):
        errors = torch.rand(3, 3, 7, generator=torch.Generator().manual_seed(2))
        flips = flip_probability(errors, 7, rule)
        self.assertEqual(sorted(flips.flatten().tolist()), [0.0] * 6 + [1.0] * 3)
        self.assertEqual(flips.argmax(dim=1).tolist(), aggregate(errors, rule).argmax(dim=1).tolist())

    @parameterized.expand([("majority",), ("mean",)])
    def test_error_rate_in_simulated_races(self, rule):
        """Races that stop at the first look at which the probability is at most q flip in at most that share.

        4,000 races over the prior; q = .05, three standard errors are .01. Without any stopping there is nothing to
        check, so a good part of the races must have stopped.
        """
        rng = np.random.default_rng(3)
        races, total, allowed = 4000, 51, 0.05
        if rule == "majority":
            share = rng.uniform(size=(races, 1))
            differences = np.where(rng.uniform(size=(races, total)) < share, 1.0, -1.0)
        else:
            differences = rng.normal(0, 1, (races, 1)) + rng.normal(size=(races, total)) * rng.uniform(
                0.5, 2, (races, 1)
            )
        errors = torch.as_tensor(np.stack([np.zeros_like(differences), differences], axis=1))
        final = aggregate(errors, rule).argmax(dim=1)
        answer = torch.full((races,), -1)
        for n in range(5, total):
            flips = flip_probability(errors[:, :, :n], total, rule)
            stop = (answer < 0) & (flips.min(dim=1).values <= allowed)
            answer = torch.where(stop, flips.argmax(dim=1), answer)
        stopped = answer >= 0
        self.assertGreater(int(stopped.sum()), races // 2)
        flipped = (answer[stopped] != final[stopped]).double().mean()
        self.assertLessEqual(float(flipped), allowed + 0.01)
        self.assertGreater(float(flipped), 0.0005)  # a test that never errs would not have saved any draws

    def test_third_votes_may_change_the_parity(self):
        """With 10 to 5 and 6 left, one vote for the third class doubles the chance of the one behind to draw level."""
        votes = torch.tensor([0] * 10 + [1] * 5)
        two = 1.0 - torch.nn.functional.one_hot(votes, 2).T[None].float()
        three = torch.cat([two, torch.full((1, 1, 15), 2.0)], dim=1)
        even, odd = (float(flip_probability(two, 15 + left, "majority")[0, 1]) for left in (6, 5))
        self.assertGreater(odd, 1.5 * even)
        self.assertAlmostEqual(float(flip_probability(three, 21, "majority")[0, 1]), odd, places=10)

    def test_class_out_of_the_race(self):
        errors = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 0.5], [3.0, NAN, NAN]]])
        self.assertEqual(float(flip_probability(errors, 9, "majority")[0, 2]), 0.0)

    def test_equal_differences_cannot_be_judged(self):
        errors = torch.tensor([[[1.0], [2.0]]])
        self.assertEqual(flip_probability(errors, 9, "mean").tolist(), [[1.0, 0.5]])


def profiles(kind: str, races: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """How a difference changes over the noise levels (races, total), of mean 0 and standard deviation 1 or none."""
    t, sign = (np.arange(total) + 0.5) / total, rng.choice([-1.0, 1.0], (races, 1))
    if kind == "flat":
        return np.zeros((races, total))
    shape = {
        "line": sign * t,
        "steep": sign / (t + 0.1),  # as the errors of a denoiser: most of it at the smallest timesteps
        "wave": np.cos(2 * np.pi * (t + rng.uniform(size=(races, 1)))),
    }[kind]
    centered = shape - shape.mean(axis=1, keepdims=True)
    return centered / centered.std(axis=1, keepdims=True)


def races_of_means(profile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Differences (races, total) of errors, with normal means of the races around 0."""
    mean, std = rng.normal(size=(len(profile), 1)), rng.uniform(0.5, 2, (len(profile), 1))
    return mean + profile + std * rng.normal(size=profile.shape)


def races_of_votes(profile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Differences (races, total) of -1 and 1, with a uniform share of votes over the levels of a race."""
    share = rng.uniform(size=(len(profile), 1))
    low, high = np.full_like(share, -20.0), np.full_like(share, 20.0)
    for _ in range(40):  # bisection
        middle = (low + high) / 2
        few = stats.norm.cdf(middle + profile).mean(axis=1, keepdims=True) < share
        low, high = np.where(few, middle, low), np.where(few, high, middle)
    return np.where(rng.uniform(size=profile.shape) < stats.norm.cdf(low + profile), 1.0, -1.0)


def stopped_races(
    errors: torch.Tensor, rule: str, allowed: float, timesteps: torch.Tensor | None
) -> tuple[float, float]:
    """Share of all races whose answer differs from that of all draws, and how many draws they took."""
    races, total = len(errors), errors.shape[-1]
    answer, made = torch.full((races,), -1), torch.full((races,), float(total))
    for n in (5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 33, 41):
        running = (answer < 0).nonzero()[:, 0]
        flips = flip_probability(errors[running, :, :n], total, rule, timesteps)
        stop = flips.min(dim=1).values <= allowed
        answer[running[stop]], made[running[stop]] = flips.argmax(dim=1)[stop], float(n)
    final = aggregate(errors, rule).argmax(dim=1)
    return float(((answer >= 0) & (answer != final)).double().mean()), float(made.mean())


class TestVarianceOfDraws(unittest.TestCase):
    def test_by_hand(self):
        """In the order of the timesteps 1, 2, 3, 6, with steps 1, 1, 3; without the first 2, 3, 6."""
        differences = torch.tensor([[3.0, 1.0, 2.0, 6.0], [3.0, NAN, 2.0, 6.0], [NAN, NAN, NAN, 6.0]])
        variance, degrees = variance_of_draws(differences, torch.tensor([30, 10, 20, 40]))
        torch.testing.assert_close(variance, torch.tensor([11 / 6, 10 / 4, 0.0]).double())
        torch.testing.assert_close(degrees, torch.tensor([2 * 9 / 8, 2 * 4 / 5, 1.0]).double())
        variance, degrees = variance_of_draws(differences)
        torch.testing.assert_close(variance[:2], torch.tensor([14 / 3, 13 / 3]).double())
        self.assertEqual(degrees.tolist(), [3.0, 2.0, 1.0])

    @parameterized.expand([(2,), (5,), (20,)])
    def test_moments_of_normal_draws(self, n):
        """The mean is the variance, and the variance that of a chi-square of the degrees of freedom."""
        draws = 3 * torch.randn(200000, n, generator=torch.Generator().manual_seed(n)).double()
        variance, degrees = variance_of_draws(draws, torch.randperm(n))
        self.assertAlmostEqual(float(variance.mean()) / 9, 1.0, delta=0.02)
        self.assertAlmostEqual(float(variance.var()) / 81 * float(degrees[0]) / 2, 1.0, delta=0.05)

    def test_wrong_timesteps(self):
        with self.assertRaisesRegex(ValueError, r"variance_of_draws: timesteps must have shape \(4,\).*got \(3,\)"):
            variance_of_draws(torch.zeros(2, 4), torch.arange(3))

    def test_what_differs_between_levels_does_not_count(self):
        timesteps = stratified_timesteps(64, 0, 999)
        noise = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).double()
        draws = 0.02 * timesteps + noise
        self.assertAlmostEqual(float(variance_of_draws(draws, timesteps)[0].mean()), 1.0, delta=0.1)
        self.assertGreater(float(variance_of_draws(draws)[0].mean()), 30)


class TestFlipProbabilityOfStratifiedDraws(unittest.TestCase):
    def test_majority_counts_effective_votes(self):
        """8 votes, one against the leader in the middle and one at an end, by scipy's distribution."""
        timesteps = torch.tensor([0, 40, 20, 60, 10, 50, 30, 70, *range(100, 142)])
        votes = torch.tensor([-1.0, 1, 1, 1, 1, -1, 1, 1])  # at 0, 40, 20, 60, 10, 50, 30, 70
        between = 4 * 3 / 2  # three changes of 2: after 0, before and after 50
        about = 8 - 8 * 0.5**2
        effect = (between + 2) / (about + 2)
        self.assertEqual(effect, 1.0)
        expected = stats.betabinom.sf(22, 42, 3, 7)  # at least (42 + 6 - 2) / 2 of 42
        self.assertAlmostEqual(float(flip_probability(of_two(votes[None]), 50, "majority", timesteps)[0, 1]), expected)
        votes = torch.tensor([-1.0, 1, 1, 1, -1, 1, 1, 1])  # at 0 and 10: one change
        effect = (2 + 2) / (about + 2)
        a, b, left = 6 / effect, 2 / effect, round(42 / effect)
        x = np.arange(left + 1)
        mass = stats.betabinom.pmf(x, left, b + 1, a + 1)
        expected = mass[b + x >= a + left - x].sum()
        found = flip_probability(of_two(votes[None]), 50, "majority", timesteps)
        self.assertAlmostEqual(float(found[0, 1]), expected, places=10)
        self.assertLess(expected, 0.8 * stats.betabinom.sf(22, 42, 3, 7))

    def test_unanimous_votes_count_as_independent_ones(self):
        errors = of_two(torch.ones(1, 6))
        spread = flip_probability(errors, 51, "majority", stratified_timesteps(51, 0, 999))
        self.assertEqual(spread.tolist(), flip_probability(errors, 51, "majority").tolist())

    def test_stratified_votes_are_never_worth_less_than_independent_ones(self):
        errors = torch.rand(200, 2, 17, generator=torch.Generator().manual_seed(5))
        spread = flip_probability(errors, 51, "majority", stratified_timesteps(51, 0, 999))
        independent = flip_probability(errors, 51, "majority")
        self.assertTrue(bool((spread <= independent + 0.01).all()))  # a little more where votes to come are rounded
        self.assertGreater(float((independent - spread).max()), 0.05)

    def test_mean_of_evenly_spread_draws(self):
        """Draws in the middles of three thirds stand for two of the others each."""
        timesteps = torch.tensor([4, 1, 7, 0, 2, 3, 5, 6, 8])
        differences = np.array([2.0, 1.0, 4.0])  # in order 1, 2, 4
        std, degrees = np.sqrt((1 + 4) / 4), 2 * 4 / 5
        expected = stats.t.cdf(-differences.mean() / std * np.sqrt(3 * 9 / 6), degrees)
        found = flip_probability(of_two(differences[None]), 9, "mean", timesteps)
        self.assertAlmostEqual(float(found[0, 1]), expected, places=10)

    def test_mean_of_unevenly_spread_draws(self):
        """The weights by scipy's interpolation of each draw alone, level by level."""
        total, n = 40, 11
        timesteps = stratified_timesteps(total, 100, 799).numpy()
        d = 1 + torch.randn(n, generator=torch.Generator().manual_seed(3)).double().numpy()
        known, to_come = timesteps[:n], timesteps[n:]
        order = known.argsort()
        weights = np.zeros(n)
        for i in range(n):
            for t in to_come:
                alone = interpolate.interp1d(known[order], np.eye(n)[i][order])
                weights[i] += alone(np.clip(t, known.min(), known.max()))
        self.assertAlmostEqual(weights.sum(), total - n)
        variance = (np.diff(d[order]) ** 2).sum() / 2 / (n - 1)
        statistic = (d + weights * d).sum() / np.sqrt(variance * (total - n + (weights**2).sum()))
        expected = stats.t.cdf(-abs(statistic), 2 * (n - 1) ** 2 / (3 * n - 4))
        found = flip_probability(of_two(d[None]), total, "mean", torch.as_tensor(timesteps))
        self.assertAlmostEqual(float(found[0, 1]), expected, places=10)

    def test_a_trend_is_carried_on(self):
        """Differences 40 - t, four of them at small timesteps: their mean is positive, that of all 100 is not."""
        made = [0, 10, 20, 30, 99]
        timesteps = torch.tensor(made + [t for t in range(100) if t not in made])
        errors = of_two(40.0 - timesteps[None, :5])
        self.assertEqual(int(aggregate(errors, "mean").argmax()), 0)
        self.assertLess(float(flip_probability(errors, 100, "mean")[0, 1]), 0.5)
        self.assertGreater(float(flip_probability(errors, 100, "mean", timesteps)[0, 1]), 0.5)

    @parameterized.expand([("majority", 2), ("mean", 2), ("majority", 4), ("mean", 4)])
    def test_order_of_the_draws_does_not_matter(self, rule, classes):
        generator = torch.Generator().manual_seed(1)
        errors = torch.rand(20, classes, 12, generator=generator)
        timesteps = stratified_timesteps(40, 0, 999)
        order = torch.randperm(12, generator=generator)
        again = flip_probability(errors[:, :, order], 40, rule, torch.cat([timesteps[:12][order], timesteps[12:]]))
        torch.testing.assert_close(flip_probability(errors, 40, rule, timesteps), again)

    @parameterized.expand([("majority",), ("mean",)])
    def test_classes_that_were_dropped_and_races_that_ended(self, rule):
        errors = torch.rand(6, 3, 12, generator=torch.Generator().manual_seed(2))
        timesteps = stratified_timesteps(40, 0, 999)
        errors[:, 2, 5:] = NAN
        flips = flip_probability(errors, 40, rule, timesteps)
        self.assertEqual(flips[:, 2].tolist(), [0.0] * 6)
        if rule == "mean":
            torch.testing.assert_close(flips[:, :2], flip_probability(errors[:, :2], 40, rule, timesteps))
            ended = errors.clone()
            ended[0, :, 9:] = NAN
            self.assertEqual(sorted(flip_probability(ended, 40, rule, timesteps)[0].tolist()), [0.0, 0.5, 1.0])
            torch.testing.assert_close(flip_probability(ended, 40, rule, timesteps)[1:], flips[1:])

    @parameterized.expand([("majority",), ("mean",)])
    def test_more_draws_than_timesteps(self, rule):
        errors = torch.rand(5, 2, 20, generator=torch.Generator().manual_seed(4))
        flips = flip_probability(errors, 60, rule, stratified_timesteps(60, 0, 9))
        self.assertTrue(bool(((flips > 0) & (flips <= 1)).all()))

    def test_too_few_or_equal_differences_cannot_be_judged(self):
        timesteps = stratified_timesteps(9, 0, 999)
        self.assertEqual(flip_probability(of_two([[1.0]]), 9, "mean", timesteps).tolist(), [[1.0, 0.5]])
        self.assertEqual(flip_probability(of_two([[1.0] * 4]), 9, "mean", timesteps).tolist(), [[1.0, 0.5]])
        alone = flip_probability(of_two([[1.0]]), 9, "majority", timesteps)
        self.assertEqual(alone.tolist(), flip_probability(of_two([[1.0]]), 9, "majority").tolist())

    @parameterized.expand([(rule, kind) for rule in ("majority", "mean") for kind in ("flat", "line", "steep", "wave")])
    def test_error_rate_in_simulated_races(self, rule, kind):
        """2,000 races over the prior, half of them with a profile of twice the standard deviation of the others.

        The answer is that of all draws but for the error rate, with fewer draws than if they are taken for independent.
        """
        rng = np.random.default_rng(3)
        profile = np.repeat([[1.0], [2.0]], 1000, axis=0) * profiles(kind, 2000, 51, rng)
        levels = {"majority": races_of_votes, "mean": races_of_means}[rule](profile, rng)
        timesteps = stratified_timesteps(51, 0, 50)
        errors = of_two(levels[:, timesteps.numpy()])
        for allowed in (0.01, 0.05):
            flipped, made = stopped_races(errors, rule, allowed, timesteps)
            self.assertLessEqual(flipped, allowed)
            _, independent = stopped_races(errors, rule, allowed, None)
            if kind == "flat":
                self.assertLess(made, 1.1 * independent)  # nothing to gain
            else:
                self.assertLess(made, 0.95 * independent)

    @parameterized.expand([((8,), r"shape \(9,\), got \(8,\)"), ((3, 9), r"got \(3, 9\)")])
    def test_wrong_timesteps(self, shape, message):
        with self.assertRaisesRegex(ValueError, f"flip_probability: timesteps must be those of all draws.*{message}"):
            flip_probability(torch.rand(3, 2, 5), 9, "mean", torch.zeros(shape))


if __name__ == "__main__":
    unittest.main()
