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
"""The inferer of an autoencoder in training: reconstruction and the distribution of the latents."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from monai.inferers import Inferer
from torch import nn

from .denoiser import at_least_float32, autocast, plain

__all__ = ["AutoencoderInferer", "AutoencoderOutput"]


class AutoencoderOutput(NamedTuple):
    """What an ``AutoencoderKL`` says of images.

    Args:
        reconstruction: (N, C, *spatial), decoded from a latent.
        mean: of the latent's normal distribution, (N, L, *latent).
        sigma: its standard deviation, (N, L, *latent), > 0.
    """

    reconstruction: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor


class AutoencoderInferer(Inferer):
    """Reconstructs images by an ``AutoencoderKL``.

    A training network decodes a latent drawn from its distribution, by torch's global generator; a network in
    evaluation mode decodes the mean. The network runs under autocast; results are float32 (float64 for float64 inputs).

    Args:
        autocast_dtype: ``torch.bfloat16`` to run the network under autocast on the device of the inputs; None for the
            precision of the network.
    """

    def __init__(self, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast_dtype = autocast_dtype

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> AutoencoderOutput:
        """Reconstruct.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: the autoencoder. In training it may be inside DistributedDataParallel.
            args: ignored (the engine's contract).
            kwargs: ignored (the engine's contract).

        Returns:
            reconstruction and distribution of the latents.
        """
        images = plain(inputs)
        with autocast(images, self.autocast_dtype):
            if network.training:
                output = network(images)
            else:
                autoencoder: Any = network
                mean, sigma = autoencoder.encode(images)
                output = autoencoder.decode(mean), mean, sigma
        return AutoencoderOutput(*map(at_least_float32, output))
