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
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import Interval, mean_of_repeats

stats, has_scipy = optional_import("scipy.stats")


class TestMeanOfRepeats(unittest.TestCase):
    @unittest.skipUnless(has_scipy, "scipy is not installed")
    def test_is_the_t_interval_of_scipy(self) -> None:
        values = [0.71, 0.78, 0.74, 0.9]
        for confidence in (0.95, 0.5):
            found = mean_of_repeats(values, confidence)
            low, high = stats.t.interval(confidence, 3, np.mean(values), stats.sem(values))
            np.testing.assert_allclose([found.value, found.low, found.high], [np.mean(values), low, high], rtol=1e-12)

    @unittest.skipUnless(has_scipy, "scipy is not installed")
    def test_factor_of_two_repeats(self) -> None:
        found = mean_of_repeats([-1.0, 1.0])  # the mean's deviation is 1; with one degree of freedom t is a tangent
        self.assertAlmostEqual(found.high or 0, float(np.tan(0.475 * np.pi)), places=6)

    def test_one_repeat_has_no_interval(self) -> None:
        self.assertEqual(mean_of_repeats([0.25]), Interval(0.25, reason="one repeat"))

    @parameterized.expand([([], 0.95, "at least one"), ([1.0, float("nan")], 0.95, "finite"), ([1.0], 1.0, "got 1.0")])
    def test_wrong_input(self, values: list[float], confidence: float, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"mean_of_repeats: .*{message}"):
            mean_of_repeats(values, confidence)


if __name__ == "__main__":
    unittest.main()
