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
"""The space in which a diffusion network works: the images themselves, or latents of an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LatentSpace"]


@dataclass(frozen=True)
class LatentSpace:
    """The way from images to what the network sees, and back; without an autoencoder both are the same.

    Args:
        autoencoder: an ``AutoencoderKL``, or None.
        scale_factor: factor of the latents that the network was trained with.
    """

    autoencoder: Any = None
    scale_factor: float = 1.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, *spatial) of images: the mean, since a drawn latent could not be had again."""
        if self.autoencoder is None:
            return images
        mean, _ = self.autoencoder.encode(images)
        latents: torch.Tensor = mean * self.scale_factor
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, C, *spatial) of latents."""
        if self.autoencoder is None:
            return latents
        images: torch.Tensor = self.autoencoder.decode_stage_2_outputs(latents / self.scale_factor)
        return images
