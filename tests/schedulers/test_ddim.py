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

from monai_jointdiff.schedulers import DDIMGridScheduler
from tests.schedulers.gaussian import GaussianData, alpha_bars, run_chain, start_quantiles

DiffusersDDIM, has_diffusers = optional_import("diffusers", name="DDIMScheduler")

STEPS = [(n, spacing) for n in (5, 10, 20, 50, 100) for spacing in ("linspace", "logsnr")]
FINE = {"num_train_timesteps": 50_000, "beta_start": 2e-6, "beta_end": 4e-4}  # the same noise in finer timesteps


class TestDDIMGridScheduler(unittest.TestCase):
    @parameterized.expand(STEPS)
    def test_recursion_in_closed_form(self, n, spacing):
        """x' = (a'/a) x + (s' - s a'/a) epsilon: the step written in epsilon instead of x_0."""
        data = GaussianData()
        scheduler = DDIMGridScheduler(spacing=spacing)
        scheduler.set_timesteps(n)
        start = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        chain = run_chain(scheduler, data.network(scheduler), start)

        x, levels = start.numpy(), alpha_bars(scheduler)
        for before, after in zip(levels[:-1], levels[1:], strict=True):
            center, spread = data.marginal(before)
            epsilon = (1 - before) ** 0.5 * (x - center) / spread**2  # minus sigma times the score
            ratio = (after / before) ** 0.5
            x = ratio * x + ((1 - after) ** 0.5 - (1 - before) ** 0.5 * ratio) * epsilon
        np.testing.assert_allclose(chain.numpy(), x, rtol=0, atol=1e-10)

    @parameterized.expand([(n, eta) for n in (5, 20, 100) for eta in (0.3, 1.0)])
    def test_stochastic_recursion_in_closed_form(self, n, eta):
        """Equation 12 as it is printed."""
        data = GaussianData()
        scheduler = DDIMGridScheduler(eta=eta)
        scheduler.set_timesteps(n)
        start = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        chain = run_chain(scheduler, data.network(scheduler), start, torch.Generator().manual_seed(2))

        draws, x, levels = torch.Generator().manual_seed(2), start.numpy(), alpha_bars(scheduler)
        for before, after in zip(levels[:-1], levels[1:], strict=True):
            x_0 = data.denoise(x, before)
            epsilon = (x - before**0.5 * x_0) / (1 - before) ** 0.5
            std = eta * ((1 - after) / (1 - before)) ** 0.5 * (1 - before / after) ** 0.5
            x = after**0.5 * x_0 + (1 - after - std**2) ** 0.5 * epsilon
            if after < 1:
                x = x + std * torch.randn(start.shape, generator=draws, dtype=torch.float64).numpy()
        np.testing.assert_allclose(chain.numpy(), x, rtol=0, atol=1e-10)

    def test_converges_to_the_exact_flow_with_first_order(self):
        """The flow keeps each quantile, so it ends at mean and mean + std of x at the last grid point."""
        data, errors = GaussianData(), []
        for n in (25, 50, 100, 200):
            scheduler = DDIMGridScheduler(spacing="logsnr", **FINE)
            scheduler.set_timesteps(n)
            x, network = start_quantiles(scheduler, data), data.network(scheduler)
            for t in scheduler.timesteps[:-1]:
                x, _ = scheduler.step(network(x, t.repeat(2)), t, x)
            center, spread = data.marginal(alpha_bars(scheduler)[-2])
            self.assertAlmostEqual(float(x[0]), center, delta=1e-6)
            errors.append(abs(float(x[1] - x[0]) - spread))
        orders = np.log2(np.divide(errors[:-1], errors[1:]))
        np.testing.assert_allclose(orders, 1.0, atol=0.15)

    @parameterized.expand([(n,) for n in (5, 10, 20, 50)])
    def test_the_narrow_target_has_no_left_over_noise(self, n):
        """MONAI 1.6.1 ends with up to 8 times the standard deviation of a narrow Gaussian; true DDIM contracts."""
        data = GaussianData(std=0.02)
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(n)
        ends = run_chain(scheduler, data.network(scheduler), start_quantiles(scheduler, data))
        self.assertAlmostEqual(float(ends[0]), data.mean, delta=1e-9)
        self.assertTrue(0 < float(ends[1] - ends[0]) < data.std)

    @parameterized.expand(
        [(p, c, e) for p in ("epsilon", "sample", "v_prediction") for c in (False, True) for e in (0.0, 0.7)]
    )
    @unittest.skipUnless(has_diffusers, "diffusers is not installed")
    def test_equals_diffusers(self, prediction_type, clip, eta):
        """On the leading grid with T divisible by n, where diffusers' stride is the true one."""
        ours = DDIMGridScheduler(prediction_type=prediction_type, clip_sample=clip, eta=eta)
        theirs = DiffusersDDIM(prediction_type=prediction_type, clip_sample=clip, timestep_spacing="leading")
        theirs.alphas_cumprod = ours.alphas_cumprod
        theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
        theirs.set_timesteps(20)
        ours.set_grid(theirs.timesteps.tolist())
        x = y = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        for t in ours.timesteps:
            y = theirs.step(
                torch.tanh(y), int(t), y, eta=eta, use_clipped_model_output=True, generator=generators[1]
            ).prev_sample
            x, _ = ours.step(torch.tanh(x), t, x, generator=generators[0])
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

    @parameterized.expand([(n, d) for n in (1, 3, 10) for d in (2, 3)])
    def test_inverse_step_undoes_the_step_everywhere(self, n, spatial_dims):
        """Given the noise at the noisy end; MONAI 1.6.1's reversed_step raises IndexError at the last timestep."""
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(n)
        shape = (2, 1) + (4,) * spatial_dims
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        epsilon = torch.randn(shape, generator=generator, dtype=torch.float64)
        for t in scheduler.timesteps:
            moved, _ = scheduler.step(epsilon, t, x)
            torch.testing.assert_close(scheduler.inverse_step(epsilon, t, moved), x, rtol=0, atol=1e-11)

    @parameterized.expand([(0.0, 999), (1.0, 0)])
    def test_nothing_is_drawn_where_no_noise_is_added(self, eta, timestep):
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        x = torch.ones(1, 1, 2, 2)
        DDIMGridScheduler(eta=eta).step(x, timestep, x, generator)
        self.assertTrue(torch.equal(generator.get_state(), before))

    @parameterized.expand([(-0.1,), (1.5,)])
    def test_bad_eta(self, eta):
        with self.assertRaisesRegex(ValueError, r"DDIMGridScheduler: eta must lie in \[0, 1\], got"):
            DDIMGridScheduler(eta=eta)

    def test_bad_inverse_steps(self):
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(10)
        x = torch.zeros(1, 1, 4, 4)
        with self.assertRaisesRegex(ValueError, "timestep 5 is not in the grid"):
            scheduler.inverse_step(x, 5, x)
        with self.assertRaisesRegex(ValueError, "epsilon of shape"):
            scheduler.inverse_step(x[..., :2], 999, x)


if __name__ == "__main__":
    unittest.main()
