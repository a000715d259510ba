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

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.inferers import JointDiffusionInferer, Parametrization, ReverseChain
from monai_jointdiff.schedulers import GridScheduler, make_scheduler
from tests.inferers.utils import GaussianNetwork

diffusers, has_diffusers = optional_import("diffusers")

TYPES = [("epsilon",), ("sample",), ("v_prediction",)]


class TestParametrization(unittest.TestCase):
    def setUp(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.output, self.change = torch.randn(3, 2, 1, 8, 8, dtype=torch.float64, generator=generator)

    @parameterized.expand(TYPES)
    def test_agrees_with_grid_scheduler(self, prediction_type: str) -> None:
        scheduler = GridScheduler(prediction_type=prediction_type)
        for t in (0, 17, 500, 999):
            level = scheduler.level(t)
            here = Parametrization(level.alpha, level.sigma, prediction_type)
            original = scheduler.predict_original(self.output, t, self.x)
            torch.testing.assert_close(here.predict_original(self.output, self.x), original, rtol=1e-12, atol=0)
            epsilon = scheduler.predict_epsilon(self.output, t, self.x) + self.change
            expected = scheduler.model_output_from_epsilon(epsilon, t, self.x)
            torch.testing.assert_close(here.shift_epsilon(self.output, self.change), expected, rtol=1e-8, atol=1e-8)

    def test_unknown_prediction_type(self) -> None:
        with self.assertRaisesRegex(ValueError, "prediction_type must be one of .* got 'None'"):
            Parametrization(0.6, 0.8, "None")


class TestReverseChain(unittest.TestCase):
    def test_grid_is_python_numbers(self) -> None:
        scheduler = make_scheduler("ddim")
        scheduler.set_grid([700, 31, 5])
        chain = ReverseChain(scheduler)
        self.assertEqual(chain.timesteps, [700, 31, 5])
        self.assertTrue(all(type(t) is int for t in chain.timesteps))
        self.assertEqual([chain.next_timestep(i) for i in range(len(chain))], [31, 5, -1])

    def test_parametrization_of_monai_and_own(self) -> None:
        for scheduler in (DDIMScheduler(prediction_type="v_prediction"), GridScheduler(prediction_type="v_prediction")):
            here = ReverseChain(scheduler).parametrization(0)  # timestep 999
            self.assertEqual(here.prediction_type, "v_prediction")
            self.assertAlmostEqual(here.alpha, math.sqrt(float(scheduler.alphas_cumprod[999])), places=12)
            self.assertAlmostEqual(here.alpha**2 + here.sigma**2, 1.0, places=12)

    def test_given_scheduler_is_not_touched(self) -> None:
        scheduler = make_scheduler("dpm_solver")
        scheduler.set_timesteps(5)
        chain, x = ReverseChain(scheduler), torch.randn(1, 1, 8, 8)
        for i in range(3):
            x, _ = chain.step(i, torch.zeros_like(x), x)
        self.assertIsNone(scheduler._arrival)

    def test_bfloat16_does_not_reach_monais_table(self) -> None:
        scheduler = DDPMScheduler()
        scheduler.set_timesteps(2)
        chain, x = ReverseChain(scheduler), torch.randn(1, 1, 8, 8).bfloat16()
        chain.scheduler.add_noise(x, x, torch.tensor([5]))  # casts the table of the copy
        self.assertEqual(chain.scheduler.alphas_cumprod.dtype, torch.bfloat16)
        self.assertEqual(scheduler.alphas_cumprod.dtype, torch.float32)

    def test_rectified_flow_walks_to_zero(self) -> None:
        # the velocity x_0 - noise is constant along the flow to a point: one exact step, whatever the grid
        scheduler = RFlowScheduler()
        scheduler.set_timesteps(4)
        chain = ReverseChain(scheduler)
        noise, clean = torch.randn(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.3)
        x = noise
        for i in range(len(chain)):
            x, _ = chain.step(i, clean - noise, x)
        torch.testing.assert_close(x, clean, rtol=0, atol=1e-6)
        with self.assertRaisesRegex(ValueError, "alphas_cumprod"):
            chain.parametrization(0)

    def test_wrong_schedulers(self) -> None:
        with self.assertRaisesRegex(TypeError, "must have a method step, got int"):
            ReverseChain(3)
        with self.assertRaisesRegex(ValueError, "RFlowScheduler has no time grid"):
            ReverseChain(RFlowScheduler())


class TestForeignSchedulers(unittest.TestCase):
    """Schedulers of MONAI and diffusers in the loop of the inferer."""

    mean, std = 0.2, 0.5

    def _errors(self, scheduler: object, prediction_type: str = "epsilon") -> tuple[float, float]:
        own = GridScheduler(prediction_type=prediction_type)
        network = GaussianNetwork(own, self.mean, self.std)
        noise = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        image = JointDiffusionInferer(own).sample(noise, network, scheduler, generator=generator).image
        return abs(float(image.mean()) - self.mean), abs(float(image.std()) / self.std - 1)

    @parameterized.expand([("ddim", DDIMScheduler, 200), ("ddpm", DDPMScheduler, 1000)])
    def test_monai(self, _: str, kind: type, steps: int) -> None:
        scheduler = kind(clip_sample=False)
        scheduler.set_timesteps(steps)
        mean_error, std_error = self._errors(scheduler)
        self.assertLess(mean_error, 0.03)
        self.assertLess(std_error, 0.03)

    def test_monai_pndm_starts_afresh(self) -> None:
        scheduler = PNDMScheduler(skip_prk_steps=True)
        scheduler.set_timesteps(10)
        own = GridScheduler()
        noise = torch.randn(2, 1, 8, 8)
        first, second = (
            JointDiffusionInferer(own).sample(noise, GaussianNetwork(own, 0.0, 0.5), scheduler).image for _ in range(2)
        )
        self.assertTrue(torch.equal(first, second))

    @parameterized.expand(
        [
            ("DDIMScheduler", {"clip_sample": False}, 200),
            ("DDPMScheduler", {"clip_sample": False}, 500),
            ("DPMSolverMultistepScheduler", {}, 80),
            ("UniPCMultistepScheduler", {}, 80),
            ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 200),
        ]
    )
    @unittest.skipUnless(has_diffusers, "diffusers is not installed")
    def test_diffusers(self, name: str, options: dict, steps: int) -> None:
        scheduler = getattr(diffusers, name)(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", **options)
        scheduler.set_timesteps(steps)
        mean_error, std_error = self._errors(scheduler)
        self.assertLess(mean_error, 0.03)
        self.assertLess(std_error, 0.03)

    @parameterized.expand(TYPES)
    @unittest.skipUnless(has_diffusers, "diffusers is not installed")
    def test_equals_diffusers_ddim_on_the_same_grid(self, prediction_type: str) -> None:
        theirs = diffusers.DDIMScheduler(
            beta_start=1e-4, beta_end=2e-2, clip_sample=False, prediction_type=prediction_type
        )
        theirs.set_timesteps(10)
        ours = make_scheduler("ddim", prediction_type=prediction_type)
        ours.set_grid(theirs.timesteps.tolist())
        network = GaussianNetwork(ours, self.mean, self.std)
        noise = torch.randn(2, 1, 8, 8)
        inferer = JointDiffusionInferer(ours)
        # diffusers keeps its table in float32
        expected = inferer.sample(noise, network, theirs).image
        torch.testing.assert_close(inferer.sample(noise, network).image, expected, rtol=0, atol=1e-4)

    @unittest.skipUnless(has_diffusers, "diffusers is not installed")
    def test_diffusers_multistep_runs_twice(self) -> None:
        scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=2e-2)
        scheduler.set_timesteps(6)
        own = GridScheduler()
        noise = torch.randn(2, 1, 8, 8)
        first, second = (
            JointDiffusionInferer(own).sample(noise, GaussianNetwork(own, 0.0, 0.5), scheduler).image for _ in range(2)
        )
        self.assertTrue(torch.equal(first, second))


if __name__ == "__main__":
    unittest.main()
