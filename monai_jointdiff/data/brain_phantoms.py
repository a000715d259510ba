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

"""Brain-like phantoms with exactly known tumours: an axial slice in 2D, a volume in 3D, from one scene."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from monai_jointdiff.data.anatomy import Uniforms
from monai_jointdiff.data.brain_anatomy import HeadFrame, Layer, head, paint, tumour
from monai_jointdiff.data.phantoms import Phantom, Phantoms, pixel_centers, spread_matrix

__all__ = ["BRAIN_CLASSES", "BrainPhantoms"]

BRAIN_CLASSES = ("no_tumour", "tumour")

_HEAD_NUMBERS = 160  # uniform numbers reserved for a head
_TUMOUR_NUMBERS = 32  # and for its tumour
_TEXTURE_POINTS = (7, 16)  # control points per axis of the coarse and of the fine texture
_BIAS_POINTS = 3  # control points per axis of the receiver's sensitivity


class BrainPhantoms(Phantoms):
    """Brain-like phantoms of two channels, FLAIR and T1 with contrast agent (T1c).

    Anatomy: skin and fat, skull, fluid, folded cortex, white matter, deep gray matter, ventricles. Nuisance: size and
    shape of all of these, head position, height of the slice, contrast of the tissues, white matter hyperintensities
    (bright in FLAIR), vessels and choroid plexus (bright in T1c), uneven sensitivity of the receiver (bias field),
    gain, gamma, Rician noise. A *tumour* has an irregular oedema, bright in FLAIR, and in it a rim, bright in T1c,
    around a dark middle; it lies in gray and white matter, and moves nothing.

    Args:
        spatial_dims: 2 draws an axial slice through the volume that 3 draws (through its tumour, if it has one); axes
            are (depth from feet to head,) rows from front to back, columns from the patient's right to the left.
        image_size: size of all axes, or one size per axis.
        seed: seed of the whole set.

    Raises:
        ValueError: for other than 2 or 3 axes, sizes below 8, or a negative seed.

    Example:

        .. code-block:: python

            phantom = BrainPhantoms(spatial_dims=2, image_size=64, seed=0)(17)
            print(BRAIN_CLASSES[phantom.label], phantom.image.shape, phantom.mask.sum())
    """

    class_names = BRAIN_CLASSES
    in_channels = 2
    channel_names = ("FLAIR", "T1c")

    def __init__(self, spatial_dims: int = 2, image_size: int | Sequence[int] = 32, seed: int = 0) -> None:
        super().__init__(spatial_dims, image_size, seed)
        self._down, self._across = (pixel_centers(n) for n in self.image_size[-2:])
        self._edge = 2.0 / min(self.image_size[-2:])
        points = (*_TEXTURE_POINTS, _BIAS_POINTS)
        self._spread = {n: (spread_matrix(n, self._down), spread_matrix(n, self._across).T) for n in points}

    def __call__(self, index: int, label: int | None = None) -> Phantom:
        """Draw phantom number `index`.

        Args:
            index: number of the phantom, from 0.
            label: draw with (1) or without (0) a tumour instead of the phantom's own label.

        Returns:
            image (2, *spatial), label and mask.

        Raises:
            ValueError: for a label that does not exist.
        """
        generator = self._generator(index)
        label, planes, healthy, grown = self._scene(generator, label)
        signal = paint(grown, paint(healthy, self._air(len(planes))))
        touched = np.zeros(signal.shape[1:], dtype=bool)
        for cover, _ in grown:
            touched |= cover > 0
        image = self._acquire(signal, planes, generator)
        shape = self.image_size
        return Phantom(image.reshape(2, *shape), label, touched.reshape(1, *shape))

    def signal(self, index: int, label: int | None = None) -> np.ndarray:
        """What phantom number `index` looks like to a perfect scanner.

        Args:
            index: number of the phantom, from 0.
            label: draw with (1) or without (0) a tumour instead of the phantom's own label.

        Returns:
            (2, *spatial) signal in [0, 1].

        Raises:
            ValueError: for a label that does not exist.
        """
        _, planes, healthy, grown = self._scene(self._generator(index), label)
        return paint(grown, paint(healthy, self._air(len(planes)))).reshape(2, *self.image_size)

    def level(self, index: int) -> float:
        """Height of the slice that phantom number `index` shows in 2D, from -1 (feet) to 1 (head)."""
        generator = self._generator(index)
        generator.random()
        return _level(generator.random())

    def _air(self, planes: int) -> np.ndarray:
        return np.zeros((2, planes, *self.image_size[-2:]), dtype=np.float32)

    def _scene(
        self, generator: np.random.Generator, label: int | None
    ) -> tuple[int, np.ndarray, list[Layer], list[Layer]]:
        """Label, heights of the planes, head and tumour; draws the same numbers whatever the label."""
        own, height, *shape = generator.random(2 + _HEAD_NUMBERS + _TUMOUR_NUMBERS).tolist()
        label, level = self._chosen_label(own, label), _level(height)
        planes = np.array([level], np.float32) if self.spatial_dims == 2 else pixel_centers(self.image_size[0])
        coarse, fine = (self._field(n, planes, generator) for n in _TEXTURE_POINTS)
        u = Uniforms(shape[:_HEAD_NUMBERS])
        frame = self._frame(u, planes, level)
        healthy, brain = head(frame, u, coarse, fine)
        shape_of_tumour = Uniforms(shape[_HEAD_NUMBERS:])
        grown = tumour(frame, shape_of_tumour, brain, level, coarse, fine) if label == 1 else []
        return label, planes, healthy, grown

    def _field(self, points: int, planes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """(planes, rows, columns) smooth random field of unit variance."""
        down, across = self._spread[points]
        noise = generator.standard_normal((points,) * 3, dtype=np.float32)
        return down @ np.tensordot(spread_matrix(points, planes), noise, axes=1) @ across

    def _frame(self, u: Uniforms, planes: np.ndarray, level: float) -> HeadFrame:
        """How the head lies: turned, tilted, off center, larger or smaller; at the slice's level it stays there."""
        z, y, x = np.meshgrid(planes - level, self._down, self._across, indexing="ij")
        x, y = x - u(-0.05, 0.05), y - u(-0.05, 0.05)
        x, y = _turn(x, y, u(-0.2, 0.2))
        y, z = _turn(y, z, u(-0.12, 0.12))
        x, z = _turn(x, z, u(-0.12, 0.12))
        scale = 1.0 / u(0.9, 1.08)
        return HeadFrame(scale * x, scale * y, scale * z + level, self._edge)

    def _acquire(self, signal: np.ndarray, planes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Contrast, bias field, noise, 8 bit: voxel by voxel, so that twins differ in the mask only."""
        u = Uniforms(generator.random(10).tolist())
        channels = []
        shared = self._field(_BIAS_POINTS, planes, generator)
        for clean in signal:
            own = self._field(_BIAS_POINTS, planes, generator)
            bias = np.exp(u(0.05, 0.2) * (0.8 * shared + 0.6 * own))
            image = u(0.75, 1.0) * bias * clean ** u(0.8, 1.25)
            noise = u(0.01, 0.035) * generator.standard_normal((2, *image.shape), dtype=np.float32)
            channels.append(np.hypot(image + noise[0], noise[1]))  # a scanner shows the magnitude
        return np.clip(255.0 * np.stack(channels) + 0.5, 0.0, 255.0).astype(np.uint8)


def _level(number: float) -> float:
    """Height of a slice: through the brain, not far from the ventricles."""
    return -0.05 + 0.5 * number


def _turn(a: np.ndarray, b: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * a + sin * b, cos * b - sin * a
