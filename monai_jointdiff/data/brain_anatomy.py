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

"""The scene behind the brain phantoms: tissues as layers that are painted over each other, voxel by voxel.

A layer covers part of each voxel and has one signal per channel, FLAIR and T1 with contrast agent (T1c). Lengths are in
half fields: columns x toward the patient's left, rows y toward the back, planes z toward the head, all from -1 to 1.
Signals are relative to the brightest tissue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from monai_jointdiff.data.anatomy import Uniforms, bump, ramp

__all__ = ["Brain", "HeadFrame", "Layer", "head", "paint", "tumour"]

Signal = tuple[float, float]  # FLAIR, T1c


class Layer(NamedTuple):
    """A tissue: how much of each voxel it covers, and what it looks like."""

    cover: np.ndarray  # (planes, rows, columns), 0 to 1
    signal: Signal


class HeadFrame(NamedTuple):
    """Where the voxels lie in the head."""

    x: np.ndarray  # (planes, rows, columns), toward the patient's left
    y: np.ndarray  # toward the back
    z: np.ndarray  # toward the top
    edge: float  # width of soft edges


class Brain(NamedTuple):
    """Where tumours grow."""

    tissue: np.ndarray  # (planes, rows, columns), 0 to 1: gray and white matter
    axes: tuple[float, float, float]  # half axes of the brain along x, y, z


def paint(layers: Sequence[Layer], canvas: np.ndarray) -> np.ndarray:
    """Paint layers over a canvas, the last on top.

    Args:
        layers: tissues.
        canvas: (2, planes, rows, columns) what is already there.

    Returns:
        (2, planes, rows, columns) the signal of both channels.
    """
    signal = canvas.copy()
    for cover, values in layers:
        for channel, value in enumerate(values):
            signal[channel] += cover * (value - signal[channel])
    return signal


def _radius(frame: HeadFrame, center: Sequence[float], axes: Sequence[float], turn: float = 0.0) -> np.ndarray:
    """Distance from the center in units of an ellipsoid that is turned about z: below 1 inside."""
    dx, dy, dz = frame.x - center[0], frame.y - center[1], frame.z - center[2]
    cos, sin = math.cos(turn), math.sin(turn)
    across, along = cos * dx + sin * dy, cos * dy - sin * dx
    return np.sqrt(np.square(across / axes[0]) + np.square(along / axes[1]) + np.square(dz / axes[2]))


def _inside(frame: HeadFrame, radius: np.ndarray, size: float) -> np.ndarray:
    """1 where a radius is below 1, 0 above, soft over an edge; `size` is the length of one unit."""
    return ramp((1.0 - radius) * size, frame.edge)


def head(frame: HeadFrame, u: Uniforms, coarse: np.ndarray, fine: np.ndarray) -> tuple[list[Layer], Brain]:
    """A head without tumour.

    Args:
        frame: voxels.
        u: numbers that shape this head.
        coarse: (planes, rows, columns) smooth random field of unit variance.
        fine: (planes, rows, columns) the same with smaller grain.

    Returns:
        the layers from the scalp inward, and the brain, in which tumours are placed.
    """
    axes = (u(0.76, 0.84), u(0.88, 0.96), u(0.98, 1.08))
    depth = (1.0 - _radius(frame, (0.0, 0.0, -0.1), axes)) * axes[0]  # below the skin
    scalp, skull, fluid, cortex = u(0.05, 0.08), u(0.05, 0.07), u(0.015, 0.04), u(0.08, 0.12)
    below = [scalp, scalp + skull, scalp + skull + fluid]
    folds = u(0.02, 0.05) * np.clip(fine, -2.0, 2.0)
    tissue = ramp(depth - below[2] + np.minimum(folds, 0.0), frame.edge)
    white = ramp(depth - below[2] - cortex + 1.5 * folds, 1.5 * frame.edge)
    gray_signal = (u(0.44, 0.52), u(0.34, 0.42))
    layers = [
        Layer(ramp(depth, frame.edge), (u(0.35, 0.8), u(0.55, 0.85))),
        Layer(ramp(depth - below[0], frame.edge), (0.06, 0.08)),
        Layer(ramp(depth - below[1], frame.edge), _fluid(u)),
        Layer(tissue, gray_signal),
        Layer(white, (u(0.34, 0.4), u(0.46, 0.54))),
        Layer(0.25 * white * np.clip(coarse, 0.0, 2.0), gray_signal),
    ]
    brain = tuple(half - below[2] for half in axes)
    layers.extend(_deep_gray(frame, u, gray_signal))
    layers.append(_fissure(frame, u, tissue))
    ventricles = _ventricles(frame, u)
    layers.append(Layer(ventricles * tissue, _fluid(u)))
    layers.extend(_choroid_plexus(frame, u))
    layers.extend(_spots(frame, u, white * (1.0 - ventricles)))
    layers.extend(_vessels(frame, u, brain, ramp(depth - below[0], frame.edge)))
    return layers, Brain(tissue * (1.0 - ventricles), (brain[0], brain[1], brain[2]))


def _fluid(u: Uniforms) -> Signal:
    """Cerebrospinal fluid: suppressed in FLAIR, dark in T1."""
    return u(0.06, 0.14), u(0.1, 0.18)


def _deep_gray(frame: HeadFrame, u: Uniforms, signal: Signal) -> list[Layer]:
    """Basal ganglia and thalamus of both sides."""
    x, y, size = u(0.2, 0.26), u(-0.08, 0.04), u(0.85, 1.15)
    axes = (0.1 * size, 0.2 * size, 0.22 * size)
    sides = [_radius(frame, (side * x, y, 0.0), axes, 0.2 * side) for side in (-1.0, 1.0)]
    return [Layer(0.8 * _inside(frame, radius, axes[0]), signal) for radius in sides]


def _fissure(frame: HeadFrame, u: Uniforms, tissue: np.ndarray) -> Layer:
    """Fluid between the hemispheres, in front of and behind the middle, and above it."""
    bend, wide = u(-0.04, 0.04), u(0.01, 0.025)
    middle = frame.x - bend * frame.y
    apart = np.maximum(ramp(np.abs(frame.y) - 0.4, 0.1), ramp(frame.z - 0.45, 0.1))
    return Layer(0.7 * ramp(wide - np.abs(middle), 1.5 * frame.edge) * apart * tissue, _fluid(u))


def _ventricles(frame: HeadFrame, u: Uniforms) -> np.ndarray:
    """How much of each voxel the lateral ventricles and the third one cover."""
    size, turn, third = u(0.7, 1.4), u(0.15, 0.35), u(0.012, 0.03)
    cover = _inside(frame, _radius(frame, (0.0, 0.1, -0.12), (third, 0.14, 0.14)), third)
    for side in (-1.0, 1.0):
        own = size * u(0.85, 1.15)
        front = _radius(frame, (side * 0.1, -0.14, 0.14), (0.06 * own, 0.22, 0.17 * own), turn * side)
        back = _radius(frame, (side * 0.16, 0.2, 0.12), (0.065 * own, 0.22, 0.15 * own), -turn * side)
        cover = np.maximum(cover, _inside(frame, np.minimum(front, back), 0.065 * own))
    return cover


def _choroid_plexus(frame: HeadFrame, u: Uniforms) -> list[Layer]:
    """Takes up contrast agent in both lateral ventricles: bright in T1c, and no tumour."""
    signal, radius = (0.4, u(0.6, 0.9)), u(0.03, 0.05)
    places = [(side * u(0.14, 0.19), u(0.16, 0.28), u(0.05, 0.2)) for side in (-1.0, 1.0)]
    return [Layer(u(0.4, 1.0) * bump(_radius(frame, place, [1.6 * radius] * 3)), signal) for place in places]


def _spots(frame: HeadFrame, u: Uniforms, white: np.ndarray) -> list[Layer]:
    """White matter hyperintensities, as age brings them: bright in FLAIR, and no tumour."""
    load = u(0.0, 1.0)
    layers = []
    for _ in range(5):
        side = 1.0 if u.chance(0.5) else -1.0
        place = (side * u(0.12, 0.42), u(-0.5, 0.5), u(0.0, 0.5))
        axes = (u(0.04, 0.1), u(0.04, 0.1), u(0.06, 0.14))
        strength = u(0.5, 1.0) if u.chance(load) else 0.0
        cover = strength * bump(_radius(frame, place, axes, u(-1.5, 1.5))) * white
        layers.append(Layer(cover, (u(0.7, 0.95), 0.42)))
    return layers


def _vessels(frame: HeadFrame, u: Uniforms, brain: Sequence[float], inside: np.ndarray) -> list[Layer]:
    """Sagittal sinus and vessels at the surface, upright tubes: bright in T1c, and no tumour."""
    shrink = np.sqrt(np.maximum(1.0 - np.square((frame.z + 0.1) / brain[2]), 0.04))  # the brain narrows to the top
    angles = [0.5 * math.pi, *(u(0.0, 2 * math.pi) for _ in range(5))]
    layers = []
    for n, angle in enumerate(angles):
        radius = u(0.05, 0.07) if n == 0 else u(0.03, 0.06)
        reach = 1.0 if n == 0 else u(0.8, 0.98)
        dx = frame.x - reach * brain[0] * math.cos(angle) * shrink
        dy = frame.y - reach * brain[1] * math.sin(angle) * shrink
        cover = u(0.5, 1.0) * bump(np.sqrt(np.square(dx) + np.square(dy)) / radius) * inside
        layers.append(Layer(cover, (0.12, 0.9)))
    return layers


def tumour(
    frame: HeadFrame, u: Uniforms, brain: Brain, level: float, coarse: np.ndarray, fine: np.ndarray
) -> list[Layer]:
    """An irregular tumour: swelling (oedema) bright in FLAIR, a rim bright in T1c, a dark middle.

    Args:
        frame: voxels.
        u: numbers that shape the tumour.
        brain: it grows in gray and white matter only.
        level: z near which its middle lies.
        coarse: (planes, rows, columns) random field that bends the outline of the oedema.
        fine: (planes, rows, columns) random field that bends the rim.

    Returns:
        the layers that are painted over the head; nothing else of the head changes.
    """
    z = level + u(-0.05, 0.05)
    width = math.sqrt(max(1.0 - ((z + 0.1) / brain.axes[2]) ** 2, 0.1))
    angle, reach, radius = u(0.0, 2 * math.pi), math.sqrt(u(0.08, 0.5)), u(0.2, 0.34)
    center = (
        width * brain.axes[0] * reach * math.cos(angle),
        width * brain.axes[1] * reach * math.sin(angle),
        z,
    )
    stretch = (u(0.8, 1.25), u(0.8, 1.25), u(0.8, 1.25))
    turn = u(0.0, math.pi)
    axes = [radius * factor for factor in stretch]
    around = _radius(frame, center, axes, turn) + u(0.1, 0.25) * np.clip(coarse, -2.0, 2.0)
    oedema = _inside(frame, around, radius)
    core, thick = u(0.45, 0.65), u(0.35, 0.55)
    shifted = [middle + 0.2 * radius * u(-1.0, 1.0) for middle in center]
    within = _radius(frame, shifted, [core * axis for axis in axes], turn) + u(0.05, 0.15) * np.clip(fine, -2.0, 2.0)
    enhancing = _inside(frame, within, core * radius)
    dead = _inside(frame, within / (1.0 - thick), core * (1.0 - thick) * radius)
    return [
        Layer(u(0.75, 1.0) * oedema * brain.tissue, (u(0.68, 0.95), u(0.3, 0.38))),
        Layer(u(0.8, 1.0) * enhancing * brain.tissue, (u(0.5, 0.7), u(0.72, 1.0))),
        Layer(u(0.8, 1.0) * dead * brain.tissue, (u(0.2, 0.45), u(0.12, 0.25))),
    ]
