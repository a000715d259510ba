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

"""Random views of an image for the classification term."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import MapTransform, RandomizableTransform

__all__ = ["ClassificationAugmentation"]


class ClassificationAugmentation(RandomizableTransform, MapTransform):
    """Adds `image_cls`, a randomly disturbed view of `image`: turned, scaled, shifted, other contrast, noise.

    One interpolation does all of the geometry, since the loader shares the cores with the network. All random numbers
    are drawn from the transform's own state, so a view is a function of the seed that the data set gives it.

    Args:
        spatial_dims: 2 or 3.
        strength: scales all ranges; 0 leaves the image as it is, 1 turns by up to 15 degrees, scales by up to 15 %,
            shifts by up to 5 % of the size, changes gamma by up to a factor of 1.5, contrast and brightness by up to
            25 % and 20 %, and adds noise of up to 10 % of the range's half.
        flip: also mirror the last axis in half of the cases.
        key: key of the image (C, *spatial) in [-1, 1].
        new_key: key of the view.

    Raises:
        ValueError: for other spatial dims or a negative strength.
    """

    def __init__(
        self,
        spatial_dims: int,
        strength: float = 1.0,
        flip: bool = False,
        key: str = "image",
        new_key: str = "image_cls",
    ) -> None:
        MapTransform.__init__(self, key)
        RandomizableTransform.__init__(self, prob=1.0)
        if spatial_dims not in (2, 3):
            raise ValueError(f"ClassificationAugmentation: spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        if not strength >= 0:
            raise ValueError(f"ClassificationAugmentation: strength must be >= 0, got {strength}.")
        self.spatial_dims = spatial_dims
        self.strength = strength
        self.flip = flip
        self.key = key
        self.new_key = new_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the view.

        Args:
            data: holds the image.

        Returns:
            a copy of the dictionary with the view.
        """
        image = torch.as_tensor(data[self.key]).as_subclass(torch.Tensor)
        view = self._intensity(self._geometry(image))
        return {**data, self.new_key: view.clamp(-1.0, 1.0)}

    def _uniform(self, spread: float) -> float:
        return float(self.R.uniform(-1.0, 1.0)) * spread * self.strength

    def _geometry(self, image: torch.Tensor) -> torch.Tensor:
        """Affine map with bilinear interpolation; what comes from outside repeats the border."""
        dims = self.spatial_dims
        matrix = np.eye(dims)
        for i in range(dims - 1):  # rotations in the planes of neighbouring axes
            angle = self._uniform(np.pi / 12)
            turn = np.eye(dims)
            turn[i : i + 2, i : i + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            matrix = matrix @ turn
        matrix = matrix * (1 + self._uniform(0.15))
        if self.flip and self.R.random() < 0.5:
            matrix[:, 0] = -matrix[:, 0]  # mirrors the last axis
        sizes = np.array(image.shape[:0:-1])  # affine_grid's first coordinate is the last axis
        matrix = matrix * (sizes / sizes[:, None])  # turned in pixels, whatever the sizes of the axes
        shift = np.array([[self._uniform(0.1)] for _ in range(dims)])
        theta = torch.from_numpy(np.concatenate([matrix, shift], axis=1)[None].astype(np.float32))
        grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
        return F.grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)[0]

    def _intensity(self, image: torch.Tensor) -> torch.Tensor:
        """Gamma on [0, 1], then gain, offset and noise on [-1, 1]."""
        gamma = float(np.exp(self._uniform(0.4)))
        view = ((image + 1) / 2).clamp(0, 1) ** gamma * 2 - 1
        view = view * (1 + self._uniform(0.25)) + self._uniform(0.2)
        noise = self.R.standard_normal(tuple(image.shape)).astype(np.float32)
        return view + abs(self._uniform(0.1)) * torch.from_numpy(noise)
