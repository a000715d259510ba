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
"""The objective of an autoencoder whose latents a diffusion network is to learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import PatchAdversarialLoss
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

__all__ = ["AutoencoderLoss", "kl_to_standard_normal"]

_DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}


class AutoencoderLoss(_Loss):
    r"""Objective of an ``AutoencoderKL``.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752, as in MONAI's
    tutorials:

    .. math::
        L = d(\hat{x}, x) + \lambda_{KL}\,\mathrm{KL}(\mathcal{N}(\mu, \sigma^2)\,\|\,\mathcal{N}(0, 1))
            + \lambda_P\,P(\hat{x}, x) + \lambda_A\,A(D(\hat{x}))

    The distance d is a mean over pixels, the divergence a sum over the entries of a latent and a mean over images, P a
    perceptual distance, A the least-squares loss of a generator against the discriminator D.

    D learns in the same step: the scalar that is returned also holds D's own loss, on reconstructions without their
    graph and on images, so that its gradient reaches D alone, while that of A does not reach D. One optimizer of both
    networks, one checkpoint and one `backward` are enough.

    Args:
        reconstruction: `l1` or `l2` (mean squared error), the distance d.
        kl_weight: >= 0.
        perceptual: called as `perceptual(reconstruction, images)`, both scaled from [-1, 1] to [0, 1], gives a scalar;
            its parameters do not learn.
        perceptual_weight: >= 0; positive only with `perceptual`.
        discriminator: D, from images to scores (or, as MONAI's `PatchDiscriminator`, to a list of maps whose last are
            the scores).
        adversarial_weight: >= 0; positive only with `discriminator`. An attribute that may be changed between steps
            (:class:`~monai_jointdiff.handlers.AdversarialStart`); at 0 the discriminator is neither asked nor trained.

    Attributes:
        terms: the terms of the last call by name, detached scalars without their weights: `reconstruction`, `kl`,
            `perceptual`, `adversarial` and `discriminator` (where they are asked for), and `total`, the objective of
            the autoencoder.

    Example:
        >>> loss = AutoencoderLoss(kl_weight=0.5)
        >>> images, mean = torch.zeros(2, 1, 4, 4), torch.ones(2, 3, 1, 1)
        >>> float(loss((images + 0.25, mean, torch.ones_like(mean)), images))  # 0.25 + 0.5 * 3 / 2
        1.0
    """

    def __init__(
        self,
        reconstruction: str = "l1",
        kl_weight: float = 1e-6,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if reconstruction not in _DISTANCES:
            raise ValueError(f"AutoencoderLoss: reconstruction must be one of l1, l2, got {reconstruction!r}.")
        weights = {"kl": kl_weight, "perceptual": perceptual_weight, "adversarial": adversarial_weight}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"AutoencoderLoss: {name}_weight must be >= 0, got {weight}.")
        for name, part, weight in (
            ("perceptual", perceptual, perceptual_weight),
            ("adversarial", discriminator, adversarial_weight),
        ):
            if weight > 0 and part is None:
                missing = "perceptual" if name == "perceptual" else "a discriminator"
                raise ValueError(f"AutoencoderLoss: {name}_weight is {weight}, but {missing} is not given.")
        self.distance = _DISTANCES[reconstruction]
        self.kl_weight = kl_weight
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False)
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight = adversarial_weight
        self.criterion = PatchAdversarialLoss(criterion="least_squares")
        self.terms: dict[str, Tensor] = {}

    def forward(self, output: Sequence[Tensor], images: Tensor) -> Tensor:
        """Evaluate the objective and keep its terms.

        Args:
            output: reconstruction (N, C, *spatial), mean and standard deviation of the latents (N, L, *latent).
            images: (N, C, *spatial) in [-1, 1].

        Returns:
            scalar: the objective, and the discriminator's own.

        Raises:
            ValueError: when reconstruction and images differ in shape.
        """
        reconstruction, mean, sigma = output
        if reconstruction.shape != images.shape:
            raise ValueError(
                f"AutoencoderLoss: reconstruction {tuple(reconstruction.shape)} and images {tuple(images.shape)} must "
                "have one shape; the size of the images must be divisible by the autoencoder's factor."
            )
        terms = {
            "reconstruction": self.distance(reconstruction, images),
            "kl": kl_to_standard_normal(mean, sigma),
        }
        if self.perceptual is not None and self.perceptual_weight > 0:
            terms["perceptual"] = self.perceptual((reconstruction + 1) / 2, (images + 1) / 2)
        if self.adversarial_weight > 0:
            terms["adversarial"] = self._generator_loss(reconstruction)
        weights = {"kl": self.kl_weight, "perceptual": self.perceptual_weight, "adversarial": self.adversarial_weight}
        total = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        learnt = total
        if self.adversarial_weight > 0:
            terms["discriminator"] = self._discriminator_loss(reconstruction, images)
            learnt = total + terms["discriminator"]
        self.terms = {name: term.detach() for name, term in {**terms, "total": total}.items()}
        return learnt

    def _generator_loss(self, reconstruction: Tensor) -> Tensor:
        """How far the scores of the reconstructions are from those of images; no gradient for the discriminator."""
        with _frozen(self.discriminator):
            return self.criterion(self._scores(reconstruction), True, False)

    def _discriminator_loss(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """How well it tells reconstructions from images; no gradient for the autoencoder."""
        fake = self.criterion(self._scores(reconstruction.detach()), False, True)
        real = self.criterion(self._scores(images), True, True)
        return (fake + real) / 2

    def _scores(self, images: Tensor) -> Tensor:
        assert self.discriminator is not None
        maps = self.discriminator(images.contiguous())
        return maps[-1] if isinstance(maps, Sequence) else maps


def kl_to_standard_normal(mean: Tensor, sigma: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, sigma^2) from N(0, 1), summed over a latent, mean over images.

    Args:
        mean: (N, ...).
        sigma: (N, ...), > 0.

    Returns:
        scalar.
    """
    variance = sigma.square()
    return 0.5 * (mean.square() + variance - variance.log() - 1).flatten(1).sum(dim=1).mean()


@contextmanager
def _frozen(network: Any) -> Iterator[None]:
    """Within, the parameters get no gradients."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
