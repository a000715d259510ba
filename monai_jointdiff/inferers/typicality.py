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
"""How usual an image is for a diffusion network: its denoising errors against those of images it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from monai.utils import optional_import
from torch import nn

from monai_jointdiff.schedulers import GridScheduler

from .denoiser import Denoiser, at_least_float32, autocast, evaluation_mode, plain, without_ddp
from .draws import NoiseDraws
from .latent import LatentSpace

__all__ = ["DenoisingProfile", "Typicality"]

LedoitWolf, _ = optional_import("sklearn.covariance", name="LedoitWolf")

_FOLDS = 5


class DenoisingProfile:
    """The logarithms of an image's denoising errors at a few fixed noise levels, under the null class.

    A network that knows a kind of images predicts the noise in them with an error that depends on the noise level and
    little on the image. Errors that are too large, too small, or large at one level and small at another tell of an
    image of another kind. (The likelihood alone does not: plain images of another kind are more likely than those of
    the training, Nalisnick et al., https://arxiv.org/abs/1810.09136.) Levels and noise are the same for all images,
    so that profiles can be compared.

    Args:
        scheduler: the noise process of the training.
        num_draws: noise levels D, and calls of the network.
        timestep_range: part of the training timesteps that the levels are spread over.
        seed: of the noise.
        max_batch: images in one call of the network.
        autocast_dtype: type to run the network in under autocast; None for its own precision.
        autoencoder: an ``AutoencoderKL``, when the network works on its latents.
        scale_factor: factor of the latents that the network was trained with.

    Raises:
        ValueError: when there is no draw or the range is empty.
    """

    def __init__(
        self,
        scheduler: GridScheduler,
        num_draws: int = 5,
        timestep_range: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        max_batch: int = 256,
        autocast_dtype: torch.dtype | None = None,
        autoencoder: Any = None,
        scale_factor: float = 1.0,
    ) -> None:
        low, high = timestep_range
        if num_draws < 1 or max_batch < 1 or not 0 <= low < high <= 1:
            raise ValueError(
                "DenoisingProfile: needs num_draws and max_batch of at least 1 and 0 <= low < high <= 1 as "
                f"timestep_range, got {num_draws}, {max_batch} and {timestep_range}."
            )
        last = scheduler.num_train_timesteps - 1
        self.scheduler = scheduler
        self.num_draws = num_draws
        self.timesteps = (round(low * last), round(high * last))
        self.seed = seed
        self.max_batch = max_batch
        self.autocast_dtype = autocast_dtype
        self.space = LatentSpace(autoencoder, scale_factor)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """The profiles of images.

        Args:
            images: (N, C, *spatial) in [-1, 1].
            network: a joint network, or any called as ``network(x, timesteps)``; its mode is restored.

        Returns:
            (N, D) float64, logarithms of the mean squared errors of the noise.

        Raises:
            ValueError: when the images are no batch, or an error is not finite.
        """
        if images.ndim < 3 or not len(images):
            raise ValueError(f"DenoisingProfile: images must have shape (N, C, *spatial), got {tuple(images.shape)}.")
        network = without_ddp(network)
        denoiser = Denoiser(network, self.autocast_dtype)
        with evaluation_mode(network):
            profiles = torch.cat([self._profiles(part, denoiser) for part in plain(images).split(self.max_batch)])
        bad = (~profiles.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"DenoisingProfile: the errors of images {bad} of the batch are not finite.")
        return profiles

    def _profiles(self, images: torch.Tensor, denoiser: Denoiser) -> torch.Tensor:
        clean = self.space.encode(images)
        draws = NoiseDraws([self.seed], clean.shape[1:], self.num_draws, *self.timesteps)
        errors = []
        for timestep in draws.timesteps[0].tolist():
            noise = draws.noise(0).to(clean).expand_as(clean)
            times = torch.full((len(clean),), timestep, device=clean.device)
            noisy = self.scheduler.add_noise(clean, noise, times)
            with autocast(noisy, self.autocast_dtype):
                output = at_least_float32(denoiser.network(noisy, times))
            predicted = self.scheduler.predict_epsilon(output, times, noisy)
            errors.append(((predicted - noise) ** 2).flatten(1).mean(dim=1))
        return torch.stack(errors, dim=1).double().log().cpu()


@dataclass(frozen=True)
class Typicality:
    """Mahalanobis distance of an image's profile from those of images of a known kind.

    Args:
        mean: (D,).
        precision: inverse covariance (D, D).

    Example:

    .. code-block:: python

        profile = DenoisingProfile(scheduler)
        known = profile(validation_images, network)
        unusual = Typicality.fit(known).score(profile(images, network)) > Typicality.held_out_threshold(known, 0.95)
    """

    mean: torch.Tensor
    precision: torch.Tensor

    @classmethod
    def fit(cls, profiles: torch.Tensor) -> Typicality:
        """Mean and covariance of the known kind, the latter shrunk (Ledoit and Wolf, 2004).

        Args:
            profiles: (M, D) of at least two images.

        Returns:
            The fitted distance.

        Raises:
            ValueError: when the profiles are no matrix of at least two finite rows.
        """
        if profiles.ndim != 2 or len(profiles) < 2 or not bool(profiles.isfinite().all()):
            raise ValueError(f"Typicality: needs finite profiles (M >= 2, D), got shape {tuple(profiles.shape)}.")
        fitted = LedoitWolf().fit(profiles.double().numpy())
        return cls(torch.as_tensor(fitted.location_), torch.as_tensor(fitted.precision_))

    def score(self, profiles: torch.Tensor) -> torch.Tensor:
        """Distances (N,) of profiles (N, D); the larger, the less usual."""
        centered = profiles.double() - self.mean
        return torch.einsum("nd,de,ne->n", centered, self.precision, centered).clamp(min=0).sqrt()

    def threshold(self, profiles: torch.Tensor, share: float = 0.95) -> float:
        """The distance that this share of the profiles (M, D) of the known kind, best new ones, stays below.

        Args:
            profiles: (M, D).
            share: in (0, 1).

        Returns:
            the quantile.
        """
        return _quantile(self.score(profiles), share)

    @classmethod
    def held_out_threshold(cls, profiles: torch.Tensor, share: float = 0.95) -> float:
        """The threshold where there are no new profiles: each fifth is scored by what is fitted on the other four.

        Profiles lie closer to a mean and covariance fitted on them than new ones of the same kind do.

        Args:
            profiles: (M, D) of at least five images.
            share: in (0, 1).

        Returns:
            the quantile over all profiles.

        Raises:
            ValueError: for fewer than five profiles, or as :meth:`fit`.
        """
        if len(profiles) < _FOLDS:
            raise ValueError(f"Typicality: a held-out threshold needs at least {_FOLDS} profiles, got {len(profiles)}.")
        fold = torch.arange(len(profiles)) % _FOLDS
        scores = [cls.fit(profiles[fold != k]).score(profiles[fold == k]) for k in range(_FOLDS)]
        return _quantile(torch.cat(scores), share)


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(torch.quantile(values, torch.as_tensor(share, dtype=values.dtype)))
