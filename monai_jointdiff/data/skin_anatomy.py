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

"""The scene behind the skin phantoms: what light absorbs and scatters it, pixel by pixel.

Skin and lesion are amounts of four substances: melanin near the surface (brown), blood (red), melanin in the depth
(blue-gray), and keratin or scar tissue (white). Amounts add up; what the camera sees follows from them by Beer's law.
Lengths are in half fields: columns x and rows y run from -1 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from monai_jointdiff.data.anatomy import Frame, Uniforms, bump, ramp

__all__ = ["LESIONS", "Tissue", "hairs", "reflectance", "skin"]

# Absorption of red, green and blue by a unit of each substance, so chosen that the colors are those of dermatoscopy.
_ABSORPTION = np.array([[0.4, 0.85, 1.15], [0.1, 0.95, 0.7], [1.0, 0.8, 0.45]], dtype=np.float32)
_WHITE = np.array([0.97, 0.92, 0.88], dtype=np.float32)


class Tissue(NamedTuple):
    """Amounts of what gives skin its color."""

    melanin: np.ndarray  # (rows, columns), from 0: brown
    blood: np.ndarray  # from 0: red
    deep: np.ndarray  # from 0: melanin in the depth, blue-gray
    white: np.ndarray  # 0 to 1: keratin, scars

    def plus(self, other: Tissue) -> Tissue:
        """Both together."""
        white = 1.0 - (1.0 - self.white) * (1.0 - other.white)
        return Tissue(self.melanin + other.melanin, self.blood + other.blood, self.deep + other.deep, white)

    def anywhere(self) -> np.ndarray:
        """(rows, columns) bool, where there is any of it."""
        return np.any([amount > 0 for amount in self], axis=0)


class _Place(NamedTuple):
    """Where a lesion grows."""

    x: np.ndarray  # (rows, columns), from its middle, in units of its size, turned
    y: np.ndarray
    radius: np.ndarray  # (rows, columns), 0 in its middle, 1 on its outline
    size: float  # length of one unit
    edge: float  # width of one pixel

    def cover(self, softness: float) -> np.ndarray:
        """1 inside, 0 outside; `softness` is the width of the border, at least a pixel."""
        return ramp((1.0 - self.radius) * self.size, max(softness, self.edge))

    def spot(self, x: float, y: float, radius: float) -> np.ndarray:
        """A smooth spot, as small as pixels allow; all in units of the size."""
        radius = max(radius, 1.3 * self.edge / self.size)
        return bump(np.hypot(self.x - x, self.y - y) / radius)


def reflectance(tissue: Tissue) -> np.ndarray:
    """What tissue looks like in white light: Beer's law for what absorbs, and white in front of it.

    Args:
        tissue: amounts (rows, columns).

    Returns:
        (3, rows, columns) red, green and blue in [0, 1].
    """
    through = np.exp(-np.einsum("sc,syx->cyx", _ABSORPTION, np.stack(tissue[:3])))
    return through + tissue.white * (_WHITE[:, None, None] - through)


def skin(frame: Frame, u: Uniforms, coarse: np.ndarray, fine: np.ndarray) -> Tissue:
    """Skin without lesion: its tone, a gradient, freckled and fine texture.

    Args:
        frame: pixels.
        u: numbers that shape this skin.
        coarse: (rows, columns) smooth random field of unit variance.
        fine: (rows, columns) the same with smaller grain.

    Returns:
        the skin.
    """
    slope_x, slope_y = u(-0.08, 0.08), u(-0.08, 0.08)
    melanin = u(0.03, 0.3) + slope_x * frame.x + slope_y * frame.y + u(0.01, 0.05) * coarse + u(0.01, 0.04) * fine
    blood = u(0.12, 0.45) + u(-0.08, 0.08) * frame.x + u(-0.08, 0.08) * frame.y + u(0.01, 0.06) * coarse[::-1]
    deep = np.full_like(melanin, u(0.0, 0.12))
    return Tissue(np.maximum(melanin, 0.0), np.maximum(blood, 0.0), deep, np.zeros_like(melanin))


def hairs(frame: Frame, u: Uniforms) -> np.ndarray:
    """Hairs above everything, in some pictures.

    Args:
        frame: pixels.
        u: numbers that shape them.

    Returns:
        (rows, columns), 0 to 1: how much of the light they take away.
    """
    load, dark, direction = u(0.2, 1.0) if u.chance(0.3) else 0.0, u(0.45, 0.85), u(0.0, math.pi)
    taken = np.zeros_like(frame.x)
    for _ in range(6):
        turn, offset, bend = direction + u(-0.5, 0.5), u(-0.9, 0.9), u(-0.3, 0.3)
        along = math.cos(turn) * frame.x + math.sin(turn) * frame.y
        across = math.cos(turn) * frame.y - math.sin(turn) * frame.x - offset - bend * np.square(along)
        strand = dark * bump(across / max(0.02, 0.7 * frame.edge)) * ramp(0.9 - np.abs(along - u(-0.8, 0.8)), 0.2)
        taken = np.maximum(taken, strand if u.chance(load) else 0.0)
    return taken


def _place(frame: Frame, u: Uniforms, roughness: np.ndarray) -> _Place:
    """A turned ellipse near the middle of the picture, its outline bent by `roughness` (rows, columns)."""
    dx, dy = frame.x - u(-0.28, 0.28), frame.y - u(-0.28, 0.28)
    size, aspect, turn = u(0.34, 0.66), u(0.7, 1.0), u(0.0, math.pi)
    cos, sin = math.cos(turn) / size, math.sin(turn) / size
    x, y = cos * dx + sin * dy, (cos * dy - sin * dx) / aspect
    return _Place(x, y, np.hypot(x, y) + np.clip(roughness, -0.6, 0.6), size, frame.edge)


def _within(u: Uniforms, reach: float) -> tuple[float, float]:
    """A point of a disk."""
    angle, distance = u(0.0, 2 * math.pi), reach * math.sqrt(u(0.0, 1.0))
    return distance * math.cos(angle), distance * math.sin(angle)


def _nevus(frame: Frame, u: Uniforms, patches: np.ndarray, grain: np.ndarray) -> Tissue:
    """Regular: an even outline, one brown that is darkest in the middle."""
    place = _place(frame, u, u(0.0, 0.06) * patches)
    cover = place.cover(u(0.08, 0.25))
    melanin = u(0.4, 1.6) * (0.85 + u(0.0, 0.5) * np.clip(1.0 - place.radius, 0.0, 1.0))
    network = 1.0 + u(0.03, 0.15) * np.clip(grain, -2.0, 2.0)
    return Tissue(melanin * network * cover, u(0.0, 0.6) * cover, u(0.0, 0.25) * cover, np.zeros_like(cover))


def _melanoma(frame: Frame, u: Uniforms, patches: np.ndarray, grain: np.ndarray) -> Tissue:
    """Irregular: a notched outline; light and dark brown, blue-gray and red side by side; one side unlike the other."""
    others = patches[::-1, ::-1]
    place = _place(frame, u, u(0.18, 0.32) * patches + u(0.04, 0.1) * grain)
    cover = place.cover(u(0.08, 0.25))
    side = 1.0 + u(0.2, 0.5) * np.clip(place.x, -1.0, 1.0)
    brown = u(0.5, 1.4) * (0.35 + 1.4 * ramp(patches - u(-0.5, 0.3), 0.8)) * side
    blue = u(0.3, 1.1) * ramp(others - u(0.1, 0.6), 0.8)
    red = u(0.0, 0.3) + u(0.0, 0.7) * ramp(-others - u(0.1, 0.6), 0.8)
    return Tissue(brown * cover, red * cover, blue * cover, np.zeros_like(cover))


def _keratosis(frame: Frame, u: Uniforms, patches: np.ndarray, grain: np.ndarray) -> Tissue:
    """Seborrheic keratosis: waxy brown with a sharp border, white cysts and dark plugs in it."""
    place = _place(frame, u, u(0.03, 0.12) * patches)
    cover = place.cover(0.0)
    melanin = u(0.35, 1.2) * (1.0 + 0.08 * np.clip(grain, -2.0, 2.0))
    cysts, plugs = np.zeros_like(cover), np.zeros_like(cover)
    for _ in range(5):
        cysts = np.maximum(cysts, u(0.5, 0.9) * place.spot(*_within(u, 0.8), u(0.1, 0.2)))
        plugs = np.maximum(plugs, u(0.8, 1.6) * place.spot(*_within(u, 0.8), u(0.1, 0.2)))
    return Tissue((melanin + plugs) * cover, u(0.05, 0.6) * cover, u(0.0, 0.2) * cover, cysts * cover)


def _carcinoma(frame: Frame, u: Uniforms, patches: np.ndarray, grain: np.ndarray) -> Tissue:
    """Basal cell carcinoma: pearly, with branching vessels (telangiectasia) and blue-gray nests at its rim."""
    place = _place(frame, u, u(0.03, 0.12) * patches)
    cover = place.cover(u(0.08, 0.25))
    pearl = u(0.15, 0.4) * (0.5 + 0.5 * np.clip(place.radius, 0.0, 1.0))
    vessels, nests = np.zeros_like(cover), np.zeros_like(cover)
    width = max(0.07, 0.75 * place.edge / place.size)
    for _ in range(5):
        turn, offset, bend, end = u(0.0, 2 * math.pi), u(-0.5, 0.5), u(-0.7, 0.7), u(-0.6, 0.3)
        along = math.cos(turn) * place.x + math.sin(turn) * place.y
        across = math.cos(turn) * place.y - math.sin(turn) * place.x - offset - bend * np.square(along)
        vessels = np.maximum(vessels, u(0.6, 1.8) * bump(across / width) * ramp(along - end, 0.2))
    for _ in range(3):
        angle = u(0.0, 2 * math.pi)
        nests += u(0.0, 1.4) * place.spot(0.75 * math.cos(angle), 0.75 * math.sin(angle), u(0.2, 0.35))
    melanin, blood = u(0.0, 0.9), u(0.1, 0.6)
    return Tissue(melanin * cover, (blood + vessels) * cover, nests * cover, pearl * (vessels < 0.1) * cover)


def _actinic(frame: Frame, u: Uniforms, patches: np.ndarray, grain: np.ndarray) -> Tissue:
    """Actinic keratosis, Bowen's disease: a pinkish patch that fades out, with white scales strewn over it."""
    place = _place(frame, u, u(0.1, 0.2) * patches)
    cover = place.cover(u(0.4, 0.7) * place.size)
    melanin = u(0.1, 1.0) * (1.0 + 0.3 * np.clip(patches[::-1], -2.0, 2.0))
    scales = u(0.4, 0.8) * ramp(grain - u(0.5, 0.9), 0.6)
    return Tissue(melanin * cover, u(0.3, 0.9) * cover, u(0.0, 0.15) * cover, scales * cover)


def _dermatofibroma(frame: Frame, u: Uniforms, patches: np.ndarray, grain: np.ndarray) -> Tissue:
    """Dermatofibroma: a white scar in the middle, a faint brown ring around it that fades out."""
    place = _place(frame, u, u(0.03, 0.12) * patches)
    cover = place.cover(u(0.3, 0.6) * place.size)
    scar = u(0.4, 0.8) * ramp(u(0.35, 0.5) - place.radius - 0.1 * patches[::-1], 0.35)
    melanin = u(0.2, 1.0) * (1.0 + 0.1 * np.clip(grain, -2.0, 2.0))
    return Tissue(melanin * cover, u(0.1, 0.6) * cover, u(0.0, 0.15) * cover, scar * cover)


def _vascular(frame: Frame, u: Uniforms, patches: np.ndarray, grain: np.ndarray) -> Tissue:
    """Vascular lesion: red to purple lacunae, round and close to each other, with pale walls between them."""
    place = _place(frame, u, u(0.0, 0.06) * patches)
    cover = place.cover(0.0)
    filled, start, purple = np.zeros_like(cover), u(0.0, 2 * math.pi), u(0.0, 0.7)
    for n in range(7):
        angle, distance, radius = start + n * math.pi / 3 + u(-0.25, 0.25), 0.62 if n < 6 else 0.0, u(0.22, 0.36)
        gap = np.hypot(place.x - distance * math.cos(angle), place.y - distance * math.sin(angle))
        filled = np.maximum(filled, u(0.7, 1.0) * ramp((radius - gap) * place.size, place.edge))
    blood = u(0.1, 0.4) + u(0.9, 2.2) * filled
    return Tissue(u(0.0, 0.5) * cover, blood * cover, purple * filled * cover, np.zeros_like(cover))


# By class: from pixels, numbers that shape the lesion, and two random fields (rows, columns) of unit variance, coarse
# patches and fine grain, to what the lesion adds to the skin.
LESIONS: dict[str, Callable[[Frame, Uniforms, np.ndarray, np.ndarray], Tissue]] = {
    "akiec": _actinic,
    "bcc": _carcinoma,
    "bkl": _keratosis,
    "df": _dermatofibroma,
    "mel": _melanoma,
    "nv": _nevus,
    "vasc": _vascular,
}
