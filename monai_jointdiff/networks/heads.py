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
"""Classification heads over the maps of a UNet encoder, of any size, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

__all__ = ["HEADS", "ClassifierHead", "FeatureStandardization", "HeadFeatures"]

HEADS = ("standardized", "mediffusion", "jointdiffusion", "linear")

# Dropout probability and hidden width of the published heads; the width 0 stands for half of the input width.
_DEFAULTS = {"standardized": (0.2, 128), "mediffusion": (0.3, 1024), "jointdiffusion": (0.7, 0), "linear": (0.0, 0)}


class HeadFeatures(NamedTuple):
    """What the last layer of a head sees, and what it says.

    Attributes:
        features: (N, F) penultimate features: of the hidden layer, of the variant ``linear`` the pooled maps.
        logits: logits (N, K).
    """

    features: torch.Tensor
    logits: torch.Tensor


class FeatureStandardization(nn.Module):
    """Batch normalization of feature vectors whose batch is that of all processes together.

    torch's ``SyncBatchNorm`` exists for GPUs only, and plain batch normalization would make the result depend on how
    the batch is divided among processes. Here sums over the batch are reduced over all processes, gradients
    included, so that several processes compute what one with the whole batch would. In evaluation, and for a batch of
    a single image, whose deviation is not defined, the running statistics of the training are used.

    Source: Ioffe and Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167.

    Args:
        num_features: width d.
        momentum: weight of the newest batch in the running statistics.
        eps: added to the variance.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Standardizes.

        Args:
            z: (N, d).

        Returns:
            (N, d) with mean ``bias`` and deviation ``weight`` over the batch of all processes (in training).
        """
        mean, var = self.running_mean, self.running_var
        if self.training:
            count, total = _over_processes(torch.cat([z.new_full((1,), len(z)), z.sum(dim=0)])).split([1, z.shape[1]])
            if count > 1:
                mean = total / count
                var = _over_processes((z - mean).square().sum(dim=0)) / count
                self._update(mean.detach(), var.detach() * count / (count - 1))
        return (z - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


def _over_processes(x: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, with gradients; x itself where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        reduced: torch.Tensor = all_reduce(x)
        return reduced
    return x


class ClassifierHead(nn.Module):
    """Logits from the globally pooled encoder maps.

    Every map is averaged over its spatial axes, the averages ``z`` of width d = sum of the maps' channels are
    concatenated, and a small perceptron maps them to classes. The variant ``standardized`` also takes the maximum of
    each map (z has width 2 d), and standardizes z over the batch:

    ================== =======================================================================================
    ``variant``        layers after the pooling
    ================== =======================================================================================
    ``standardized``   FeatureStandardization, Dropout(.2), Linear(2 d, 128), SiLU, Dropout(.2), Linear(128, K)
    ``mediffusion``    Dropout(.3), Linear(d, 1024), LeakyReLU(.2), Dropout(.3), Linear(1024, K)
    ``jointdiffusion`` Dropout(.7), LayerNorm, Linear(d, d/2), LeakyReLU(.01), Dropout(.7), LayerNorm, Linear(d/2, K)
    ``linear``         Dropout(0), Linear(d, K)
    ================== =======================================================================================

    Pooled features of images of one kind are nearly equal: what all have in common exceeds what tells them apart by
    far, and a network without batch normalization learns slowly from such features. ``standardized`` removes the
    common part. The published JointDiffusion head did so by batch normalization, too, but had the raw timestep among
    its inputs: constant in training, divided by its vanishing deviation, it saturates the logits at every other
    timestep. No head here sees the timestep.

    The head always computes in the precision of its weights: bfloat16 logits would tie probabilities at 1/256.

    Sources: Deja, Trzcinski, Tomczak, "Learning Data Representations with Joint Diffusion Models",
    https://arxiv.org/abs/2301.13622; Kaleta et al., "Mediffusion", https://arxiv.org/abs/2411.09434.

    Args:
        in_channels: number of channels of each map, in the order in which the maps are given.
        num_classes: number of logits K, at least 1.
        variant: one of ``HEADS``.
        hidden: width of the hidden layer; None for the published one. Not for ``linear``.
        dropout: dropout probability in [0, 1); None for the published one.

    Raises:
        ValueError: when an argument is out of its range.

    Example:

    .. code-block:: python

        head = ClassifierHead(in_channels=(32, 64), num_classes=2)
        logits = head([torch.rand(4, 32, 16, 16), torch.rand(4, 64, 8, 8)])  # (4, 2)
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        variant: str = "standardized",
        hidden: int | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        if variant not in HEADS:
            raise ValueError(f"ClassifierHead: unknown head {variant!r}, expected one of {HEADS}.")
        if variant == "linear" and hidden is not None:
            raise ValueError(f"ClassifierHead: the linear head has no hidden layer, got hidden={hidden}.")
        if hidden is not None and hidden < 1:
            raise ValueError(f"ClassifierHead: hidden must be a positive width, got {hidden}.")
        if dropout is not None and not 0.0 <= dropout < 1.0:
            raise ValueError(f"ClassifierHead: dropout must be in [0, 1), got {dropout}.")
        width = sum(in_channels)
        default_dropout, default_hidden = _DEFAULTS[variant]
        p = default_dropout if dropout is None else dropout
        middle = hidden or default_hidden or max(width // 2, 1)
        self.num_maps = len(in_channels)
        self.with_maximum = variant == "standardized"
        width = 2 * width if self.with_maximum else width
        self.layers = nn.Sequential(*_layers(variant, width, middle, num_classes, p))

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Classifies.

        Args:
            maps: feature maps, each (N, C_i, *spatial_i).

        Returns:
            Logits (N, K).

        Raises:
            ValueError: when the number of maps is not the one of the constructor.
        """
        z = self._pool(maps)
        with torch.autocast(z.device.type, enabled=False):
            logits: torch.Tensor = self.layers(z)
        return logits

    def features(self, maps: Sequence[torch.Tensor]) -> HeadFeatures:
        """Classifies, and tells what the last layer sees.

        Args:
            maps: as of :py:meth:`forward`.

        Returns:
            Penultimate features and logits.

        Raises:
            ValueError: when the number of maps is not the one of the constructor.
        """
        z = self._pool(maps)
        with torch.autocast(z.device.type, enabled=False):
            features: torch.Tensor = self.layers[:-1](z)
            return HeadFeatures(features, self.layers[-1](features))

    def _pool(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """The pooled maps (N, d), or (N, 2 d) with the maxima, in the precision of the weights."""
        if len(maps) != self.num_maps:
            raise ValueError(f"ClassifierHead: got {len(maps)} feature maps, expected {self.num_maps}.")
        pooled = [global_average(x) for x in maps]
        if self.with_maximum:
            pooled += [x.flatten(2).amax(dim=2).to(z.dtype) for x, z in zip(maps, pooled, strict=True)]
        return torch.cat(pooled, dim=1).to(next(self.parameters()).dtype)


def global_average(x: torch.Tensor) -> torch.Tensor:
    """Average of a map (N, C, *spatial) over its spatial axes, (N, C), at least in single precision."""
    return x.flatten(2).mean(dim=2, dtype=torch.promote_types(x.dtype, torch.float32))


def _layers(variant: str, width: int, hidden: int, num_classes: int, dropout: float) -> list[nn.Module]:
    """The layers of a head, in the order of the table in :py:class:`ClassifierHead`."""
    if variant == "linear":
        return [nn.Dropout(dropout), nn.Linear(width, num_classes)]
    if variant == "standardized":
        return [
            FeatureStandardization(width),
            nn.Dropout(dropout),
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        ]
    if variant == "mediffusion":
        return [
            nn.Dropout(dropout),
            nn.Linear(width, hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        ]
    return [
        nn.Dropout(dropout),
        nn.LayerNorm(width),
        nn.Linear(width, hidden),
        nn.LeakyReLU(0.01),
        nn.Dropout(dropout),
        nn.LayerNorm(hidden),
        nn.Linear(hidden, num_classes),
    ]
