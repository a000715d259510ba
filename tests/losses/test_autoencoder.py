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
from monai.networks.nets import PatchDiscriminator
from parameterized import parameterized
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from monai_jointdiff.losses import AutoencoderLoss, kl_to_standard_normal

DIMS = [("2d", 2), ("3d", 3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_of(spatial_dims: int = 2) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Reconstruction, mean and sigma with gradients, and images."""
    pixels, entries = (3, 2, *[16] * spatial_dims), (3, 4, *[4] * spatial_dims)
    parts = randn(*pixels), randn(*entries, seed=1), randn(*entries, seed=2).exp()
    return tuple(part.requires_grad_() for part in parts), randn(*pixels, seed=3)  # type: ignore[return-value]


class Remembering(nn.Module):
    """A distance that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.seen: list[Tensor] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.seen += [a.detach(), b.detach()]
        return self.weight * (a - b).square().sum()


class TestDivergence(unittest.TestCase):
    @parameterized.expand(DIMS)
    def test_equals_torchs(self, _: str, spatial_dims: int) -> None:
        (_, mean, sigma), _ = output_of(spatial_dims)
        expected = kl_divergence(Normal(mean, sigma), Normal(0.0, 1.0)).flatten(1).sum(dim=1).mean()
        torch.testing.assert_close(kl_to_standard_normal(mean, sigma), expected)

    def test_is_zero_for_the_standard_normal(self) -> None:
        self.assertEqual(float(kl_to_standard_normal(torch.zeros(2, 3), torch.ones(2, 3))), 0.0)


class TestObjective(unittest.TestCase):
    @parameterized.expand([("l1", 2), ("l2", 2), ("l1", 3), ("l2", 3)])
    def test_terms_and_total(self, kind: str, spatial_dims: int) -> None:
        (reconstruction, mean, sigma), images = output_of(spatial_dims)
        loss = AutoencoderLoss(kind, kl_weight=0.01)
        total = loss((reconstruction, mean, sigma), images)
        difference = reconstruction - images
        distance = (difference.abs() if kind == "l1" else difference**2).mean()
        divergence = kl_to_standard_normal(mean, sigma)
        torch.testing.assert_close(total, distance + 0.01 * divergence)
        self.assertEqual(set(loss.terms), {"reconstruction", "kl", "total"})
        torch.testing.assert_close(loss.terms["kl"], divergence.detach())
        self.assertFalse(any(term.requires_grad for term in loss.terms.values()))

    def test_perceptual_distance_sees_images_from_0_to_1_and_does_not_learn(self) -> None:
        output, images = output_of()
        distance = Remembering()
        loss = AutoencoderLoss(kl_weight=0.0, perceptual=distance, perceptual_weight=0.5)
        loss(output, images).backward()
        torch.testing.assert_close(distance.seen[0], (output[0].detach() + 1) / 2)
        torch.testing.assert_close(distance.seen[1], (images + 1) / 2)
        self.assertIsNone(distance.weight.grad)
        gradient = (output[0] - images).sign() / images.numel() + 0.5 * (output[0] - images) / 2
        torch.testing.assert_close(output[0].grad, gradient.detach())

    def test_terms_without_weight_cost_nothing(self) -> None:
        output, images = output_of()
        distance, discriminator = Remembering(), Remembering()
        loss = AutoencoderLoss(perceptual=distance, discriminator=discriminator)
        loss(output, images)
        self.assertEqual((distance.seen, discriminator.seen), ([], []))


class TestAdversarial(unittest.TestCase):
    @parameterized.expand(DIMS)
    def test_each_network_gets_the_gradient_of_its_own_loss(self, _: str, spatial_dims: int) -> None:
        """Against the two losses of a least-squares GAN written out (LeakyReLU of .05 before, as MONAI has it)."""
        torch.manual_seed(0)
        discriminator = PatchDiscriminator(spatial_dims, channels=4, in_channels=2, num_layers_d=2, norm="INSTANCE")
        output, images = output_of(spatial_dims)
        loss = AutoencoderLoss(kl_weight=0.0, discriminator=discriminator, adversarial_weight=0.3)
        loss(output, images).backward()
        found = [output[0].grad, *[parameter.grad for parameter in discriminator.parameters()]]

        def score(x: Tensor) -> Tensor:
            return nn.functional.leaky_relu(discriminator(x)[-1], 0.05)

        fake = output[0].detach().requires_grad_()
        generator = (fake - images).abs().mean() + 0.3 * (score(fake) - 1).square().mean()
        expected = list(torch.autograd.grad(generator, [fake]))
        judge = ((score(images) - 1).square().mean() + score(fake.detach()).square().mean()) / 2
        expected += torch.autograd.grad(judge, list(discriminator.parameters()))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loss.terms["discriminator"], judge.detach())
        torch.testing.assert_close(loss.terms["total"], generator.detach())


class TestWrongInput(unittest.TestCase):
    @parameterized.expand(
        [
            ({"reconstruction": "l3"}, "reconstruction must be one of l1, l2, got 'l3'"),
            ({"kl_weight": -1.0}, "kl_weight must be >= 0, got -1.0"),
            ({"perceptual_weight": float("nan")}, "perceptual_weight must be >= 0, got nan"),
            ({"perceptual_weight": 1.0}, "perceptual_weight is 1.0, but perceptual is not given"),
            ({"adversarial_weight": 0.5}, "adversarial_weight is 0.5, but a discriminator is not given"),
        ]
    )
    def test_arguments(self, options: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"AutoencoderLoss: {message}"):
            AutoencoderLoss(**options)

    def test_shapes(self) -> None:
        output, images = output_of()
        with self.assertRaisesRegex(ValueError, r"\(3, 2, 16, 16\) and images \(3, 2, 15, 15\) must have one shape"):
            AutoencoderLoss()(output, images[..., 1:, 1:])


if __name__ == "__main__":
    unittest.main()
