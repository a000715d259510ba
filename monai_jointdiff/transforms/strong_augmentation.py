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

"""Strongly disturbed views of an image, for consistency between views."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

__all__ = ["StrongAugmentation"]

_Intensity = Callable[[Tensor, float, float, np.random.RandomState], Tensor]
_CHANNELS = {"channels": range(2, 10**6), "saturation": (3,)}  # of images to which an operation applies


class StrongAugmentation(RandomizableTransform, MapTransform):
    """Adds `image_strong`, a view of `image` after a few random operations at random magnitude, and cutout.

    The recipe is RandAugment (Cubuk et al., arXiv 1909.13719) as FixMatch uses it (Sohn et al., arXiv 2001.07685): n
    different operations, chosen uniformly, each with a magnitude drawn uniformly from [-m / 10, m / 10]; then cutout
    (DeVries and Taylor, arXiv 1708.04552). The operations are those that make sense for medical images, gray or in
    color, in two and three dimensions: nothing is mirrored, inverted or solarized. At magnitude 1 they are

    ============== =============================================================================================
    `rotate`       by 30 degrees in the plane of two axes
    `shear`        by 0.3 along an axis
    `translate`    by 20 % of the size along an axis
    `scale`        by a factor of 1.3
    `brightness`   an offset of 0.5
    `contrast`     a factor of e about the mean
    `gamma`        an exponent of e on [0, 1]
    `channels`     every channel its own factor of up to 1.6 about the background (images of several channels)
    `saturation`   a factor of e on the difference to the mean of the channels (three channels)
    `blur`         a Gaussian of standard deviation 1/24 of the smallest size (either sign)
    `sharpen`      twice the difference to a Gaussian of one pixel added (negative: taken away by half)
    `noise`        of standard deviation 0.3 (either sign)
    ============== =============================================================================================

    Pixels all of whose channels have exactly the value of the background keep it in all operations on intensities but
    blur and noise, and what geometry brings in from outside and what cutout covers has it, too. So the background of an
    undisturbed image stays background. That of a view which an earlier transform made brighter or noisy, as the weak
    view of FixMatch may be, has other values: it is changed like the rest of the image, and what comes in from outside
    or is covered stands out against it. All geometry is one interpolation. The operations are written on tensors:
    MONAI's array transforms take up to milliseconds each, as much as a training step has for an image. All random
    numbers come from the transform's own state, so a view is a function of the seed that the data set gives it.

    Args:
        spatial_dims: 2 or 3.
        num_operations: n >= 0.
        magnitude: m in [0, 10].
        cutout: largest side of the box that is covered, as a share of each axis, in [0, 1]; its center is uniform
            in the image, its side uniform from 0. 0: no cutout.
        operations: names of those to choose from; None: all that fit the channels.
        background: value of nothing, in [-1, 1].
        key: key of the image (C, *spatial) in [-1, 1].
        new_key: key of the view.

    Raises:
        ValueError: for an argument out of range or the name of no operation; when called, for an image of another
            number of axes, or one to which fewer than n operations apply.
    """

    def __init__(
        self,
        spatial_dims: int,
        num_operations: int = 2,
        magnitude: float = 10.0,
        cutout: float = 0.5,
        operations: Sequence[str] | None = None,
        background: float = -1.0,
        key: str = "image",
        new_key: str = "image_strong",
    ) -> None:
        MapTransform.__init__(self, key)
        RandomizableTransform.__init__(self, prob=1.0)
        if spatial_dims not in (2, 3):
            raise ValueError(f"StrongAugmentation: spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        for name, value, low, high in (
            ("magnitude", magnitude, 0, 10),
            ("cutout", cutout, 0, 1),
            ("background", background, -1, 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"StrongAugmentation: {name} must be in [{low}, {high}], got {value}.")
        known = (*_GEOMETRY, *_INTENSITY)
        names = known if operations is None else tuple(operations)
        unknown = sorted(set(names) - set(known))
        if unknown or len(set(names)) < len(names):
            raise ValueError(f"StrongAugmentation: operations must be different ones of {known}, got {names}.")
        if not 0 <= num_operations <= len(names):
            raise ValueError(f"StrongAugmentation: num_operations must be in [0, {len(names)}], got {num_operations}.")
        self.spatial_dims = spatial_dims
        self.num_operations = num_operations
        self.magnitude = magnitude
        self.cutout = cutout
        self.operations = names
        self.background = background
        self.key = key
        self.new_key = new_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the view.

        Args:
            data: holds the image.

        Returns:
            a copy of the dictionary with the view, float32.
        """
        image = torch.as_tensor(data[self.key]).as_subclass(Tensor).float()
        if image.ndim != self.spatial_dims + 1:
            raise ValueError(
                f"StrongAugmentation: the image must be (C, *spatial) with {self.spatial_dims} spatial axes, got shape "
                f"{tuple(image.shape)}."
            )
        chosen = self._choose(len(image))
        view = self._geometry(image, {name: m for name, m in chosen.items() if name in _GEOMETRY})
        for name, magnitude in chosen.items():
            if name in _INTENSITY:
                view = _INTENSITY[name](view, magnitude, self.background, self.R)
        return {**data, self.new_key: self._cut_out(view.clamp(-1.0, 1.0))}

    def _choose(self, channels: int) -> dict[str, float]:
        """Names of the operations for an image, in random order, with their signed magnitudes in [-1, 1]."""
        fitting = [name for name in self.operations if channels in _CHANNELS.get(name, (channels,))]
        if len(fitting) < self.num_operations:
            raise ValueError(
                f"StrongAugmentation: {self.num_operations} operations are to be done, {len(fitting)} fit an image of "
                f"{channels} channels."
            )
        order = self.R.permutation(len(fitting))[: self.num_operations]
        strongest = self.magnitude / 10
        return {fitting[n]: float(self.R.uniform(-strongest, strongest)) for n in order}

    def _geometry(self, image: Tensor, magnitudes: Mapping[str, float]) -> Tensor:
        """One affine map with linear interpolation; the background comes in from outside."""
        if not magnitudes:
            return image
        sizes = image.shape[:0:-1]  # affine_grid's first coordinate is the last axis
        matrix = np.eye(self.spatial_dims + 1)
        for name, magnitude in magnitudes.items():
            matrix = matrix @ _GEOMETRY[name](magnitude, sizes, self.R)
        pixels = np.array([*(size / 2 for size in sizes), 1.0])  # of a unit of affine_grid's coordinates in [-1, 1]
        theta = torch.from_numpy((matrix * pixels / pixels[:, None])[None, :-1].astype(np.float32))
        grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
        return F.grid_sample((image - self.background)[None], grid, align_corners=False)[0] + self.background

    def _cut_out(self, view: Tensor) -> Tensor:
        """Cover a random box with the background."""
        if self.cutout == 0:
            return view
        share = self.R.uniform(0, self.cutout)
        center = self.R.uniform(0, 1, self.spatial_dims)
        box = [
            slice(max(0, round(n * (c - share / 2))), max(0, round(n * (c + share / 2))))
            for n, c in zip(view.shape[1:], center, strict=True)
        ]
        view = view.clone()
        view[(slice(None), *box)] = self.background
        return view


# Affine maps of homogeneous coordinates, in pixels about the center, from places in the view to places in the image.


def _two_axes(dims: int, random: np.random.RandomState) -> tuple[int, int]:
    i, j = random.permutation(dims)[:2]
    return int(i), int(j)


def _rotate(magnitude: float, sizes: Sequence[int], random: np.random.RandomState) -> np.ndarray:
    i, j = sorted(_two_axes(len(sizes), random))
    angle, matrix = magnitude * np.pi / 6, np.eye(len(sizes) + 1)
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def _shear(magnitude: float, sizes: Sequence[int], random: np.random.RandomState) -> np.ndarray:
    matrix = np.eye(len(sizes) + 1)
    matrix[_two_axes(len(sizes), random)] = 0.3 * magnitude
    return matrix


def _translate(magnitude: float, sizes: Sequence[int], random: np.random.RandomState) -> np.ndarray:
    matrix, axis = np.eye(len(sizes) + 1), random.randint(len(sizes))
    matrix[axis, -1] = 0.2 * magnitude * sizes[axis]
    return matrix


def _scale(magnitude: float, sizes: Sequence[int], random: np.random.RandomState) -> np.ndarray:
    return np.diag([*[1.3**-magnitude] * len(sizes), 1.0])


# Maps of intensities: (view (C, *spatial), magnitude in [-1, 1], background, random numbers) to the view.


def _where_something(operation: Callable[[Tensor, Tensor, float, float, np.random.RandomState], Tensor]) -> _Intensity:
    """The operation where an image is not background; it gets the mask (1, *spatial) as second argument."""

    def apply(view: Tensor, magnitude: float, background: float, random: np.random.RandomState) -> Tensor:
        inside = (view != background).any(dim=0, keepdim=True)
        return torch.where(inside, operation(view, inside, magnitude, background, random), background)

    return apply


def _brightness(view: Tensor, inside: Tensor, m: float, background: float, random: np.random.RandomState) -> Tensor:
    return view + 0.5 * m


def _contrast(view: Tensor, inside: Tensor, m: float, background: float, random: np.random.RandomState) -> Tensor:
    mean = (view * inside).sum() / (inside.sum() * len(view)).clamp(min=1)
    return mean + float(np.exp(m)) * (view - mean)


def _gamma(view: Tensor, inside: Tensor, m: float, background: float, random: np.random.RandomState) -> Tensor:
    return 2 * ((view + 1) / 2).clamp(0, 1) ** float(np.exp(m)) - 1


def _channels(view: Tensor, inside: Tensor, m: float, background: float, random: np.random.RandomState) -> Tensor:
    factors = torch.from_numpy(np.exp(0.5 * m * random.uniform(-1, 1, len(view))).astype(np.float32))
    return background + factors.reshape(-1, *[1] * (view.ndim - 1)) * (view - background)


def _saturation(view: Tensor, inside: Tensor, m: float, background: float, random: np.random.RandomState) -> Tensor:
    gray = view.mean(dim=0, keepdim=True)
    return gray + float(np.exp(m)) * (view - gray)


def _smooth(view: Tensor, sigma: float) -> Tensor:
    """Convolution with a Gaussian of so many pixels; the border is repeated outside."""
    kernel = gaussian_1d(torch.tensor(sigma), truncated=3.0, normalize=True)
    smoothed: Tensor = separable_filtering(view[None], [kernel] * (view.ndim - 1), mode="replicate")[0]
    return smoothed


def _blur(view: Tensor, magnitude: float, background: float, random: np.random.RandomState) -> Tensor:
    sigma = abs(magnitude) * min(view.shape[1:]) / 24
    return _smooth(view, sigma) if sigma > 0 else view


def _sharpen(view: Tensor, inside: Tensor, m: float, background: float, random: np.random.RandomState) -> Tensor:
    return view + (2.0 if m > 0 else 0.5) * m * (view - _smooth(view, 1.0))


def _noise(view: Tensor, magnitude: float, background: float, random: np.random.RandomState) -> Tensor:
    noise = torch.from_numpy(random.standard_normal(tuple(view.shape)).astype(np.float32))
    return view + 0.3 * abs(magnitude) * noise


_GEOMETRY: dict[str, Callable[[float, Sequence[int], np.random.RandomState], np.ndarray]] = {
    "rotate": _rotate,
    "shear": _shear,
    "translate": _translate,
    "scale": _scale,
}
_INTENSITY: dict[str, _Intensity] = {
    "brightness": _where_something(_brightness),
    "contrast": _where_something(_contrast),
    "gamma": _where_something(_gamma),
    "channels": _where_something(_channels),
    "saturation": _where_something(_saturation),
    "blur": _blur,
    "sharpen": _where_something(_sharpen),
    "noise": _noise,
}
