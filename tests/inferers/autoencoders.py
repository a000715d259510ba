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
"""Autoencoders whose latents are known, called as MONAI's `AutoencoderKL`."""

from __future__ import annotations

import torch
from torch import nn


class IdentityAutoencoder(nn.Module):
    """Latents are the images."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, torch.ones_like(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def decode_stage_2_outputs(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode(latents)


class HalvingAutoencoder(IdentityAutoencoder):
    """Latents are every second pixel of each axis, times a parameter."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        halves = images[(slice(None), slice(None), *[slice(None, None, 2)] * (images.ndim - 2))]
        return self.gain * halves, torch.ones_like(halves)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(latents / self.gain, scale_factor=2.0)
