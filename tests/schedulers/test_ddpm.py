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
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.schedulers import AncestralScheduler, DDIMGridScheduler
from tests.schedulers.gaussian import GaussianData, alpha_bars, run_chain

DiffusersDDPM, has_diffusers = optional_import("diffusers", name="DDPMScheduler")

STEPS = [(n, spacing) for n in (5, 10, 20, 50, 100) for spacing in ("linspace", "logsnr")]


def posterior(before: float, after: float, x, x_0) -> tuple[np.ndarray, float]:
    """q(x_s | x_t, x_0) by Bayes in precisions: prior N(sqrt(after) x_0, 1 - after) times p(x_t | x_s)."""
    ratio = (before / after) ** 0.5
    precision = 1 / (1 - after) + ratio**2 / (1 - ratio**2)
    mean = (after**0.5 * x_0 / (1 - after) + ratio * x / (1 - ratio**2)) / precision
    return mean, precision**-0.5


class TestAncestralScheduler(unittest.TestCase):
    @parameterized.expand(STEPS)
    def test_recursion_in_closed_form(self, n, spacing):
        data = GaussianData()
        for prediction_type in ("epsilon", "v_prediction"):
            scheduler = AncestralScheduler(spacing=spacing, prediction_type=prediction_type)
            scheduler.set_timesteps(n)
            start = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            chain = run_chain(scheduler, data.network(scheduler), start, torch.Generator().manual_seed(2))

            draws, x, levels = torch.Generator().manual_seed(2), start.numpy(), alpha_bars(scheduler)
            for before, after in zip(levels[:-2], levels[1:-1], strict=True):
                mean, std = posterior(before, after, x, data.denoise(x, before))
                x = mean + std * torch.randn(start.shape, generator=draws, dtype=torch.float64).numpy()
            np.testing.assert_allclose(chain.numpy(), data.denoise(x, levels[-2]), rtol=0, atol=1e-10)

    @parameterized.expand([(10, 0.18), (20, 0.12), (50, 0.06), (250, 0.015)])
    def test_strided_chain_has_the_spread_of_its_recursion(self, n, bias):
        """MONAI 1.6.1 steps to t - 1 on every grid and ends at a standard deviation near 1 instead."""
        data, count = GaussianData(mean=0.0, std=0.5), 20_000
        scheduler = AncestralScheduler()
        scheduler.set_timesteps(n)
        start = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        chain = run_chain(scheduler, data.network(scheduler), start, torch.Generator().manual_seed(2))

        levels, variance = alpha_bars(scheduler), 1.0
        for before, after in zip(levels[:-2], levels[1:-1], strict=True):
            gain, std = posterior(before, after, 1.0, data.denoise(1.0, before))
            variance = gain**2 * variance + std**2
        expected = data.denoise(1.0, levels[-2]) * variance**0.5
        self.assertAlmostEqual(float(chain.std()), expected, delta=4 * expected / (2 * count) ** 0.5)
        self.assertAlmostEqual(expected, 0.5, delta=bias)  # and that recursion converges to the data

    def test_clipped_step(self):
        scheduler = AncestralScheduler(clip_sample=True)
        scheduler.set_grid([800, 300])
        x = torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
        moved, estimate = scheduler.step(torch.zeros_like(x), 800, x, torch.Generator().manual_seed(0))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mean, std = posterior(*alpha_bars(scheduler)[:2], 2.0, 1.0)
        torch.testing.assert_close(moved, mean + std * noise, rtol=0, atol=1e-12)
        self.assertTrue(torch.equal(estimate, torch.ones_like(x)))

    @parameterized.expand([(1, 4), (2, 4, 4), (3, 2, 4, 4, 4)])
    def test_equals_ddim_with_eta_one(self, *shape):
        ancestral, ddim = AncestralScheduler(), DDIMGridScheduler(eta=1.0)
        chains = []
        for scheduler in (ancestral, ddim):
            scheduler.set_timesteps(13)
            start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            network = GaussianData().network(scheduler)
            chains.append(run_chain(scheduler, network, start, torch.Generator().manual_seed(1)))
        torch.testing.assert_close(chains[0], chains[1], rtol=0, atol=1e-11)

    def test_the_step_to_the_clean_sample_draws_nothing(self):
        scheduler, generator = AncestralScheduler(), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(5)
        before = generator.get_state()
        x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
        moved, estimate = scheduler.step(0.3 * x, 0, x, generator)
        torch.testing.assert_close(moved, estimate, rtol=0, atol=1e-11)
        self.assertTrue(torch.equal(generator.get_state(), before))

    @parameterized.expand([(p, c) for p in ("epsilon", "sample", "v_prediction") for c in (False, True)])
    @unittest.skipUnless(has_diffusers, "diffusers is not installed")
    def test_equals_diffusers(self, prediction_type, clip):
        ours = AncestralScheduler(prediction_type=prediction_type, clip_sample=clip)
        theirs = DiffusersDDPM(prediction_type=prediction_type, clip_sample=clip)
        theirs.alphas_cumprod = ours.alphas_cumprod
        grid = [990, 700, 333, 120, 7, 0]
        ours.set_grid(grid)
        theirs.set_timesteps(timesteps=grid)
        x = y = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        for t in ours.timesteps:
            output = torch.tanh(x)
            y = theirs.step(torch.tanh(y), t, y, generator=generators[1]).prev_sample
            x, _ = ours.step(output, t, x, generator=generators[0])
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


if __name__ == "__main__":
    unittest.main()
