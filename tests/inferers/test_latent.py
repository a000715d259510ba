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

"""Every inferer on latents: an identity autoencoder changes nothing, one that halves does so where it should."""

from __future__ import annotations

import unittest
from collections.abc import Callable

import torch
from parameterized import parameterized
from torch import Tensor

from monai_jointdiff.inferers import (
    CounterfactualInferer,
    DenoisingProfile,
    DiffusionClassifierInferer,
    JointDiffusionInferer,
    LatentSpace,
)
from monai_jointdiff.schedulers import DDIMGridScheduler, make_scheduler
from tests.inferers.autoencoders import HalvingAutoencoder, IdentityAutoencoder
from tests.inferers.utils import tiny_unet

SIZES = {2: (8, 8), 3: (4, 8, 4)}
DIMS = [("2d", 2), ("3d", 3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(spatial_dims: int, count: int = 2, factor: int = 1, seed: int = 0) -> Tensor:
    return randn(count, 1, *(factor * size for size in SIZES[spatial_dims]), seed=seed).tanh()


def answers(spatial_dims: int, autoencoder: torch.nn.Module | None) -> dict[str, Callable[[], list[Tensor]]]:
    """What each inferer says."""
    torch.manual_seed(0)  # of the biases, which tiny_unet leaves as they are
    net, x = tiny_unet(spatial_dims), images(spatial_dims)
    noise, timesteps = images(spatial_dims, seed=1), torch.tensor([5, 700])
    scheduler = DDIMGridScheduler()

    def sample() -> list[Tensor]:
        sampler = make_scheduler("dpm_solver", 3)
        result = JointDiffusionInferer(sampler, autoencoder=autoencoder).sample(noise, net, intermediate_steps=2)
        return [result.image, *result.intermediates]

    def counterfactual() -> list[Tensor]:
        options = {"timestep": 200, "num_inference_steps": 2, "probability": None, "region_fraction": 0.3}
        inferer = CounterfactualInferer(scheduler, autoencoder=autoencoder, **options)  # type: ignore[arg-type]
        result = inferer(x, net, target=1)
        assert result.region is not None
        return [result.counterfactual, result.reconstruction, result.difference, result.region, result.probabilities]

    def diffusion_classifier() -> list[Tensor]:
        result = DiffusionClassifierInferer(scheduler, 3, autoencoder=autoencoder)(x, net, maps=True)
        assert result.evidence is not None
        return [result.draw_errors, result.probabilities, result.evidence]

    joint = JointDiffusionInferer(scheduler, autoencoder=autoencoder)
    return {
        "forward": lambda: list(joint(x, net, noise, timesteps, clean=x)),
        "logits": lambda: [joint(x, net)],
        "classify": lambda: [joint.classify(x, net)],
        "sample": sample,
        "counterfactual": counterfactual,
        "diffusion_classifier": diffusion_classifier,
        "profile": lambda: [DenoisingProfile(scheduler, 2, autoencoder=autoencoder)(x, net)],
    }


class TestLatentSpace(unittest.TestCase):
    @parameterized.expand(DIMS)
    def test_there_and_back(self, _: str, spatial_dims: int) -> None:
        space = LatentSpace(HalvingAutoencoder(3.0), 0.5)
        latents = images(spatial_dims)
        decoded = space.decode(latents)
        self.assertEqual(decoded.shape[2:], tuple(2 * size for size in SIZES[spatial_dims]))
        torch.testing.assert_close(space.encode(decoded), latents)
        torch.testing.assert_close(space.encode(decoded), decoded[(..., *[slice(None, None, 2)] * spatial_dims)] * 1.5)
        self.assertIs(LatentSpace().encode(latents), latents)
        self.assertIs(LatentSpace().decode(latents), latents)


class TestIdentity(unittest.TestCase):
    @parameterized.expand([(name, dims) for dims in SIZES for name in answers(2, None)])
    def test_is_pixel_space_bit_for_bit(self, name: str, spatial_dims: int) -> None:
        ours, theirs = (answers(spatial_dims, space)[name]() for space in (IdentityAutoencoder(), None))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class TestHalving(unittest.TestCase):
    """Latents of an image are known, so the answers are those of a network that is shown them."""

    def setUp(self) -> None:
        self.scheduler = DDIMGridScheduler()
        self.autoencoder = HalvingAutoencoder(2.0)
        self.inferer = JointDiffusionInferer(self.scheduler, autoencoder=self.autoencoder, scale_factor=0.25)
        self.pixels = JointDiffusionInferer(self.scheduler)

    @parameterized.expand(DIMS)
    def test_training_forward(self, _: str, spatial_dims: int) -> None:
        net = tiny_unet(spatial_dims)
        x, clean = images(spatial_dims, factor=2), images(spatial_dims, 3, factor=2, seed=4)
        noise, timesteps = images(spatial_dims, seed=1), torch.tensor([5, 700])
        every = (..., *[slice(None, None, 2)] * spatial_dims)
        ours = self.inferer(x, net, noise, timesteps, clean=clean)
        theirs = self.pixels(x[every] / 2, net, noise, timesteps, clean=clean[every] / 2)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(self.inferer.classify(x, net), self.pixels.classify(x[every] / 2, net))
        ours.prediction.sum().backward()
        self.assertIsNone(self.autoencoder.gain.grad)

    @parameterized.expand(DIMS)
    def test_samples_are_decoded(self, _: str, spatial_dims: int) -> None:
        net, noise, scheduler = tiny_unet(spatial_dims), images(spatial_dims), make_scheduler("ddim", 3)
        ours, theirs = (
            inferer.sample(noise, net, scheduler, intermediate_steps=1) for inferer in (self.inferer, self.pixels)
        )

        def decoded(latents: Tensor) -> Tensor:
            return torch.nn.functional.interpolate(latents / 0.25 / 2, scale_factor=2.0)

        torch.testing.assert_close(ours.image, decoded(theirs.image))
        for a, b in zip(ours.intermediates, theirs.intermediates, strict=True):
            torch.testing.assert_close(a, decoded(b))

    def test_features_are_those_of_the_latents(self) -> None:
        x, net = images(2, factor=2), tiny_unet()
        features, logits = self.inferer.features(x, net)
        torch.testing.assert_close(logits, self.inferer.classify(x, net), rtol=0, atol=0)
        self.assertEqual(len(features), len(x))

    def test_gradients_of_a_classification_reach_the_image(self) -> None:
        x = images(2, factor=2).requires_grad_()
        self.inferer.classify(x, tiny_unet()).sum().backward()
        assert x.grad is not None
        self.assertGreater(float(x.grad[..., ::2, ::2].abs().max()), 0)
        self.assertEqual(float(x.grad[..., 1::2, :].abs().max()), 0)

    def test_evidence_has_the_size_of_the_images(self) -> None:
        x, net, options = images(2, factor=2), tiny_unet(), {"autoencoder": self.autoencoder, "scale_factor": 0.25}
        inferer = DiffusionClassifierInferer(self.scheduler, 2, **options)  # type: ignore[arg-type]
        ours = inferer(x, net, maps=True).evidence
        theirs = DiffusionClassifierInferer(self.scheduler, 2)(x[..., ::2, ::2] / 2, net, maps=True).evidence
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, torch.nn.functional.interpolate(theirs, (16, 16), mode="bilinear"))

    def test_noise_must_have_the_shape_of_the_latents(self) -> None:
        x = images(2, factor=2)
        message = r"noise must have the shape of the latents \(2, 1, 8, 8\), got \(2, 1, 16, 16\)"
        with self.assertRaisesRegex(ValueError, message):
            self.inferer(x, tiny_unet(), torch.zeros_like(x), torch.tensor([1, 2]))


if __name__ == "__main__":
    unittest.main()
