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

import copy
import pickle
import unittest

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler, NoiseSchedules
from parameterized import parameterized
from torch import nn

from monai_jointdiff.schedulers import (
    AncestralScheduler,
    DDIMGridScheduler,
    DPMSolverScheduler,
    GridScheduler,
    make_scheduler,
)
from tests.schedulers.gaussian import GaussianData, run_chain

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
SAMPLERS = ["ddpm", "ddim", "dpm_solver"]
SHAPES = [(4, 1, 6, 6), (4, 2, 4, 6, 4)]  # 2D and 3D
ROUND_TRIPS = [(p, s) for p in PREDICTION_TYPES for s in SHAPES]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestTables(unittest.TestCase):
    @parameterized.expand([(name,) for name in NoiseSchedules.names])
    def test_tables_follow_from_the_schedule(self, schedule):
        scheduler = GridScheduler(schedule=schedule)
        given = NoiseSchedules[schedule](num_train_timesteps=1000)
        betas = (given[0] if isinstance(given, tuple) else given).double().numpy()
        np.testing.assert_array_equal(scheduler.betas.numpy(), betas)
        np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), np.exp(np.cumsum(np.log1p(-betas))), rtol=1e-10)
        self.assertEqual(scheduler.alphas_cumprod.dtype, torch.float64)
        if isinstance(given, tuple):
            torch.testing.assert_close(scheduler.alphas_cumprod, given[2].double(), rtol=1e-3, atol=1e-7)

    def test_schedule_arguments_are_used(self):
        scheduler = GridScheduler(num_train_timesteps=10, beta_start=0.1, beta_end=0.2)
        np.testing.assert_allclose(scheduler.betas.numpy(), np.linspace(0.1, 0.2, 10), rtol=1e-6)

    @parameterized.expand([(torch.bfloat16,), (torch.float16,), (torch.float32,)])
    def test_no_call_casts_the_table(self, dtype):
        """MONAI 1.6.1 casts alphas_cumprod in place in add_noise and get_velocity; in bf16 its first sigma is 0."""
        scheduler = DDIMGridScheduler(prediction_type="v_prediction")
        before = scheduler.alphas_cumprod.clone()
        x, t = torch.ones(2, 1, 4, 4, dtype=dtype), torch.tensor([0, 999])
        scheduler.add_noise(x, x, t)
        scheduler.get_velocity(x, x, t)
        scheduler.predict_original(x, t, x)
        moved, _ = scheduler.step(x, 999, x)
        self.assertEqual(moved.dtype, dtype)
        self.assertEqual(scheduler.alphas_cumprod.dtype, torch.float64)
        self.assertTrue(torch.equal(scheduler.alphas_cumprod, before))
        self.assertGreater(float(scheduler.alpha_sigma(0, x)[1]), 0.0)

    @parameterized.expand([("half", lambda m: m.half()), ("to", lambda m: m.to("meta", torch.bfloat16))])
    def test_module_casts_leave_the_table(self, _, cast):
        scheduler = GridScheduler()
        before = scheduler.alphas_cumprod.clone()
        parent = nn.ModuleList([scheduler])
        cast(parent)
        self.assertIs(cast(scheduler), scheduler)
        self.assertTrue(torch.equal(scheduler.alphas_cumprod, before))
        self.assertEqual(scheduler.alphas_cumprod.dtype, torch.float64)

    def test_state_dict_carries_the_table(self):
        source, target = GridScheduler(schedule="cosine"), GridScheduler()
        self.assertEqual(set(source.state_dict()), {"betas", "alphas", "alphas_cumprod"})
        target.load_state_dict(source.state_dict())
        self.assertTrue(torch.equal(target.alphas_cumprod, source.alphas_cumprod))
        with self.assertRaisesRegex(RuntimeError, "size mismatch"):
            GridScheduler(num_train_timesteps=500).load_state_dict(source.state_dict())

    @parameterized.expand([(name,) for name in SAMPLERS])
    def test_copies_and_repr(self, name):
        """MONAI 1.6.1's RFlowScheduler has no .to, state_dict or repr, having skipped its parent's constructor."""
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(7)
        x = randn(2, 1, 4, 4)
        network = GaussianData().network(scheduler)
        expected = run_chain(scheduler, network, x, torch.Generator().manual_seed(0))
        for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler.to("cpu")):
            self.assertTrue(torch.equal(run_chain(twin, network, x, torch.Generator().manual_seed(0)), expected))
        self.assertIn(type(scheduler).__name__, repr(scheduler))

    @parameterized.expand(
        [
            ("schedule", {"schedule": "no_such"}, "no_such"),
            ("prediction", {"prediction_type": "noise"}, "GridScheduler: prediction_type must be one of"),
            ("spacing", {"spacing": "karras"}, "GridScheduler: spacing must be one of"),
            ("clip", {"clip_sample_min": 1.0, "clip_sample_max": -1.0}, "clip_sample_min must be below"),
            ("beta 0", {"beta_start": 0.0}, "strictly decreasing within"),
            ("beta 1", {"beta_end": 1.0}, "strictly decreasing within"),
        ]
    )
    def test_bad_arguments(self, _, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            GridScheduler(**arguments)


class TestGrid(unittest.TestCase):
    @parameterized.expand(
        [(n, spacing) for n in (1, 2, 5, 7, 33, 250, 999, 1000) for spacing in ("linspace", "logsnr")]
    )
    def test_set_timesteps(self, n, spacing):
        scheduler = GridScheduler(spacing=spacing)
        scheduler.set_timesteps(n, device="cpu")
        grid = scheduler.timesteps
        self.assertEqual((grid.dtype, grid.device.type, len(grid)), (torch.int64, "cpu", n))
        self.assertEqual(scheduler.num_inference_steps, n)
        self.assertEqual(int(grid[0]), 999)
        self.assertTrue(bool((grid.diff() < 0).all()))
        if n > 1:
            self.assertEqual(int(grid[-1]), 0)
        if spacing == "linspace":
            np.testing.assert_allclose(grid.numpy(), np.linspace(999, 0, n), atol=0.5)

    def test_the_grid_stays_on_the_cpu(self):
        """MONAI's inferers concatenate the grid with a CPU tensor, so a grid on another device fails there."""
        scheduler = GridScheduler()
        scheduler.set_timesteps(5, device="meta")
        self.assertEqual(scheduler.timesteps.device.type, "cpu")

    @parameterized.expand([(0,), (1001,), (-3,), (2.5,), ("10",)])
    def test_bad_numbers_of_steps(self, n):
        with self.assertRaisesRegex(ValueError, "GridScheduler: num_inference_steps must be a whole number from 1"):
            GridScheduler().set_timesteps(n)

    @parameterized.expand([([],), ([1000, 5],), ([5, -1],), ([5, 5],), ([1, 5],), ([5.0, 1.0],), ([[5, 1]],)])
    def test_bad_grids(self, grid):
        with self.assertRaisesRegex(ValueError, "GridScheduler: a grid is a non-empty, strictly decreasing"):
            GridScheduler().set_grid(grid)

    def test_next_timestep_is_the_next_of_the_list(self):
        scheduler = GridScheduler()
        for grid in ([999, 600, 599, 3], [300, 100, 0], [17]):
            scheduler.set_grid(grid)
            for current, following in zip(grid, [*grid[1:], -1], strict=True):
                self.assertEqual(scheduler.next_timestep(current), following)
                self.assertEqual(scheduler.next_timestep(torch.tensor([current])), following)

    def test_timesteps_set_by_hand_are_respected(self):
        scheduler = GridScheduler()
        scheduler.timesteps = torch.tensor([500, 20])
        self.assertEqual([scheduler.next_timestep(500), scheduler.next_timestep(20)], [20, -1])

    def test_bad_timesteps(self):
        scheduler = GridScheduler()
        scheduler.set_timesteps(10)
        for timestep, message in (
            (998, "timestep 998 is not in the grid of 10 points from 999 to 0"),
            (torch.tensor([999, 0]), "one timestep for the whole batch"),
            (0.5, "whole number"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                scheduler.next_timestep(timestep)

    @parameterized.expand(
        [
            (name, n, spacing)
            for name in ("ddim", "dpm_solver")
            for n in (3, 10, 37)
            for spacing in ("linspace", "logsnr")
        ]
    )
    def test_deterministic_steps_land_on_the_next_noise_level(self, name, n, spacing):
        """With the true x_0 known, a step must give alpha' x_0 + sigma' epsilon at the **next point of the list**.

        MONAI 1.6.1's DDIM steps to t - T // n, its DDPM to t - 1, wherever the next grid point is.
        """
        scheduler = make_scheduler(name, spacing=spacing)
        scheduler.set_timesteps(n)
        table = np.append(scheduler.alphas_cumprod.numpy(), 1.0)  # index -1 is the clean sample
        x_0, epsilon = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1)
        grid = [*scheduler.timesteps.tolist(), -1]
        for t, following in zip(grid[:-1], grid[1:], strict=True):
            x_t = table[t] ** 0.5 * x_0 + (1 - table[t]) ** 0.5 * epsilon
            x_s, estimate = scheduler.step(epsilon, t, x_t)
            expected = table[following] ** 0.5 * x_0 + (1 - table[following]) ** 0.5 * epsilon
            torch.testing.assert_close(x_s, expected, rtol=0, atol=1e-11)
            torch.testing.assert_close(estimate, x_0, rtol=0, atol=1e-11)

    @parameterized.expand([("ddpm", {}), ("ddim", {"eta": 0.6})])
    def test_stochastic_steps_land_on_the_next_noise_level(self, name, arguments):
        scheduler = make_scheduler(name, **arguments)
        scheduler.set_timesteps(7)
        table = np.append(scheduler.alphas_cumprod.numpy(), 1.0)
        generator = torch.Generator().manual_seed(0)
        epsilon = torch.randn(100_000, 1, 1, 1, generator=generator, dtype=torch.float64)
        grid = [*scheduler.timesteps.tolist(), -1]
        for t, following in zip(grid[:-1], grid[1:], strict=True):
            x_t = table[t] ** 0.5 * 0.7 + (1 - table[t]) ** 0.5 * epsilon
            x_s, _ = scheduler.step(epsilon, t, x_t, generator=generator)
            residue = x_s - table[following] ** 0.5 * 0.7
            self.assertAlmostEqual(float(residue.mean()), 0.0, delta=0.015)
            self.assertAlmostEqual(float(residue.std()), float((1 - table[following]) ** 0.5), delta=0.015)


class TestLevels(unittest.TestCase):
    @parameterized.expand([(s,) for s in SHAPES])
    def test_alpha_sigma(self, shape):
        scheduler = GridScheduler()
        like = torch.zeros(shape, dtype=torch.float64)
        timesteps = torch.tensor([0, 17, 999, -1])
        alpha, sigma = scheduler.alpha_sigma(timesteps, like)
        self.assertEqual(alpha.shape, (4,) + (1,) * (len(shape) - 1))
        expected = np.append(np.cumprod(1 - scheduler.betas.numpy())[[0, 17, 999]], 1.0)
        np.testing.assert_allclose(alpha.flatten().numpy(), expected**0.5, rtol=1e-13)
        np.testing.assert_allclose(sigma.flatten().numpy(), (1 - expected) ** 0.5, rtol=1e-11)
        for i, t in enumerate(timesteps.tolist()):
            level = scheduler.level(t)
            for one in (t, torch.tensor(t), torch.tensor([t])):
                pair = scheduler.alpha_sigma(one, like)
                self.assertEqual([float(v) for v in pair], [float(alpha[i]), float(sigma[i])])
                self.assertEqual(pair[0].shape, (1,) * len(shape))
            np.testing.assert_allclose(level, (float(alpha[i]), float(sigma[i])), rtol=1e-15)

    def test_clean_level(self):
        scheduler = GridScheduler()
        self.assertEqual(tuple(scheduler.level(-1)), (1.0, 0.0))
        self.assertEqual(scheduler.level(-1).half_log_snr, float("inf"))
        self.assertEqual(float(scheduler.snr(-1)), float("inf"))
        x = randn(2, 1, 4, 4)
        self.assertTrue(torch.equal(scheduler.add_noise(x, x + 1, torch.tensor([-1, -1])), x))

    def test_snr(self):
        scheduler = GridScheduler()
        timesteps = torch.tensor([[0, 5], [500, 999]])
        alpha_bar = np.cumprod(1 - scheduler.betas.numpy())[timesteps.numpy()]
        snr = scheduler.snr(timesteps)
        self.assertEqual(snr.dtype, torch.float64)
        np.testing.assert_allclose(snr.numpy(), alpha_bar / (1 - alpha_bar), rtol=1e-11)
        np.testing.assert_allclose(float(snr[1, 0].log()) / 2, scheduler.level(500).half_log_snr, rtol=1e-12)

    def test_bad_timesteps(self):
        scheduler = GridScheduler()
        like = torch.zeros(3, 1, 4, 4)
        for timesteps in (1000, -2, torch.tensor([0, 5, 1000]), torch.tensor([-2, 0, 5])):
            with self.assertRaisesRegex(ValueError, r"GridScheduler: timesteps must lie in \[-1, 1000\)"):
                scheduler.alpha_sigma(timesteps, like)
        with self.assertRaisesRegex(ValueError, "2 timesteps for a batch of 3"):
            scheduler.alpha_sigma(torch.tensor([0, 5]), like)
        with self.assertRaisesRegex(TypeError, "timesteps must be integers"):
            scheduler.alpha_sigma(torch.tensor([0.0, 5.0, 6.0]), like)
        with self.assertRaisesRegex(TypeError, "floating type"):
            scheduler.alpha_sigma(5, like.long())
        with self.assertRaisesRegex(ValueError, "got 1000"):
            scheduler.level(1000)


class TestTraining(unittest.TestCase):
    @parameterized.expand([(s,) for s in SHAPES])
    def test_equals_monai(self, shape):
        ours, monai = GridScheduler(), DDPMScheduler()
        x, noise = randn(*shape, dtype=torch.float32), randn(*shape, seed=1, dtype=torch.float32)
        timesteps = torch.tensor([0, 3, 500, 999])
        torch.testing.assert_close(
            ours.add_noise(x, noise, timesteps), monai.add_noise(x, noise, timesteps), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            ours.get_velocity(x, noise, timesteps), monai.get_velocity(x, noise, timesteps), rtol=1e-4, atol=1e-5
        )

    @parameterized.expand([(p,) for p in PREDICTION_TYPES])
    def test_a_network_that_meets_its_target_denoises_perfectly(self, prediction_type):
        scheduler = GridScheduler(prediction_type=prediction_type)
        x_0, noise = randn(4, 1, 6, 6), randn(4, 1, 6, 6, seed=1)
        timesteps = torch.tensor([0, 3, 500, 999])
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        target = scheduler.training_target(x_0, noise, timesteps)
        torch.testing.assert_close(scheduler.predict_original(target, timesteps, x_t), x_0, rtol=0, atol=1e-10)
        torch.testing.assert_close(scheduler.predict_epsilon(target, timesteps, x_t), noise, rtol=0, atol=1e-10)

    def test_shapes_must_fit(self):
        scheduler = DDIMGridScheduler()
        x, y, t = torch.zeros(2, 1, 4, 4), torch.zeros(2, 2, 4, 4), torch.tensor([0, 1])
        for call in (scheduler.add_noise, scheduler.get_velocity, scheduler.training_target):
            with self.assertRaisesRegex(ValueError, r"noise of shape \(2, 2, 4, 4\) does not fit"):
                call(x, y, t)
        with self.assertRaisesRegex(ValueError, r"prediction of shape \(2, 2, 4, 4\) does not fit"):
            scheduler.step(y, 999, x)


class TestParametrizations(unittest.TestCase):
    @parameterized.expand(ROUND_TRIPS)
    def test_round_trips(self, prediction_type, shape):
        scheduler = GridScheduler(prediction_type=prediction_type)
        sample, given = randn(*shape), randn(*shape, seed=1)
        for t in (torch.tensor([0, 1, 500, 999]), 0, 999, torch.tensor(500)):
            for there, back in (
                (scheduler.model_output_from_original, scheduler.predict_original),
                (scheduler.model_output_from_epsilon, scheduler.predict_epsilon),
            ):
                torch.testing.assert_close(back(there(given, t, sample), t, sample), given, rtol=0, atol=1e-10)
                torch.testing.assert_close(there(back(given, t, sample), t, sample), given, rtol=0, atol=1e-10)

    @parameterized.expand(ROUND_TRIPS)
    def test_both_predictions_add_up_to_the_sample(self, prediction_type, shape):
        scheduler = GridScheduler(prediction_type=prediction_type)
        sample, output, t = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 1, 500, 999])
        alpha, sigma = scheduler.alpha_sigma(t, sample)
        x_0, epsilon = scheduler.predict_original(output, t, sample), scheduler.predict_epsilon(output, t, sample)
        torch.testing.assert_close(alpha * x_0 + sigma * epsilon, sample, rtol=0, atol=1e-10)

    def test_the_clean_level_has_no_prediction(self):
        scheduler = GridScheduler()
        x = torch.zeros(2, 1, 4, 4)
        with self.assertRaisesRegex(ValueError, r"timesteps must lie in \[0, 1000\)"):
            scheduler.predict_original(x, torch.tensor([5, -1]), x)

    @parameterized.expand([(name,) for name in SAMPLERS])
    def test_prediction_types_give_the_same_chain(self, name):
        chains = []
        for prediction_type in PREDICTION_TYPES:
            scheduler = make_scheduler(name, prediction_type=prediction_type)
            scheduler.set_timesteps(9)
            network = GaussianData().network(scheduler)
            chains.append(run_chain(scheduler, network, randn(3, 1, 4, 4), torch.Generator().manual_seed(3)))
        torch.testing.assert_close(chains[1], chains[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(chains[2], chains[0], rtol=0, atol=1e-10)

    def test_a_bf16_network_leaves_the_arithmetic_in_the_samples_type(self):
        scheduler = DDIMGridScheduler()
        x = randn(2, 1, 4, 4, dtype=torch.float32)
        output = randn(2, 1, 4, 4, seed=1, dtype=torch.float32).bfloat16()
        moved, estimate = scheduler.step(output, 999, x)
        expected, _ = scheduler.step(output.float(), 999, x)
        self.assertEqual((moved.dtype, estimate.dtype), (torch.float32, torch.float32))
        self.assertTrue(torch.equal(moved, expected))


class TestSampling(unittest.TestCase):
    def test_the_base_has_no_sampler(self):
        with self.assertRaisesRegex(NotImplementedError, "use a subclass"):
            GridScheduler().step(torch.zeros(1, 1, 2, 2), 999, torch.zeros(1, 1, 2, 2))

    @parameterized.expand([(n, p, d) for n in SAMPLERS for p in PREDICTION_TYPES for d in (2, 3)])
    def test_clipping(self, name, prediction_type, spatial_dims):
        """The clipped x_0 and the noise it leaves over, at the next level, in closed form (no noise drawn)."""
        scheduler = make_scheduler(
            name, prediction_type=prediction_type, clip_sample=True, clip_sample_min=-0.5, clip_sample_max=0.25
        )
        scheduler.set_grid([700, 100])
        shape = (2, 1) + (4,) * spatial_dims
        x_0, epsilon = 3 * randn(*shape), randn(*shape, seed=1)
        t = torch.tensor([700, 700])
        x_t = scheduler.add_noise(x_0, epsilon, t)
        output = scheduler.training_target(x_0, epsilon, t)
        moved, estimate = scheduler.step(output, 700, x_t, torch.Generator().manual_seed(0))
        torch.testing.assert_close(estimate, x_0.clamp(-0.5, 0.25), rtol=0, atol=1e-11)
        if name != "ddpm":
            (a, s), (a_next, s_next) = scheduler.level(700), scheduler.level(100)
            left_over = (x_t - a * estimate) / s
            torch.testing.assert_close(moved, a_next * estimate + s_next * left_over, rtol=0, atol=1e-11)

    @parameterized.expand([(n, s, d) for n in SAMPLERS for s in NoiseSchedules.names for d in (2, 3)])
    def test_every_schedule_gives_finite_samples(self, name, schedule, spatial_dims):
        """In fp32, whatever the prediction type; the cosine schedule once began at alpha_bar = 1 and gave NaN."""
        data = GaussianData()
        for prediction_type in PREDICTION_TYPES:
            scheduler = make_scheduler(name, schedule=schedule, prediction_type=prediction_type)
            for n in (1, 2, 5, 20):
                scheduler.set_timesteps(n)
                noise = randn(2, 1, *(4,) * spatial_dims, dtype=torch.float32)
                sample = run_chain(scheduler, data.network(scheduler), noise)
                self.assertTrue(bool(sample.isfinite().all()))
                self.assertLess(float(sample.abs().max()), 6.0)

    @parameterized.expand([(n, s) for n in SAMPLERS for s in NoiseSchedules.names])
    def test_every_schedule_samples_the_data(self, name, schedule):
        """All T timesteps, 500 numbers: mean and standard deviation of the data."""
        data = GaussianData()
        scheduler = make_scheduler(name, schedule=schedule)
        scheduler.set_timesteps(1000)
        noise = randn(500, 1, 1, 1)
        noise = (noise - noise.mean()) / noise.std()
        sample = run_chain(scheduler, data.network(scheduler), noise, torch.Generator().manual_seed(0))
        tolerance = 0.07 if name == "ddpm" else 0.01
        self.assertAlmostEqual(float(sample.mean()), data.mean, delta=tolerance)
        self.assertAlmostEqual(float(sample.std()), data.std, delta=tolerance)

    @parameterized.expand([(name,) for name in SAMPLERS])
    @unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
    def test_a_chain_on_the_gpu_equals_the_one_on_the_cpu(self, name):
        """Also after .to, and with a generator of the CPU."""
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(9, device="cuda")
        network, x = GaussianData().network(scheduler), randn(2, 1, 4, 4)
        expected = run_chain(scheduler, network, x, torch.Generator().manual_seed(0))
        on_gpu = run_chain(scheduler.to("cuda"), network, x.cuda(), torch.Generator().manual_seed(0))
        torch.testing.assert_close(on_gpu.cpu(), expected, rtol=0, atol=1e-10)
        noisy = scheduler.add_noise(x.cuda(), x.cuda(), torch.tensor([3, 999], device="cuda"))
        torch.testing.assert_close(noisy.cpu(), scheduler.add_noise(x, x, torch.tensor([3, 999])), rtol=0, atol=1e-12)

    def test_factory(self):
        for name, cls in (
            ("ddpm", AncestralScheduler),
            ("ddim", DDIMGridScheduler),
            ("dpm_solver", DPMSolverScheduler),
        ):
            scheduler = make_scheduler(name, num_train_timesteps=50, schedule="cosine")
            self.assertIs(type(scheduler), cls)
            self.assertEqual(scheduler.num_train_timesteps, 50)
        with self.assertRaisesRegex(ValueError, "make_scheduler: name must be one of"):
            make_scheduler("pndm")


if __name__ == "__main__":
    unittest.main()
