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

import math
import unittest

import numpy as np
import torch
from monai.networks.schedulers import NoiseSchedules
from parameterized import parameterized

from monai_jointdiff.schedulers import GridScheduler, logsnr_timesteps, shifted_logsnr

# t, log-SNR and alpha^2 of Favero et al.'s schedule for 256 px, computed from their code
ANCHORS = [
    (0.0, 10.84, None),
    (0.05, 2.29, 0.908),
    (0.1, 0.90, 0.711),
    (0.25, -1.01, 0.266),
    (0.5, -2.77, 0.059),
    (0.75, -4.54, 0.011),
    (0.9, -6.46, None),
    (1.0, -19.16, None),
]


class TestShiftedLogSNR(unittest.TestCase):
    @parameterized.expand(ANCHORS)
    def test_anchors_of_the_authors_schedule(self, t, log_snr, alpha_squared):
        _, _, alphas_cumprod = shifted_logsnr(1001)
        value = alphas_cumprod[round(1000 * t)]
        self.assertAlmostEqual(float(torch.logit(value)), log_snr, delta=0.0051)
        if alpha_squared is not None:
            self.assertAlmostEqual(float(value), alpha_squared, delta=0.00051)

    def test_without_shift_it_is_the_cosine_schedule(self):
        """alpha = cos(angle), angle linear in t between the two bounds."""
        _, _, alphas_cumprod = shifted_logsnr(11, noise_d=64, image_d=64)
        bounds = [math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))]
        np.testing.assert_allclose(alphas_cumprod.numpy(), np.cos(np.linspace(*bounds, 11)) ** 2, rtol=1e-9)

    def test_the_tables_agree(self):
        betas, alphas, alphas_cumprod = shifted_logsnr(1000, image_d=128)
        self.assertEqual({table.dtype for table in (betas, alphas, alphas_cumprod)}, {torch.float64})
        torch.testing.assert_close(torch.cumprod(1 - betas, 0), alphas_cumprod, rtol=1e-10, atol=0)
        torch.testing.assert_close(alphas, 1 - betas, rtol=0, atol=1e-15)

    def test_registered_with_arguments(self):
        self.assertIn("shifted_logsnr", NoiseSchedules.names)
        scheduler = GridScheduler(100, "shifted_logsnr", noise_d=32, image_d=128)
        expected = shifted_logsnr(100, 32, 128)[2]
        torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=1e-11, atol=0)

    def test_larger_images_get_more_noise(self):
        tables = [shifted_logsnr(100, image_d=size)[2] for size in (32, 64, 256, 512)]
        for small, large in zip(tables[:-1], tables[1:], strict=True):
            self.assertTrue(bool((large < small).all()))

    def test_bad_arguments(self):
        with self.assertRaisesRegex(ValueError, "num_train_timesteps must be at least 2, got 1"):
            shifted_logsnr(1)
        with self.assertRaisesRegex(ValueError, "must be positive, got 64.0 and 0"):
            shifted_logsnr(10, image_d=0)


class TestLogSNRGrid(unittest.TestCase):
    @parameterized.expand([(name,) for name in NoiseSchedules.names])
    def test_distinct_descending_and_down_to_zero(self, schedule):
        table = GridScheduler(schedule=schedule).alphas_cumprod
        for n in (2, 3, 5, 10, 20, 50, 100, 313, 999, 1000):
            grid = logsnr_timesteps(table, n)
            self.assertEqual(len(grid), n)
            self.assertTrue(bool((grid.diff() < 0).all()))
            self.assertTrue(0 <= int(grid.min()) and int(grid.max()) < 1000)
            self.assertEqual(int(grid[-1]), 0)

    @parameterized.expand([(name,) for name in NoiseSchedules.names])
    def test_uniform_where_the_table_is_fine_enough(self, schedule):
        """No point is further from its place than the table's own spacing there."""
        table = GridScheduler(schedule=schedule).alphas_cumprod
        log_snr = torch.logit(table)
        grid = logsnr_timesteps(table, 10)
        wanted = torch.linspace(max(float(log_snr[-1]), -10.2), float(log_snr[0]), 10, dtype=torch.float64)
        for t, place in zip(grid.tolist()[1:-1], wanted.tolist()[1:-1], strict=True):
            width = float(log_snr[t - 1] - log_snr[t + 1])
            self.assertLessEqual(abs(float(log_snr[t]) - place), 0.5 * width + 1e-12)

    @parameterized.expand([("linear_beta", 999, 999), ("cosine", 900, 998), ("shifted_logsnr", 900, 998)])
    def test_the_noisy_end(self, schedule, lowest, highest):
        scheduler = GridScheduler(schedule=schedule, spacing="logsnr")
        for n in (1, 20):
            scheduler.set_timesteps(n)
            first = int(scheduler.timesteps[0])
            self.assertTrue(lowest <= first <= highest)
            self.assertAlmostEqual(2 * scheduler.level(first).half_log_snr, -10.2, delta=0.3)

    def test_crowded_ends_are_pushed_apart(self):
        """Three points wanted at timestep 0 and three at the last: each moves by as little as it can."""
        table = torch.sigmoid(torch.tensor([9.0, 1.0, 0.9, 0.8, -0.8, -0.9, -1.0, -9.0], dtype=torch.float64))
        self.assertEqual(logsnr_timesteps(table, 8).tolist(), [7, 6, 5, 4, 3, 2, 1, 0])
        self.assertEqual(logsnr_timesteps(table, 3).tolist()[::2], [7, 0])


if __name__ == "__main__":
    unittest.main()
