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

from monai_jointdiff.losses import favero_weight, min_snr_weight
from monai_jointdiff.schedulers import make_scheduler

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


class TestFaveroWeight(unittest.TestCase):
    def test_equals_the_published_weight_of_the_error_of_the_noise(self):
        # oracle: both errors of one prediction of v, turned into one of the noise by the scheduler
        process = make_scheduler("ddim", schedule="shifted_logsnr", prediction_type="v_prediction")
        timesteps = torch.tensor([0, 40, 100, 250, 500, 999])
        generator = torch.Generator().manual_seed(0)
        image, noise, mistake = (torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
        velocity = process.get_velocity(image, noise, timesteps)
        noisy = process.add_noise(image, noise, timesteps)
        error_epsilon = (process.predict_epsilon(velocity + mistake, timesteps, noisy) - noise).square()
        snr = process.snr(timesteps)
        published = 1 / (1 + snr.clamp(max=5))
        mine = favero_weight(snr, "v_prediction")
        shape = (-1, 1, 1, 1)
        torch.testing.assert_close(
            mine.reshape(shape) * mistake.square(), published.reshape(shape) * error_epsilon, rtol=1e-9, atol=1e-12
        )

    def test_epsilon(self):
        weight = favero_weight(SNR[1:], "epsilon")
        self.assertEqual(weight.tolist(), [1 / min(value, 5.0) for value in SNR[1:].tolist()])
        self.assertEqual(float(favero_weight(torch.tensor([4.0]), "epsilon", gamma=2.0)), 0.5)

    def test_limits_and_maximum(self):
        weight = favero_weight(torch.tensor([0.0, 1.0, float("inf")], dtype=torch.float64), "v_prediction", gamma=3.0)
        self.assertEqual(weight.tolist(), [0.0, 0.25, 0.25])
        self.assertEqual(int(favero_weight(SNR, "v_prediction").argmax()), SNR.tolist().index(1.0))

    def test_wrong_input(self):
        one = torch.ones(1)
        for wrong in ("sample", "noise"):
            with self.assertRaisesRegex(ValueError, f"'epsilon' or 'v_prediction', got '{wrong}'"):
                favero_weight(one, wrong)
        with self.assertRaisesRegex(ValueError, "no bound at pure noise"):
            favero_weight(0 * one, "epsilon")
        with self.assertRaisesRegex(ValueError, "favero_weight: gamma must be > 0"):
            favero_weight(one, "epsilon", gamma=-1.0)
        with self.assertRaisesRegex(ValueError, "favero_weight: the SNR must be >= 0"):
            favero_weight(-one, "v_prediction")


if __name__ == "__main__":
    unittest.main()
