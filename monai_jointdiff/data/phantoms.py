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

"""Phantoms with exactly known findings; chest-like ones: a projection in 2D, a volume in 3D, from one scene.

The scene of a chest is a list of slabs (:mod:`monai_jointdiff.data.anatomy`). The volume holds, voxel by voxel, the
density times the part of the voxel that a slab covers; the x-ray picture holds the integral of the density along the
depth, which is density times thickness. The mean of a noise-free volume along its depth is therefore the noise-free
picture of the same scene, exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from monai_jointdiff.data.anatomy import Frame, Slab, Uniforms, anatomy, effusion, opacity

__all__ = ["CHEST_CLASSES", "ChestPhantoms", "Phantom", "Phantoms", "pixel_centers", "spread_matrix"]

CHEST_CLASSES = ("normal", "opacity", "effusion")

_SHAPE_NUMBERS = 96  # uniform numbers reserved for a chest, and as many for its finding
_TEXTURE_POINTS = (9, 20)  # control points per axis of the coarse and of the fine texture
_TYPICAL = {2: 0.55, 3: 1.1}  # density of the densest soft parts


@dataclass(frozen=True)
class Phantom:
    """One phantom.

    Args:
        image: (C, *spatial) uint8.
        label: index into the `class_names` of the phantoms.
        mask: (1, *spatial) bool, where the finding changes the image; empty for a normal phantom.
    """

    image: np.ndarray
    label: int
    mask: np.ndarray


class Phantoms(ABC):
    """Images drawn by the program, a function of (seed, index), of which all is known.

    Anatomy, exposure and noise are the same whatever the label. Of chests and brains the first class is the one without
    a finding: there `phantoms(index, label=0)` is the healthy twin of `phantoms(index)` and equals it outside the mask.
    Every skin phantom has a lesion; its twin of the first class has another one.

    Args:
        spatial_dims: 2 or 3.
        image_size: size of all axes, or one size per axis.
        seed: seed of the whole set.

    Raises:
        ValueError: for other than 2 or 3 axes, sizes below 8, or a negative seed.
    """

    class_names: ClassVar[tuple[str, ...]]
    in_channels: ClassVar[int]
    channel_names: ClassVar[tuple[str, ...] | None] = None  # None: they have no names

    def __init__(self, spatial_dims: int = 2, image_size: int | Sequence[int] = 32, seed: int = 0) -> None:
        name = type(self).__name__
        if spatial_dims not in (2, 3):
            raise ValueError(f"{name}: spatial_dims must be 2 or 3, got {spatial_dims}.")
        size = (image_size,) * spatial_dims if isinstance(image_size, int) else tuple(image_size)
        if len(size) != spatial_dims or min(size) < 8:
            raise ValueError(f"{name}: image_size must be {spatial_dims} numbers of at least 8, got {image_size}.")
        if seed < 0:
            raise ValueError(f"{name}: seed must be at least 0, got {seed}.")
        self.spatial_dims = spatial_dims
        self.image_size = size
        self.seed = seed

    @abstractmethod
    def __call__(self, index: int, label: int | None = None) -> Phantom:
        """Draw phantom number `index`.

        Args:
            index: number of the phantom, from 0.
            label: draw this finding instead of the phantom's own.

        Returns:
            image, label and mask.

        Raises:
            ValueError: for a label that does not exist.
        """

    def label(self, index: int) -> int:
        """Label of phantom number `index`, without drawing it."""
        return self._chosen_label(self._generator(index).random())

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def _chosen_label(self, number: float, label: int | None = None) -> int:
        """The label that is asked for; without one the phantom's own, by its first random number."""
        if label is None:
            return int(len(self.class_names) * number)
        if not 0 <= label < len(self.class_names):
            raise ValueError(f"{type(self).__name__}: label must be in [0, {len(self.class_names)}), got {label}.")
        return label


class ChestPhantoms(Phantoms):
    """Chest-like phantoms of one channel.

    Anatomy: trunk with shoulders, two lungs over a domed diaphragm, heart and aortic arch, spine, trachea, ribs,
    clavicles, vessels. Nuisance: shape of all of these, breast shadows, stomach gas, leads, side marker, rotation,
    scale, shift, exposure, contrast, gamma, noise. Findings: an *opacity* is a soft irregular blob inside one lung; an
    *effusion* is fluid at the bottom of one lung, with a level that rises toward the chest wall (meniscus).

    Args:
        spatial_dims: 2 draws the frontal projection, 3 the volume; axes are (depth from front to back,) rows from head
            to foot, columns.
        image_size: size of all axes, or one size per axis.
        seed: seed of the whole set.

    Raises:
        ValueError: for other than 2 or 3 axes, sizes below 8, or a negative seed.

    Example:

        .. code-block:: python

            phantom = ChestPhantoms(spatial_dims=2, image_size=64, seed=0)(17)
            print(CHEST_CLASSES[phantom.label], phantom.image.shape, phantom.mask.sum())
    """

    class_names = CHEST_CLASSES
    in_channels = 1

    def __init__(self, spatial_dims: int = 2, image_size: int | Sequence[int] = 32, seed: int = 0) -> None:
        super().__init__(spatial_dims, image_size, seed)
        size = self.image_size
        down, across = pixel_centers(size[-2]), pixel_centers(size[-1])
        self._y, self._x = np.meshgrid(down, across, indexing="ij")
        self._edge = 2.0 / min(size[-2:])
        self._textures = [(spread_matrix(n, down), spread_matrix(n, across).T) for n in _TEXTURE_POINTS]

    def __call__(self, index: int, label: int | None = None) -> Phantom:
        """Draw phantom number `index`.

        Args:
            index: number of the phantom, from 0.
            label: draw this finding instead of the phantom's own.

        Returns:
            image, label and mask.

        Raises:
            ValueError: for a label that does not exist.
        """
        generator = self._generator(index)
        label, chest, finding = self._scene(generator, label)
        density = self._render([*chest, *finding])
        return Phantom(self._expose(density, generator)[None], label, (self._render(finding) != 0)[None])

    def density(self, index: int, label: int | None = None) -> np.ndarray:
        """What phantom number `index` consists of, before exposure and noise.

        Args:
            index: number of the phantom, from 0.
            label: draw this finding instead of the phantom's own.

        Returns:
            (*spatial) density relative to soft tissue; in 2D its mean along the depth.

        Raises:
            ValueError: for a label that does not exist.
        """
        _, chest, finding = self._scene(self._generator(index), label)
        return self._render([*chest, *finding])

    def _scene(self, generator: np.random.Generator, label: int | None) -> tuple[int, list[Slab], list[Slab]]:
        """Label, chest and finding; draws the same numbers whatever the label."""
        own, *shape = generator.random(1 + 2 * _SHAPE_NUMBERS).tolist()
        label = self._chosen_label(own, label)
        coarse, fine = (
            down @ generator.standard_normal((n, n), dtype=np.float32) @ across
            for n, (down, across) in zip(_TEXTURE_POINTS, self._textures, strict=True)
        )
        u = Uniforms(shape[:_SHAPE_NUMBERS])
        frame = self._frame(u)
        chest, lungs = anatomy(frame, u, coarse, fine)
        draw_finding = (None, opacity, effusion)[label]
        finding = [] if draw_finding is None else draw_finding(frame, Uniforms(shape[_SHAPE_NUMBERS:]), lungs, coarse)
        return label, chest, finding

    def _frame(self, u: Uniforms) -> Frame:
        """How the patient stands: turned, off center, larger or smaller."""
        turn, scale = u(-0.12, 0.12), u(0.92, 1.12)
        cos, sin = np.float32(np.cos(turn) / scale), np.float32(np.sin(turn) / scale)
        x, y = self._x - np.float32(u(-0.1, 0.1)), self._y - np.float32(u(-0.08, 0.08))
        return Frame(cos * x + sin * y, cos * y - sin * x, self._edge)

    def _render(self, slabs: Sequence[Slab]) -> np.ndarray:
        """Density (*spatial): its mean along the depth in 2D, voxel by voxel in 3D."""
        total = np.zeros(self.image_size, dtype=np.float32)
        if self.spatial_dims == 2:
            for slab in slabs:
                total += slab.density * slab.half  # mean over a depth of 2: density * 2 * half / 2
            return total
        faces = np.linspace(-1.0, 1.0, self.image_size[0] + 1, dtype=np.float32)[:, None, None]
        for slab in slabs:
            half = np.asarray(slab.half, dtype=np.float32)
            covered = np.clip(faces, slab.center - half, slab.center + half)
            total += slab.density * np.diff(covered, axis=0) * (self.image_size[0] / 2.0)
        return total

    def _expose(self, density: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Exposure, contrast, gamma, light, noise, 8 bit: pointwise, so that twins differ in the mask only."""
        u = Uniforms(generator.random(8).tolist())
        density = np.maximum(density, 0.0) / _TYPICAL[self.spatial_dims]
        image = 1.0 - np.exp(-u(1.4, 2.2) * density)  # film saturates softly
        image = u(0.88, 1.1) * image ** u(1.0, 1.9) + u(-0.03, 0.08)
        image += np.float32(u(-0.06, 0.06)) * self._x + np.float32(u(-0.05, 0.05)) * self._y
        image += np.float32(u(0.01, 0.03)) * generator.standard_normal(self.image_size, dtype=np.float32)
        return np.clip(255.0 * image + 0.5, 0.0, 255.0).astype(np.uint8)


def pixel_centers(count: int) -> np.ndarray:
    """Centers of `count` pixels that cover [-1, 1], (count,) float32."""
    return ((2 * np.arange(count) + 1) / count - 1).astype(np.float32)


def spread_matrix(points: int, positions: np.ndarray) -> np.ndarray:
    """From white noise at control points to a smooth random field along one axis.

    Args:
        points: number of control points.
        positions: (N,) where the field is wanted, in [-1, 1].

    Returns:
        (N, points) float32, its rows of unit norm, so that the field has unit variance.
    """
    knots = np.linspace(-1.1, 1.1, points, dtype=np.float32)
    weights = np.exp(-0.5 * np.square((positions[:, None] - knots) / (0.9 * (knots[1] - knots[0]))))
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
