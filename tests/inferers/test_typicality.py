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
from parameterized import parameterized

from monai_jointdiff.inferers import DenoisingProfile, NoiseDraws, Typicality
from monai_jointdiff.schedulers import DDIMGridScheduler
from tests.inferers.utils import GaussianNetwork, Recorder, tiny_unet

SCHEDULER = DDIMGridScheduler(num_train_timesteps=100, prediction_type="epsilon", schedule="scaled_linear_beta")


def gaussian(count: int, std: float = 0.5, seed: int = 0, spatial_dims: int = 2) -> torch.Tensor:
    shape = (count, 1, *[8] * spatial_dims)
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestDenoisingProfile(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_errors_of_an_optimal_network(self, spatial_dims):
        """Written out for pixels N(0, std^2), whose optimal prediction is known."""
        x, net = gaussian(3, spatial_dims=spatial_dims), GaussianNetwork(SCHEDULER, 0.0, 0.5)
        found = DenoisingProfile(SCHEDULER, 4, seed=3, max_batch=2)(x, net)
        draws = NoiseDraws([3], x.shape[1:], 4, 0, 99)
        for n, t in enumerate(draws.timesteps[0].tolist()):
            noise, (alpha, sigma) = draws.noise(0), SCHEDULER.level(t)
            noisy = alpha * x + sigma * noise
            predicted = sigma * noisy / (alpha**2 * 0.25 + sigma**2)
            expected = ((predicted - noise) ** 2).flatten(1).mean(dim=1).double().log()
            torch.testing.assert_close(found[:, n], expected, rtol=1e-4, atol=1e-4)

    def test_asks_under_the_null_class_and_restores_the_mode(self):
        net = tiny_unet().train()
        seen = Recorder(net)
        DenoisingProfile(SCHEDULER, 3)(gaussian(5), seen)
        self.assertEqual(len(seen.calls), 3)
        self.assertTrue(all(call.get("class_labels") is None for call in seen.calls))
        self.assertTrue(net.training)

    def test_wrong_arguments(self):
        for arguments in ({"num_draws": 0}, {"max_batch": 0}, {"timestep_range": (0.6, 0.4)}):
            with self.assertRaisesRegex(ValueError, "DenoisingProfile: needs num_draws and max_batch of at least 1"):
                DenoisingProfile(SCHEDULER, **arguments)

    def test_wrong_images(self):
        profile, net = DenoisingProfile(SCHEDULER, 2), GaussianNetwork(SCHEDULER, 0.0, 0.5)
        with self.assertRaisesRegex(ValueError, r"images must have shape .*got \(8, 8\)"):
            profile(torch.zeros(8, 8), net)
        x = gaussian(3)
        x[1, 0, 0, 0] = float("nan")
        with self.assertRaisesRegex(ValueError, r"errors of images \[1\] of the batch are not finite"):
            profile(x, net)


class TestTypicality(unittest.TestCase):
    def test_is_the_mahalanobis_distance(self):
        profiles = torch.randn(5000, 3, generator=torch.Generator().manual_seed(1)) @ torch.diag(
            torch.tensor([1, 2, 0.5])
        )
        fitted = Typicality.fit(profiles)
        new = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).double()
        centered = new.numpy() - profiles.double().numpy().mean(axis=0)
        inverse = np.linalg.inv(np.cov(profiles.double().numpy().T))
        expected = np.sqrt(np.einsum("nd,de,ne->n", centered, inverse, centered))
        np.testing.assert_allclose(fitted.score(new), expected, rtol=0.02)  # the shrinkage of 5,000 profiles is small
        self.assertAlmostEqual(float((fitted.score(profiles) > fitted.threshold(profiles, 0.9)).double().mean()), 0.1)

    def test_tells_smooth_and_rough_images_from_known_ones(self):
        """Images of less and of more spread; the likelihood of the former is higher than that of the known ones."""
        net, profile = GaussianNetwork(SCHEDULER, 0.0, 0.5), DenoisingProfile(SCHEDULER, 5)
        usual = Typicality.fit(profile(gaussian(200, seed=1), net))
        known = usual.score(profile(gaussian(200, seed=2), net))
        for std in (0.2, 0.9):
            other = usual.score(profile(gaussian(200, std, seed=3), net))
            self.assertGreater(float((other > known.quantile(0.95)).double().mean()), 0.95)

    def test_held_out_threshold_flags_the_share_of_new_images(self):
        """Few images and many levels: the quantile of the fitted images themselves flags far more than 10 %."""
        generator = torch.Generator().manual_seed(4)
        held_out, fitted = [], []
        for _ in range(100):
            known, new = torch.randn(30, 8, generator=generator), torch.randn(200, 8, generator=generator)
            usual = Typicality.fit(known)
            flagged = usual.score(new)
            held_out.append(float((flagged > Typicality.held_out_threshold(known, 0.9)).double().mean()))
            fitted.append(float((flagged > usual.threshold(known, 0.9)).double().mean()))
        self.assertAlmostEqual(float(np.mean(held_out)), 0.1, delta=0.03)
        self.assertGreater(float(np.mean(fitted)), 0.15)

    def test_held_out_threshold_by_hand(self):
        profiles = torch.randn(7, 2, generator=torch.Generator().manual_seed(5))
        scores = []
        for k in range(5):
            others = [n for n in range(7) if n % 5 != k]
            scores += Typicality.fit(profiles[others]).score(profiles[k::5]).tolist()
        self.assertAlmostEqual(Typicality.held_out_threshold(profiles, 0.7), float(np.quantile(scores, 0.7)), places=12)
        with self.assertRaisesRegex(ValueError, "needs at least 5 profiles, got 4"):
            Typicality.held_out_threshold(profiles[:4])

    def test_wrong_profiles(self):
        for profiles in (torch.zeros(1, 3), torch.zeros(5), torch.full((4, 2), float("nan"))):
            with self.assertRaisesRegex(ValueError, "Typicality: needs finite profiles"):
                Typicality.fit(profiles)


if __name__ == "__main__":
    unittest.main()
