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
from dataclasses import FrozenInstanceError

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.schedulers import AncestralScheduler, DDIMGridScheduler, DDIMInverter
from tests.schedulers.gaussian import GaussianData, run_chain

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class CountingNetwork:
    """A smooth nonlinear noise prediction that mixes neighboring pixels and depends on time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert timesteps.shape == (len(x),) and timesteps.dtype == torch.int64
        return torch.tanh(0.8 * x + 0.3 * x.roll(1, dims=-1)) * (0.5 + timesteps[0] / 2000)


class TestDDIMInverter(unittest.TestCase):
    @parameterized.expand([(p, n, d) for p in PREDICTION_TYPES for n in (5, 20, 50) for d in (2, 3)])
    def test_round_trip_on_gaussian_data(self, prediction_type, n, spatial_dims):
        """DDIM is affine here, so the latents are known: the inverse of the composed affine map."""
        data = GaussianData(std=0.101)
        scheduler = DDIMGridScheduler(prediction_type=prediction_type)
        scheduler.set_timesteps(n)
        network = data.network(scheduler)
        image = data.mean + 0.1 * randn(2, 1, *(4,) * spatial_dims)
        result = DDIMInverter(scheduler, tolerance=1e-13, max_iterations=3000)(image, network)
        self.assertTrue(result.converged)
        self.assertEqual(result.timestep, 999)
        torch.testing.assert_close(run_chain(scheduler, network, result.latents), image, rtol=0, atol=1e-9)

        zero_and_one = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        offset, slope = run_chain(scheduler, network, zero_and_one).flatten().tolist()
        expected = (image - offset) / (slope - offset)
        torch.testing.assert_close(result.latents, expected, rtol=1e-6, atol=1e-6)

    @parameterized.expand([(1e-3,), (1e-6,), (1e-10,)])
    def test_round_trip_of_a_nonlinear_network_follows_the_tolerance(self, tolerance):
        scheduler, network = DDIMGridScheduler(), CountingNetwork()
        scheduler.set_timesteps(20)
        image = randn(2, 1, 8, 8)
        result = DDIMInverter(scheduler, tolerance=tolerance, max_iterations=500)(image, network)
        self.assertTrue(result.converged)
        self.assertLessEqual(float(result.residual.max()), tolerance)
        back = run_chain(scheduler, network, result.latents)
        self.assertLess(float((back - image).norm() / image.norm()), 100 * tolerance)

    def test_naive_inversion_is_one_iteration_and_worse(self):
        scheduler, network = DDIMGridScheduler(), CountingNetwork()
        scheduler.set_timesteps(20)
        image = randn(2, 1, 8, 8)
        errors = []
        for iterations in (1, 2, 5, 10):
            result = DDIMInverter(scheduler, tolerance=1e-15, max_iterations=iterations)(image, network)
            self.assertFalse(result.converged)
            self.assertEqual(int(result.iterations.max()), iterations)
            errors.append(float((run_chain(scheduler, network, result.latents) - image).norm() / image.norm()))
        self.assertTrue(all(np.diff(errors) < 0), errors)
        self.assertGreater(errors[0], 20 * errors[-1])

        x = image  # the naive inversion, written out
        table = np.append(scheduler.alphas_cumprod.numpy(), 1.0)
        grid = [-1, *scheduler.timesteps.flip(0).tolist()]
        for clean, noisy in zip(grid[:-1], grid[1:], strict=True):
            ratio = (table[noisy] / table[clean]) ** 0.5
            weight = (1 - table[noisy]) ** 0.5 - (1 - table[clean]) ** 0.5 * ratio
            x = ratio * x + weight * network(x, torch.tensor([noisy, noisy]))
        naive = DDIMInverter(scheduler, max_iterations=1)(image, network)
        torch.testing.assert_close(naive.latents, x, rtol=0, atol=1e-12)

    def test_calls_are_counted_and_stop_at_the_tolerance(self):
        scheduler, network = DDIMGridScheduler(), CountingNetwork()
        scheduler.set_timesteps(10)
        result = DDIMInverter(scheduler, tolerance=1e-2, max_iterations=50)(randn(2, 1, 4, 4), network)
        self.assertEqual(result.network_calls, network.calls)
        self.assertEqual(int(result.iterations.amax(0).sum()), network.calls)
        self.assertEqual(result.iterations.shape, (2, 10))
        self.assertLess(int(result.iterations.max()), 50)
        tighter = DDIMInverter(scheduler, tolerance=1e-6, max_iterations=50)(randn(2, 1, 4, 4), CountingNetwork())
        self.assertGreater(tighter.network_calls, result.network_calls)

    @parameterized.expand([(2,), (3,)])
    def test_samples_do_not_feel_each_other(self, spatial_dims):
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(10)
        size = torch.tensor([0.01, 1.0, 30.0]).reshape(3, *[1] * (spatial_dims + 1))  # tanh: linear, bent, constant
        images = size * randn(3, 1, *[4] * spatial_dims)
        inverter = DDIMInverter(scheduler, tolerance=1e-3, max_iterations=50)
        together = inverter(images, CountingNetwork())
        calls = []
        for n in range(3):
            network = CountingNetwork()
            alone = inverter(images[n : n + 1], network)
            calls.append(network.calls)
            self.assertTrue(torch.equal(alone.latents[0], together.latents[n]))
            self.assertEqual(alone.iterations[0].tolist(), together.iterations[n].tolist())
            self.assertEqual(float(alone.residual), float(together.residual[n]))
        self.assertEqual(len(set(calls)), 3)
        self.assertEqual(together.iterations.sum(1).tolist(), calls)
        self.assertGreaterEqual(together.network_calls, max(calls))

    def test_a_breakdown_of_one_sample_leaves_the_others(self):
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(3)
        broken = torch.tensor([float("nan"), 1.0]).reshape(2, 1, 1, 1)
        result = DDIMInverter(scheduler, max_iterations=200)(randn(2, 1, 4, 4), lambda x, t: 0.1 * x * broken)
        self.assertEqual(result.residual.isnan().tolist(), [True, False])
        self.assertLessEqual(float(result.residual[1]), 1e-4)
        self.assertFalse(result.converged)

    def test_to_an_intermediate_time(self):
        scheduler, network = DDIMGridScheduler(), CountingNetwork()
        scheduler.set_grid([900, 600, 300, 150, 50, 0])
        image = randn(2, 1, 4, 4)
        result = DDIMInverter(scheduler, tolerance=1e-12, max_iterations=500)(image, network, timestep=300)
        self.assertEqual((result.timestep, result.iterations.shape), (300, (2, 4)))
        x = result.latents
        for t in (300, 150, 50, 0):
            x, _ = scheduler.step(network(x, torch.tensor([t, t])), t, x)
        torch.testing.assert_close(x, image, rtol=0, atol=1e-9)

    def test_no_graph_and_the_input_untouched(self):
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(3)
        image = randn(1, 1, 4, 4).requires_grad_()
        before = image.detach().clone()
        result = DDIMInverter(scheduler)(image, CountingNetwork())
        self.assertFalse(result.latents.requires_grad)
        self.assertTrue(torch.equal(image.detach(), before))

    def test_a_breakdown_is_not_called_converged(self):
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(3)
        for late in (0, 499):  # at the first point only, and later
            inverter = DDIMInverter(scheduler, max_iterations=4)
            result = inverter(
                randn(1, 1, 4, 4), lambda x, t, late=late: x * (float("nan") if int(t[0]) >= late else 0.1)
            )
            self.assertFalse(result.converged)
            self.assertTrue(bool(result.residual.isnan().all()))

    def test_the_result_is_frozen(self):
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(2)
        result = DDIMInverter(scheduler)(randn(1, 1, 4, 4), CountingNetwork())
        with self.assertRaises(FrozenInstanceError):
            result.residual = torch.zeros(1)

    def test_bad_arguments(self):
        with self.assertRaisesRegex(TypeError, "must be a DDIMGridScheduler, got AncestralScheduler"):
            DDIMInverter(AncestralScheduler())
        for options in ({"eta": 0.5}, {"clip_sample": True}):
            with self.assertRaisesRegex(ValueError, "only a deterministic step without clipping has an inverse"):
                DDIMInverter(DDIMGridScheduler(**options))
        with self.assertRaisesRegex(ValueError, "tolerance must be positive, got 0"):
            DDIMInverter(DDIMGridScheduler(), tolerance=0)
        with self.assertRaisesRegex(ValueError, "max_iterations must be at least 1, got 0"):
            DDIMInverter(DDIMGridScheduler(), max_iterations=0)
        scheduler = DDIMGridScheduler()
        scheduler.set_timesteps(10)
        with self.assertRaisesRegex(ValueError, "timestep 300 is not in the grid"):
            DDIMInverter(scheduler)(randn(1, 1, 4, 4), CountingNetwork(), timestep=300)


if __name__ == "__main__":
    unittest.main()
