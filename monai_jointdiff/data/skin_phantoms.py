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

"""Skin phantoms in color: dermatoscopy of lesions whose outline is exactly known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monai_jointdiff.data.anatomy import Frame, Uniforms, ramp
from monai_jointdiff.data.phantoms import Phantom, Phantoms, pixel_centers, spread_matrix
from monai_jointdiff.data.skin_anatomy import LESIONS, Tissue, hairs, reflectance, skin

__all__ = ["SKIN_CLASSES", "SkinPhantoms"]

SKIN_CLASSES = tuple(LESIONS)

# Images of each class in HAM10000, and where the share of each ends in [0, 1).
_COUNTS = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
_ENDS = np.cumsum([_COUNTS[name] for name in SKIN_CLASSES]) / sum(_COUNTS.values())
_SKIN_NUMBERS = 96  # uniform numbers reserved for skin and hairs
_LESION_NUMBERS = 64  # and for the lesion
_TEXTURE_POINTS = (7, 20)  # control points per axis of the coarse and of the fine texture of skin
_LESION_POINTS = (9, 26)  # and of the patches and the grain of a lesion
_GOLDEN = (5**0.5 - 1) / 2


class SkinPhantoms(Phantoms):
    """Dermatoscopy-like phantoms of three channels (red, green, blue), with the seven classes of HAM10000.

    Every phantom has a lesion; no class is without. What tells the classes apart is form and structure:

    - `nv` (nevus): regular outline, one brown;
    - `mel` (melanoma): notched outline, several colors, asymmetric;
    - `bkl` (benign keratosis): sharp border, white cysts and dark plugs;
    - `bcc` (basal cell carcinoma): pearly, branching vessels, blue-gray nests;
    - `akiec` (actinic keratosis): fades out, white scales on pink;
    - `df` (dermatofibroma): white scar in the middle of a brown patch that fades out;
    - `vasc` (vascular lesion): round red to purple lacunae.

    Amounts of pigment and blood overlap between the classes. Nuisance: tone, gradient and texture of the skin, hairs;
    place, size and direction of the lesion; exposure, color cast, contrast, uneven light, vignette, noise. The classes
    are as frequent as in HAM10000 (10,015 images: Tschandl et al., Scientific Data 5, 180161, 2018), in every run of
    consecutive phantoms as exactly as a low-discrepancy sequence makes it: 144 hold every class.

    Args:
        spatial_dims: 2; a lesion is seen from above, there are no volumes of it.
        image_size: rows and columns, or one number for both.
        seed: seed of the whole set.

    Raises:
        ValueError: for other than 2 axes, sizes below 8, or a negative seed.

    Example:

        .. code-block:: python

            phantom = SkinPhantoms(image_size=64, seed=0)(17)
            print(SKIN_CLASSES[phantom.label], phantom.image.shape, phantom.mask.sum())
    """

    class_names = SKIN_CLASSES
    in_channels = 3

    def __init__(self, spatial_dims: int = 2, image_size: int | Sequence[int] = 32, seed: int = 0) -> None:
        super().__init__(spatial_dims, image_size, seed)
        if spatial_dims != 2:
            raise ValueError(f"SkinPhantoms: skin is drawn from above, spatial_dims must be 2, got {spatial_dims}.")
        down, across = (pixel_centers(n) for n in self.image_size)
        y, x = np.meshgrid(down, across, indexing="ij")
        self._frame = Frame(x, y, 2.0 / min(self.image_size))
        points = (*_TEXTURE_POINTS, *_LESION_POINTS)
        self._spread = [(spread_matrix(n, down), spread_matrix(n, across).T) for n in points]
        self._first = float(np.random.default_rng(seed).random())

    def __call__(self, index: int, label: int | None = None) -> Phantom:
        """Draw phantom number `index`.

        Args:
            index: number of the phantom, from 0.
            label: draw a lesion of this class instead of the phantom's own.

        Returns:
            image (3, rows, columns), label and mask of the lesion.

        Raises:
            ValueError: for a label that does not exist.
        """
        label = self._label(index, label)
        generator = self._generator(index)
        tissue, lesion, taken = self._scene(generator, label)
        image = self._photograph(reflectance(tissue.plus(lesion)) * (1.0 - taken), generator)
        return Phantom(image, label, lesion.anywhere()[None])

    def without_lesion(self, index: int) -> np.ndarray:
        """The picture of phantom number `index` before its lesion grew: the same outside of the mask.

        Args:
            index: number of the phantom, from 0.

        Returns:
            (3, rows, columns) uint8.
        """
        generator = self._generator(index)
        tissue, _, taken = self._scene(generator, 0)
        return self._photograph(reflectance(tissue) * (1.0 - taken), generator)

    def lesion(self, index: int, label: int | None = None) -> Tissue:
        """What the lesion of phantom number `index` adds to the skin.

        Args:
            index: number of the phantom, from 0.
            label: of this class instead of the phantom's own.

        Returns:
            amounts of what gives it its color, (rows, columns) each.

        Raises:
            ValueError: for a label that does not exist.
        """
        return self._scene(self._generator(index), self._label(index, label))[1]

    def label(self, index: int) -> int:
        """Label of phantom number `index`, without drawing it: multiples of the golden ratio fill [0, 1) evenly."""
        return int(np.searchsorted(_ENDS, (self._first + index * _GOLDEN) % 1.0, side="right"))

    def _label(self, index: int, label: int | None) -> int:
        """The label that is asked for; without one the phantom's own."""
        return self.label(index) if label is None else self._chosen_label(0.0, label)

    def _scene(self, generator: np.random.Generator, label: int) -> tuple[Tissue, Tissue, np.ndarray]:
        """Skin, what the lesion adds, and hairs; draws the same numbers whatever the label."""
        shape = generator.random(_SKIN_NUMBERS + _LESION_NUMBERS).tolist()
        coarse, fine, patches, grain = (
            down @ generator.standard_normal((down.shape[1], across.shape[0]), dtype=np.float32) @ across
            for down, across in self._spread
        )
        u = Uniforms(shape[:_SKIN_NUMBERS])
        healthy, taken = skin(self._frame, u, coarse, fine), hairs(self._frame, u)
        draw_lesion = LESIONS[self.class_names[label]]
        return healthy, draw_lesion(self._frame, Uniforms(shape[_SKIN_NUMBERS:]), patches, grain), taken

    def _photograph(self, scene: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Light, color cast, contrast, vignette, noise, 8 bit: pixel by pixel, so that a lesion changes no others."""
        u = Uniforms(generator.random(12).tolist())
        cast = np.array([u(0.94, 1.06), u(0.9, 1.1), u(0.9, 1.1)], dtype=np.float32)
        x, y = self._frame.x, self._frame.y
        light = u(0.82, 1.05) * (1.0 + u(-0.08, 0.08) * x + u(-0.08, 0.08) * y)
        corners = u(0.2, 0.6) if u.chance(0.4) else u(0.0, 0.1)
        light = light * (1.0 - corners * ramp(np.hypot(x, y) - u(1.0, 1.2), 0.6))
        image = cast[:, None, None] * light * scene ** u(0.85, 1.2)
        image = image + u(0.008, 0.025) * generator.standard_normal(scene.shape, dtype=np.float32)
        return np.clip(255.0 * image + 0.5, 0.0, 255.0).astype(np.uint8)
