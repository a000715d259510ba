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
from scipy import stats

from monai_jointdiff.inferers import aggregate, count_votes, flip_probability, mean_errors

NAN = float("nan")


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


if __name__ == "__main__":
    unittest.main()
