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

"""The scene behind the chest-like phantoms: anatomy and findings as slabs over the frontal plane.

A slab has a density over the frontal plane (rows, columns) and occupies the depths between two surfaces. Lengths are in
half fields: columns x, rows y and depths z all run from -1 to 1. Densities are relative to soft tissue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Frame", "Lung", "Slab", "Uniforms", "anatomy", "bump", "effusion", "opacity", "ramp"]

_AIR_IN_LUNG = -0.74  # density that a lung takes away from the tissue
_LEAST_FLUID = 0.06  # half thickness of the thickest place of an effusion, at least


class Slab(NamedTuple):
    """Density over the frontal plane, filling the depths between center - half and center + half."""

    density: np.ndarray | float  # (rows, columns)
    half: np.ndarray | float  # (rows, columns), half the thickness
    center: float = 0.0  # depth: -1 anterior, 1 posterior


class Frame(NamedTuple):
    """Where the pixels of the frontal plane lie in the body."""

    x: np.ndarray  # (rows, columns), across; the heart's apex lies at positive x
    y: np.ndarray  # (rows, columns), from head to foot
    edge: float  # width of soft edges


class Lung(NamedTuple):
    """One lung over the frontal plane."""

    side: float  # sign of its x
    across: np.ndarray  # (rows, columns), -1 to 1 from the inner to the outer edge
    half: np.ndarray  # (rows, columns), half thickness, before the diaphragm cuts it
    air: np.ndarray  # (rows, columns), 0 to 1: above the diaphragm and beside the heart
    center: float  # x of its middle
    hilum: tuple[float, float]  # x, y where the vessels enter
    base: float  # y of the top of the diaphragm's dome


class Uniforms:
    """Numbers from [0, 1) in the order in which they are asked for.

    Args:
        numbers: enough of them.
    """

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers: Iterator[float] = iter(numbers)

    def __call__(self, low: float, high: float) -> float:
        """The next number, from [low, high)."""
        return low + (high - low) * next(self._numbers)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return next(self._numbers) < probability


def ramp(value: np.ndarray, width: float) -> np.ndarray:
    """A soft step.

    Args:
        value: where it stands, 0 at the middle of the step.
        width: of the step.

    Returns:
        0 below -width/2, 1 above width/2, linear between.
    """
    return np.clip(value * (1.0 / width) + 0.5, 0.0, 1.0)


def _dome(squared_radius: np.ndarray) -> np.ndarray:
    """Height of the unit ball over its equator: sqrt(1 - r^2), 0 outside."""
    return np.sqrt(np.maximum(1.0 - squared_radius, 0.0))


def bump(distance: np.ndarray) -> np.ndarray:
    """A smooth bell with compact support.

    Args:
        distance: from its middle, in units of its radius.

    Returns:
        (1 - d^2)^2 inside |d| < 1, 0 outside.
    """
    return np.square(np.maximum(1.0 - np.square(distance), 0.0))


def _ellipse(frame: Frame, center: tuple[float, float], axes: tuple[float, float], turn: float = 0.0) -> np.ndarray:
    """Squared radius in units of a turned ellipse: below 1 inside."""
    dx, dy = frame.x - center[0], frame.y - center[1]
    cos, sin = np.cos(turn), np.sin(turn)
    return np.square((cos * dx + sin * dy) / axes[0]) + np.square((cos * dy - sin * dx) / axes[1])


def anatomy(frame: Frame, u: Uniforms, coarse: np.ndarray, fine: np.ndarray) -> tuple[list[Slab], list[Lung]]:
    """A chest without finding.

    Args:
        frame: pixels of the frontal plane.
        u: numbers that shape this chest.
        coarse: (rows, columns) smooth random field of unit variance.
        fine: (rows, columns) the same with smaller grain.

    Returns:
        the slabs, and the two lungs, in which findings are placed.
    """
    heart = _heart(frame, u)
    body, width = _body(frame, u)
    lungs = [_lung(frame, u, side, heart) for side in (-1.0, 1.0)]
    slabs = [body, *(Slab(_AIR_IN_LUNG * lung.air, lung.half) for lung in lungs)]
    for lung in lungs:
        slabs.extend(_vessels(frame, u, lung, coarse, fine))
    slabs.extend(_bones(frame, u, width))
    slabs.extend(_soft_shadows(frame, u, lungs, heart))
    slabs.extend(_foreign(frame, u))
    return slabs, lungs


def _body(frame: Frame, u: Uniforms) -> tuple[Slab, np.ndarray]:
    """Trunk with neck and shoulders: an elliptic cylinder whose width depends on the row."""
    neck, trunk, depth, slope = u(0.2, 0.3), u(0.88, 1.08), u(0.55, 0.68), u(0.4, 0.6)
    top = u(-1.05, -0.85)
    shoulder = ramp(frame.y - top - slope / 2, slope)
    width = neck + (trunk - neck) * np.sqrt(shoulder)
    half = depth * (0.75 + 0.25 * shoulder) * _dome(np.square(frame.x / width)) ** 0.8
    return Slab(1.0, half), width


def _heart(frame: Frame, u: Uniforms) -> np.ndarray:
    """Where heart, aortic arch and mediastinum displace the lungs, 0 to 1."""
    size, x, y, turn = u(0.85, 1.25), u(0.07, 0.16), u(0.26, 0.36), u(0.35, 0.8)
    arch_x, arch_y, arch = u(0.06, 0.12), u(-0.38, -0.28), u(0.09, 0.13)
    column = u(0.1, 0.16)
    sharp = 2.0 * frame.edge
    heart = ramp(1.0 - _ellipse(frame, (x, y), (0.33 * size, 0.24 * size), turn), 4.0 * sharp)
    knob = ramp(1.0 - _ellipse(frame, (arch_x, arch_y), (arch, arch)), 10.0 * sharp)
    middle = ramp(column + 0.06 * frame.y - np.abs(frame.x), sharp)
    return np.maximum(np.maximum(heart, knob), middle)


def _lung(frame: Frame, u: Uniforms, side: float, heart: np.ndarray) -> Lung:
    """A lung: an ellipsoid with its apex leaning inward, cut by the dome of the diaphragm and by the heart."""
    across, along, thick = u(0.28, 0.34), u(0.62, 0.74), u(0.4, 0.5)
    center, middle, lean = side * u(0.41, 0.46), u(-0.1, 0.0), u(0.08, 0.14)
    base, dome = u(0.36, 0.56) + (0.04 if side > 0 else 0.0), u(0.1, 0.26)
    v = (frame.y - middle) / along
    width = across * (1.0 + 0.2 * np.clip(v, -1.0, 1.0))
    signed = side * (frame.x - center - side * lean * v) / width
    half = thick * _dome(np.square(signed) + np.square(np.square(v))) ** 0.7
    diaphragm = base + dome * np.square(signed + 0.3)
    air = ramp(diaphragm - frame.y, 1.5 * frame.edge) * (1.0 - 0.85 * heart)
    return Lung(side, signed, half, air, center, (side * u(0.19, 0.25), u(-0.08, 0.04)), base)


def _vessels(frame: Frame, u: Uniforms, lung: Lung, coarse: np.ndarray, fine: np.ndarray) -> list[Slab]:
    """Hilum, and vessels that thin out with the distance from it; lung markings everywhere."""
    distance = np.sqrt(_ellipse(frame, lung.hilum, (0.42, 0.6)))
    strength, markings = u(0.25, 0.6), u(0.02, 0.1)
    branches = np.maximum(1.0 - 1.3 * np.abs(fine), 0.0) * np.maximum(1.0 - distance, 0.0)
    root = bump(np.sqrt(_ellipse(frame, lung.hilum, (u(0.1, 0.15), u(0.16, 0.24)), lung.side * 0.3)))
    inside = lung.air * np.minimum(8.0 * lung.half, 1.0)
    return [
        Slab(strength * inside * (branches + root * (0.75 + 0.25 * fine)), 0.22),
        Slab(markings * inside * coarse, 0.3, 0.05),
    ]


def _bones(frame: Frame, u: Uniforms, width: np.ndarray) -> list[Slab]:
    """Spine, posterior and anterior ribs, clavicles."""
    away = np.abs(frame.x)
    spacing, phase, strength = u(0.15, 0.19), u(0.0, 1.0), u(0.5, 1.2)
    inside = ramp(0.9 * width - away, 0.12) * ramp(frame.y + 0.8, 0.2)
    wave = np.cos((2 * np.pi / spacing) * (frame.y - u(0.15, 0.45) * away) + 2 * np.pi * phase)
    posterior = np.maximum(wave - 0.15, 0.0) * inside * ramp(0.62 - frame.y, 0.2)
    wave = np.cos((2 * np.pi / (1.15 * spacing)) * (frame.y + u(0.5, 0.8) * away) + 2 * np.pi * u(0.0, 1.0))
    anterior = np.maximum(wave - 0.3, 0.0) * inside * ramp(away - 0.28, 0.15) * ramp(0.4 - frame.y, 0.3)
    vertebrae = 0.75 + 0.25 * np.cos((2 * np.pi / u(0.13, 0.17)) * frame.y)
    spine = ramp(u(0.07, 0.1) - away, 2.0 * frame.edge) * vertebrae
    height, rise = u(-0.62, -0.5), u(0.05, 0.25)
    line = (frame.y - height + rise * away) / 0.045
    clavicle = bump(line / max(1.0, 20.0 * frame.edge)) * ramp(0.8 - away, 0.1) * ramp(away - 0.06, 0.06)
    return [
        Slab(strength * posterior, 0.07, 0.42),
        Slab(0.6 * strength * anterior, 0.07, -0.42),
        Slab(u(0.6, 1.1) * spine, 0.14, 0.3),
        Slab(u(0.8, 1.3) * clavicle, 0.06, -0.3),
    ]


def _soft_shadows(frame: Frame, u: Uniforms, lungs: Sequence[Lung], heart: np.ndarray) -> list[Slab]:
    """Trachea, breast shadows, gas under the diaphragm."""
    trachea = ramp(u(0.045, 0.065) - np.abs(frame.x - u(-0.03, 0.03)), 1.5 * frame.edge) * ramp(-0.28 - frame.y, 0.1)
    slabs = [Slab(-0.6 * trachea, 0.1), Slab(0.25 * heart, 0.2, -0.1)]
    breasts, height, radius = u(0.0, 0.5) if u.chance(0.5) else 0.0, u(0.15, 0.4), u(0.25, 0.36)
    for lung in lungs:
        shadow = bump(np.sqrt(_ellipse(frame, (1.1 * lung.center, height), (radius, 0.9 * radius))))
        slabs.append(Slab(breasts * np.sqrt(shadow), 0.12, -0.62))
    gas, offset = u(0.3, 0.8) if u.chance(0.4) else 0.0, u(0.18, 0.26)
    bubble = _dome(_ellipse(frame, (u(0.28, 0.45), lungs[1].base + offset), (u(0.08, 0.14), u(0.06, 0.09))))
    slabs.append(Slab(-gas, 0.25 * bubble, -0.2))
    return slabs


def _foreign(frame: Frame, u: Uniforms) -> list[Slab]:
    """Lead lines over the chest and a side marker in an upper corner."""
    slope, offset, bend = u(-0.9, 0.9), u(-0.5, 0.5), u(-0.6, 0.6)
    line = (frame.x - offset - slope * frame.y - bend * np.square(frame.y)) / max(0.02, 1.2 * frame.edge / 2)
    lead = (u(0.15, 0.4) if u.chance(0.2) else 0.0) * bump(line)
    corner = (u(0.8, 0.9) * (1.0 if u.chance(0.5) else -1.0), u(-0.9, -0.75))
    marker = (1.0 if u.chance(0.4) else 0.0) * ramp(1.0 - _ellipse(frame, corner, (0.06, 0.07)), 1.0)
    return [Slab(lead, 0.15, -0.75), Slab(marker, 0.4, -0.5)]


def opacity(frame: Frame, u: Uniforms, lungs: Sequence[Lung], coarse: np.ndarray) -> list[Slab]:
    """A soft irregular blob inside one lung, such as a consolidation.

    Args:
        frame: pixels of the frontal plane.
        u: numbers that shape the finding.
        lungs: the two lungs.
        coarse: (rows, columns) random field that makes the density uneven.

    Returns:
        the slabs that are added to the chest.
    """
    lung = lungs[int(u(0.0, 2.0))]
    across, y, radius = u(-0.45, 0.5), u(-0.42, 0.26), u(0.17, 0.28)
    center = (lung.center + lung.side * across * 0.3, y)
    dx, dy = frame.x - center[0], frame.y - center[1]
    angle = np.arctan2(dy, dx)
    outline = 1.0 + u(0.05, 0.22) * np.cos(2 * angle + u(0.0, 6.3)) + u(0.03, 0.15) * np.cos(3 * angle + u(0.0, 6.3))
    outline += u(0.0, 0.1) * np.cos(5 * angle + u(0.0, 6.3))
    squared = (np.square(dx) + np.square(dy)) / np.square(radius * outline)
    strength = u(0.6, 0.95) * (1.0 + 0.12 * np.clip(coarse, -2.0, 2.0))
    half = np.minimum(radius * _dome(squared) ** 1.5, lung.half)
    return [Slab(strength * lung.air, half, u(-0.1, 0.1))]


def effusion(frame: Frame, u: Uniforms, lungs: Sequence[Lung], coarse: np.ndarray) -> list[Slab]:
    """Fluid at the bottom of one lung, its level rising toward the chest wall (meniscus).

    Args:
        frame: pixels of the frontal plane.
        u: numbers that shape the finding.
        lungs: the two lungs.
        coarse: (rows, columns) random field that makes the density uneven.

    Returns:
        the slabs that are added to the chest.
    """
    lung = lungs[int(u(0.0, 2.0))]
    height, rise, width = u(0.08, 0.36), u(0.12, 0.24), u(0.25, 0.5)
    level = lung.base + 0.1 - height - rise * np.exp((np.clip(lung.across, -1.0, 1.0) - 1.0) / width)
    fluid = ramp(frame.y - level, frame.edge) * lung.air
    while (fluid * lung.half).max() < _LEAST_FLUID and level.min() > -1.0:  # the lung ends above the level
        level -= 0.04
        fluid = ramp(frame.y - level, frame.edge) * lung.air
    return [Slab(-_AIR_IN_LUNG * u(0.8, 1.0) * (1.0 + 0.04 * np.clip(coarse, -2.0, 2.0)) * fluid, lung.half)]
