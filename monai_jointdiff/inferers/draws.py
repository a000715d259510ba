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
"""Draws of timestep and noise on which a diffusion classifier compares the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["DRAWS", "NoiseDraws", "stratified_timesteps"]

DRAWS = ("stratified", "random")

_OF_TIMESTEPS = 0x9E3779B9  # makes another seed of an image's seed: 32 bits, the only ones a CPU generator looks at


def stratified_timesteps(num_draws: int, first: int, last: int) -> torch.Tensor:
    """Timesteps that cut a range into equal parts, in an order whose every beginning is spread over the range.

    The midpoints of ``num_draws`` equal parts, visited in the order of the van der Corput sequence (bits of the index
    reversed): a classifier that stops early has seen all noise levels.

    Args:
        num_draws: number of draws D.
        first: smallest timestep.
        last: largest timestep.

    Returns:
        (D,) int64 in [first, last].
    """
    bits = max(1, (num_draws - 1).bit_length())
    reversed_bits = torch.tensor([int(f"{n:0{bits}b}"[::-1], 2) for n in range(2**bits)])
    order = reversed_bits[reversed_bits < num_draws]
    middles = (order.double() + 0.5) / num_draws
    return (first + middles * (last + 1 - first)).floor().long().clamp(first, last)


class NoiseDraws:
    """Timestep and noise of draw n of an image: a function of the image's seed and n, whatever batch it is in.

    All classes of an image are compared on the same draws. They are made on the CPU in float32, one after the other.

    Args:
        seeds: one per image (N).
        shape: of one image (C, *spatial).
        num_draws: number of draws D of an image.
        first: smallest timestep.
        last: largest timestep.
        kind: ``stratified`` (:func:`stratified_timesteps`, the same for all images) or ``random`` (uniform timesteps).

    Raises:
        ValueError: for another kind.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], num_draws: int, first: int, last: int, kind: str = DRAWS[0]
    ) -> None:
        if kind not in DRAWS:
            raise ValueError(f"NoiseDraws: kind must be one of {DRAWS}, got {kind!r}.")
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if kind == "stratified":
            self.timesteps = stratified_timesteps(num_draws, first, last).expand(len(seeds), -1)
        else:  # from a generator of their own: the noise of draw n does not depend on how many draws there are
            every = [torch.Generator().manual_seed(seed ^ _OF_TIMESTEPS) for seed in seeds]
            self.timesteps = torch.stack([torch.randint(first, last + 1, (num_draws,), generator=one) for one in every])

    def noise(self, image: int) -> torch.Tensor:
        """The next noise (C, *spatial) of an image."""
        return torch.randn(self.shape, generator=self.generators[image])
