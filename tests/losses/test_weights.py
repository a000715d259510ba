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

import torch
from parameterized import parameterized

from monai_jointdiff.losses import min_snr_weight

SNR = torch.tensor([0.0, 1e-3, 0.5, 1.0, 4.999, 5.0, 20.0, 1e6], dtype=torch.float64)


class TestMinSnrWeight(unittest.TestCase):
    @parameterized.expand(["epsilon", "sample", "v_prediction"])
    def test_equals_weight_of_the_x0_error(self, prediction_type):
        # oracle: w error = min(SNR, 5) error_x0, with error_epsilon = SNR error_x0 and error_v = (SNR + 1) error_x0
        ratio = {"epsilon": SNR, "sample": torch.ones_like(SNR), "v_prediction": SNR + 1}[prediction_type]
        weight = min_snr_weight(SNR, prediction_type)
        torch.testing.assert_close(weight * ratio, torch.minimum(SNR, torch.tensor(5.0).double()), rtol=1e-12, atol=0)
        self.assertEqual(weight.dtype, torch.float64)

    @parameterized.expand([("epsilon", 1.0, 0.0), ("sample", 0.0, 5.0), ("v_prediction", 0.0, 0.0)])
    def test_limits(self, prediction_type, noise_only, clean):
        weight = min_snr_weight(torch.tensor([0.0, float("inf")]), prediction_type)
        self.assertEqual(weight.tolist(), [noise_only, clean])

    @parameterized.expand(["epsilon", "v_prediction"])
    def test_gamma(self, prediction_type):
        factor = 1.0 if prediction_type == "epsilon" else 4 / 5
        weight = min_snr_weight(torch.tensor([4.0]), prediction_type, gamma=1.0)
        self.assertAlmostEqual(float(weight), factor / 4)

    def test_wrong_input(self):
        one = torch.ones(1)
        with self.assertRaisesRegex(ValueError, "prediction_type must be .* got 'noise'"):
            min_snr_weight(one, "noise")
        with self.assertRaisesRegex(ValueError, "gamma must be > 0"):
            min_snr_weight(one, "epsilon", gamma=0.0)
        for wrong in (-1.0, float("nan")):
            with self.assertRaisesRegex(ValueError, "SNR must be >= 0"):
                min_snr_weight(wrong * one, "epsilon")


if __name__ == "__main__":
    unittest.main()
