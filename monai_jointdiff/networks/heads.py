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

import torch
from torch import nn

__all__ = ["HEADS", "ClassifierHead"]

HEADS = ("mediffusion", "jointdiffusion", "linear")

# Dropout probability and hidden width of the published heads; the width 0 stands for half of the input width.
_DEFAULTS = {"mediffusion": (0.3, 1024), "jointdiffusion": (0.7, 0), "linear": (0.0, 0)}


class ClassifierHead(nn.Module):
    """Logits from the globally averaged encoder maps.

    Every map is averaged over its spatial axes, the averages ``z`` of width d = sum of the maps' channels are
    concatenated, and a small perceptron maps them to classes:

    ================== =======================================================================================
    ``variant``        layers after the pooling
    ================== =======================================================================================
    ``mediffusion``    Dropout(.3), Linear(d, 1024), LeakyReLU(.2), Dropout(.3), Linear(1024, K)
    ``jointdiffusion`` Dropout(.7), LayerNorm, Linear(d, d/2), LeakyReLU(.01), Dropout(.7), LayerNorm, Linear(d/2, K)
    ``linear``         Dropout(0), Linear(d, K)
    ================== =======================================================================================

    Two things of the published JointDiffusion head are left out on purpose: its input of the raw timestep, which is
    constant in training, and its batch normalization, which divides that constant by its vanishing deviation and
    saturates the logits at every timestep > 0. Layer normalization does not depend on other samples or on statistics
    of the training.

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
        variant: str = "mediffusion",
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
        if len(maps) != self.num_maps:
            raise ValueError(f"ClassifierHead: got {len(maps)} feature maps, expected {self.num_maps}.")
        z = torch.cat([global_average(x) for x in maps], dim=1)  # (N, d)
        with torch.autocast(z.device.type, enabled=False):
            logits: torch.Tensor = self.layers(z.to(next(self.parameters()).dtype))
        return logits


def global_average(x: torch.Tensor) -> torch.Tensor:
    """Average of a map (N, C, *spatial) over its spatial axes, (N, C), at least in single precision."""
    return x.flatten(2).mean(dim=2, dtype=torch.promote_types(x.dtype, torch.float32))


def _layers(variant: str, width: int, hidden: int, num_classes: int, dropout: float) -> list[nn.Module]:
    """The layers of a head, in the order of the table in :py:class:`ClassifierHead`."""
    if variant == "linear":
        return [nn.Dropout(dropout), nn.Linear(width, num_classes)]
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
