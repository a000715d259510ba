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
from monai.networks.schedulers import NoiseSchedules
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.schedulers import DDIMGridScheduler, DPMSolverScheduler
from tests.schedulers.gaussian import GaussianData, alpha_bars, run_chain, start_quantiles
from tests.schedulers.test_ddim import FINE

DiffusersDPMSolver, has_diffusers = optional_import("diffusers", name="DPMSolverMultistepScheduler")

STEPS = [(n, spacing) for n in (5, 10, 20, 50, 100) for spacing in ("linspace", "logsnr")]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(scheduler: DPMSolverScheduler, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Part of a chain with a nonlinear network."""
    for t in grid:
        x, _ = scheduler.step(torch.tanh(x + 0.1), t, x)
    return x


def paper_chain(data: GaussianData, x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Algorithm 2 of the paper, with h, r and exponentials; first order where r < 1/2; the last step gives x_0_hat."""
    lambdas = 0.5 * np.log(levels[:-1] / (1 - levels[:-1]))
    previous, h_previous = None, None
    for i in range(len(levels) - 2):
        x_0 = data.denoise(x, levels[i])
        h = lambdas[i + 1] - lambdas[i]
        estimate = x_0
        if previous is not None:
            r = h_previous / h
            if r >= 0.5:
                estimate = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * previous
        sigma, sigma_next = (1 - levels[i]) ** 0.5, (1 - levels[i + 1]) ** 0.5
        x = sigma_next / sigma * x - levels[i + 1] ** 0.5 * np.expm1(-h) * estimate
        previous, h_previous = x_0, h
    return data.denoise(x, levels[-2])


class TestAccuracy(unittest.TestCase):
    @parameterized.expand(STEPS)
    def test_recursion_in_closed_form(self, n, spacing):
        data = GaussianData()
        for prediction_type in ("epsilon", "sample", "v_prediction"):
            scheduler = DPMSolverScheduler(spacing=spacing, prediction_type=prediction_type)
            scheduler.set_timesteps(n)
            start = randn(3, 1, 2, 2)
            chain = run_chain(scheduler, data.network(scheduler), start)
            expected = paper_chain(data, start.numpy(), alpha_bars(scheduler))
            np.testing.assert_allclose(chain.numpy(), expected, rtol=0, atol=1e-10)

    @parameterized.expand([(s, std) for s in NoiseSchedules.names for std in (0.101, 0.505)])
    def test_twenty_steps_are_within_two_percent_of_the_exact_flow(self, schedule, std):
        """From the first grid point to the clean sample, compared with the flow to the last grid point and its x_0."""
        data = GaussianData(std=std)
        scheduler = DPMSolverScheduler(schedule=schedule)
        scheduler.set_timesteps(20)
        ends = run_chain(scheduler, data.network(scheduler), start_quantiles(scheduler, data))
        self.assertAlmostEqual(float(ends[0]), data.mean, delta=0.02 * data.mean)
        spread = float(ends[1] - ends[0])
        exact = run_exactly(scheduler, data)
        self.assertAlmostEqual(spread, exact, delta=0.02 * exact)
        self.assertAlmostEqual(spread, std, delta=0.02 * std)

    def test_beats_ddim_and_the_uniform_grid(self):
        """At 10 steps; on a grid uniform in t the last step is of first order (.398), DDIM contracts (.366)."""
        data, spreads = GaussianData(), {}
        for name, scheduler in (
            ("ours", DPMSolverScheduler()),
            ("linspace", DPMSolverScheduler(spacing="linspace")),
            ("ddim", DDIMGridScheduler()),
        ):
            scheduler.set_timesteps(10)
            ends = run_chain(scheduler, data.network(scheduler), start_quantiles(scheduler, data))
            spreads[name] = float(ends[1] - ends[0])
        self.assertAlmostEqual(spreads["ours"], data.std, delta=0.04 * data.std)
        self.assertAlmostEqual(spreads["linspace"], 0.398, delta=0.001)
        self.assertAlmostEqual(spreads["ddim"], 0.366, delta=0.001)

    def test_converges_to_the_exact_flow_with_second_order(self):
        data, errors = GaussianData(), []
        for n in (25, 50, 100, 200):
            scheduler = DPMSolverScheduler(**FINE)
            scheduler.set_timesteps(n)
            x, network = start_quantiles(scheduler, data), data.network(scheduler)
            for t in scheduler.timesteps[:-1]:
                x, _ = scheduler.step(network(x, t.repeat(2)), t, x)
            center, spread = data.marginal(alpha_bars(scheduler)[-2])
            self.assertAlmostEqual(float(x[0]), center, delta=1e-6)
            errors.append(abs(float(x[1] - x[0]) - spread))
        orders = np.log2(np.divide(errors[:-1], errors[1:]))
        np.testing.assert_allclose(orders, 2.0, atol=0.25)

    @parameterized.expand(
        [
            (g, p)
            for g in (5, 20, 50, [900, 750, 600, 450, 320, 220, 150])
            for p in ("epsilon", "sample", "v_prediction")
        ]
    )
    @unittest.skipUnless(has_diffusers, "diffusers is not installed")
    def test_equals_diffusers(self, grid, prediction_type):
        ours = DPMSolverScheduler(prediction_type=prediction_type)
        ours.set_timesteps(grid) if isinstance(grid, int) else ours.set_grid(grid)
        theirs = DiffusersDPMSolver(
            trained_betas=ours.betas.numpy(),
            prediction_type=prediction_type,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            final_sigmas_type="zero",
            euler_at_final=True,
        )
        theirs.set_timesteps(timesteps=ours.timesteps.tolist())
        x = y = randn(2, 1, 4, 4)
        network = GaussianData().network(ours)
        for t in ours.timesteps:
            y = theirs.step(network(y, t.repeat(2)), t, y).prev_sample
            x, _ = ours.step(network(x, t.repeat(2)), t, x)
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)  # their table is in fp32


def run_exactly(scheduler: DPMSolverScheduler, data: GaussianData) -> float:
    """Spread at the end of the exact flow to the last grid point, then the posterior mean there."""
    last = alpha_bars(scheduler)[-2]
    center, spread = data.marginal(last)
    return data.denoise(center + spread, last) - data.denoise(center, last)


class TestHistory(unittest.TestCase):
    def setUp(self):
        self.scheduler = DPMSolverScheduler()
        self.scheduler.set_timesteps(12)
        self.grid = self.scheduler.timesteps

    def fresh(self) -> DPMSolverScheduler:
        scheduler = DPMSolverScheduler()
        scheduler.set_timesteps(12)
        return scheduler

    def test_history_is_used_at_all(self):
        """Otherwise the tests below would say nothing: 2M differs from its first-order self, DDIM on this grid."""
        ddim = DDIMGridScheduler(spacing="logsnr")
        ddim.set_timesteps(12)
        first_order = walk(ddim, randn(2, 1, 4, 4), self.grid)
        self.assertGreater(float((walk(self.scheduler, randn(2, 1, 4, 4), self.grid) - first_order).abs().max()), 1e-3)

    @parameterized.expand([(stop, start) for stop in (1, 3, 6, 12) for start in (0, 3, 6, 11)])
    def test_a_chain_does_not_depend_on_the_one_before(self, stop, start):
        """Whole or abandoned, ending at this one's first timestep or not, without any call in between."""
        walk(self.scheduler, randn(2, 1, 4, 4, seed=5), self.grid[:stop])
        again = walk(self.scheduler, randn(2, 1, 4, 4), self.grid[start:])
        self.assertTrue(torch.equal(again, walk(self.fresh(), randn(2, 1, 4, 4), self.grid[start:])))

    def test_other_batch_size_or_type(self):
        walk(self.scheduler, randn(2, 1, 4, 4), self.grid[:4])
        for x in (randn(3, 1, 4, 4), randn(2, 1, 4, 4).float(), randn(2, 1, 4, 4, 4)):
            self.assertTrue(torch.equal(walk(self.scheduler, x, self.grid[4:]), walk(self.fresh(), x, self.grid[4:])))

    def test_a_copy_of_the_sample_continues_the_chain(self):
        whole = walk(self.fresh(), randn(2, 1, 4, 4), self.grid)
        half = walk(self.scheduler, randn(2, 1, 4, 4), self.grid[:6])
        self.assertTrue(torch.equal(walk(self.scheduler, half.clone(), self.grid[6:]), whole))

    def test_a_changed_sample_begins_a_chain(self):
        half = walk(self.scheduler, randn(2, 1, 4, 4), self.grid[:6]) + 0.1
        self.assertTrue(torch.equal(walk(self.scheduler, half, self.grid[6:]), walk(self.fresh(), half, self.grid[6:])))

    def test_a_repeated_timestep_begins_a_chain(self):
        """Going back in time, as resampling schemes do."""
        walk(self.scheduler, randn(2, 1, 4, 4), self.grid[:6])
        x = randn(2, 1, 4, 4, seed=9)
        self.assertTrue(torch.equal(walk(self.scheduler, x, self.grid[3:]), walk(self.fresh(), x, self.grid[3:])))

    def test_a_skipped_timestep_begins_a_chain(self):
        """The sample is the one the last step gave, but it is put at another time."""
        half = walk(self.scheduler, randn(2, 1, 4, 4), self.grid[:6])
        self.assertTrue(torch.equal(walk(self.scheduler, half, self.grid[7:]), walk(self.fresh(), half, self.grid[7:])))

    def test_a_new_grid_begins_a_chain(self):
        half = walk(self.scheduler, randn(2, 1, 4, 4), self.grid[:6])
        self.scheduler.set_grid(self.grid[6:].tolist())
        self.assertTrue(torch.equal(walk(self.scheduler, half, self.grid[6:]), walk(self.fresh(), half, self.grid[6:])))

    def test_a_finished_chain_keeps_no_tensor(self):
        walk(self.scheduler, randn(2, 1, 4, 4), self.grid)
        self.assertIsNone(self.scheduler._arrival)

    def test_the_last_step_gives_the_prediction_itself(self):
        half = walk(self.scheduler, randn(2, 1, 4, 4), self.grid[:-1])
        end, estimate = self.scheduler.step(torch.tanh(half), self.grid[-1], half)
        torch.testing.assert_close(end, estimate, rtol=0, atol=0)

    def test_gradients_flow_through_the_chain(self):
        """d(end)/d(start) of an affine chain is its slope, here from two points."""
        data, scheduler = GaussianData(), self.scheduler
        start = start_quantiles(scheduler, data).requires_grad_()
        ends = run_chain(scheduler, data.network(scheduler), start)
        (gradient,) = torch.autograd.grad(ends.sum(), start)
        slope = (ends[1] - ends[0]) / (start[1] - start[0])
        torch.testing.assert_close(gradient, slope.expand_as(gradient).detach(), rtol=1e-10, atol=0)


if __name__ == "__main__":
    unittest.main()
