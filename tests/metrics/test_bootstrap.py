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
from unittest import mock

import numpy as np

from monai_jointdiff.metrics import Interval, bootstrap_intervals
from monai_jointdiff.metrics import bootstrap as bootstrap_module
from monai_jointdiff.metrics.bootstrap import resample_weights


def weights(*args, **kwargs) -> np.ndarray:
    return np.concatenate(list(resample_weights(*args, **kwargs)))


class TestResampleWeights(unittest.TestCase):
    def test_rows_are_resamples_of_the_images(self):
        drawn = weights(50, 4000, seed=0)
        self.assertEqual(drawn.shape, (4000, 50))
        np.testing.assert_array_equal(drawn.sum(1), 50)
        np.testing.assert_allclose(drawn.mean(), 1)
        # a multinomial count has variance 1 - 1/N
        np.testing.assert_allclose(drawn.var(0).mean(), 1 - 1 / 50, rtol=0.02)

    def test_strata_keep_their_size(self):
        strata = np.repeat([3, 1, 7], [5, 20, 1])
        drawn = weights(26, 100, seed=1, strata=strata)
        for key, size in ((3, 5), (1, 20), (7, 1)):
            np.testing.assert_array_equal(drawn[:, strata == key].sum(1), size)

    def test_groups_are_drawn_whole(self):
        groups = np.array(["a", "b", "a", "c", "b", "a"])
        drawn = weights(6, 200, seed=2, groups=groups)
        for key in "abc":
            self.assertTrue((drawn[:, groups == key] == drawn[:, groups == key][:, :1]).all())
        np.testing.assert_array_equal(drawn[:, [0, 1, 3]].sum(1), 3)  # three groups drawn from three

    def test_blocks_cover_all_resamples(self):
        with mock.patch.object(bootstrap_module, "_BLOCK_ENTRIES", 70):
            blocks = list(resample_weights(10, 33, seed=0))
        self.assertEqual([len(block) for block in blocks], [7, 7, 7, 7, 5])
        np.testing.assert_array_equal(np.concatenate(blocks).sum(1), 10)

    def test_strata_and_groups_exclude_each_other(self):
        with self.assertRaisesRegex(ValueError, "not both"):
            weights(3, 1, seed=0, strata=np.zeros(3), groups=np.zeros(3))


class TestBootstrapIntervals(unittest.TestCase):
    def setUp(self):
        self.values = np.random.default_rng(0).normal(3, 2, size=400)

    def mean(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": drawn @ self.values / drawn.sum(1)}

    def test_interval_of_a_mean_is_the_normal_one(self):
        interval = bootstrap_intervals(self.mean, 400, resamples=4000)["mean"]
        half = 1.96 * self.values.std() / np.sqrt(400)
        self.assertAlmostEqual(interval.value, self.values.mean(), places=12)
        self.assertAlmostEqual(interval.low, self.values.mean() - half, delta=0.08 * half)
        self.assertAlmostEqual(interval.high, self.values.mean() + half, delta=0.08 * half)

    def test_function_of_the_seed(self):
        first, again = (bootstrap_intervals(self.mean, 400, 50, seed=3) for _ in range(2))
        self.assertEqual(first, again)
        self.assertNotEqual(first, bootstrap_intervals(self.mean, 400, 50, seed=4))

    def test_recentred_interval_holds_the_value_of_a_biased_statistic(self):
        signs = np.tile([-1.0, 1.0], 200)  # |mean| is 0 here and positive in every resample

        def absolute_mean(drawn: np.ndarray) -> dict[str, np.ndarray]:
            return {"plain": np.abs(drawn @ signs) / 400, "recentred": np.abs(drawn @ signs) / 400}

        intervals = bootstrap_intervals(absolute_mean, 400, 500, recentred=["recentred"])
        self.assertEqual(intervals["recentred"].low, 0)
        # E|X| of X ~ N(0, 1/400) is sqrt(2/pi)/20, the .975 quantile of |X| is 2.2414/20
        self.assertAlmostEqual(intervals["plain"].high, 2.2414 / 20, delta=0.012)
        self.assertAlmostEqual(intervals["recentred"].high, (2.2414 - np.sqrt(2 / np.pi)) / 20, delta=0.012)

    def test_what_is_not_defined_says_why(self):
        def statistics(drawn: np.ndarray) -> dict[str, np.ndarray]:
            often = np.where(drawn[:, 0] > 0, 1.0, np.nan)  # missing in a share of (1 - 1/N)^N
            seldom = np.where((drawn[:, 0] > 0) & (drawn[:, 1] > 0) & (drawn[:, 2] > 0), 1.0, np.nan)
            return {"never": np.full(len(drawn), np.nan), "often": often, "seldom": seldom}

        result = bootstrap_intervals(statistics, 20, 400, undefined={"never": "no image"})
        self.assertEqual(result["never"], Interval(None, None, None, "no image"))
        self.assertEqual((result["often"].low, result["often"].high, result["often"].reason), (1, 1, ""))
        self.assertIsNone(result["seldom"].low)
        self.assertRegex(result["seldom"].reason, r"defined in only \d+ of 400 resamples")

    def test_without_bootstrap(self):
        interval = bootstrap_intervals(self.mean, 400, resamples=0)["mean"]
        self.assertEqual((interval.low, interval.high, interval.reason), (None, None, "no bootstrap"))
        self.assertEqual(str(Interval(0.5, 0.4, 0.6)), "0.500 (0.400 to 0.600)")
        self.assertEqual(str(Interval(None, reason="why")), "- (why)")

    def test_wrong_options(self):
        for options in ({"resamples": -1}, {"confidence": 1.0}):
            with self.assertRaisesRegex(ValueError, "bootstrap_intervals"):
                bootstrap_intervals(self.mean, 400, **options)


if __name__ == "__main__":
    unittest.main()
