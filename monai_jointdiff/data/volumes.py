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

"""Images in several files, and slices of volumes: how they are named, and which slices are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ImageFiles", "SliceRule"]

_DARK = -0.8  # of intensities in [-1, 1]: below a tenth of the range is background
_OPTIONS = {  # names of the rule's arguments among the options of a data set
    "slice_axis": "axis",
    "slice_every": "every",
    "min_foreground": "min_foreground",
    "min_mask_pixels": "min_mask_pixels",
    "mask_classes": "classes",
}


@dataclass(frozen=True)
class ImageFiles:
    """An image in one file, or in several of one channel each; or a slice of such a volume.

    Args:
        paths: the files in the order of the channels.
        slice_axis: axis of the volume (0: depth, 1: rows, 2: columns) across which it is cut. None: the whole image.
        index: number of the slice.
    """

    paths: tuple[Path, ...]
    slice_axis: int | None = None
    index: int = 0

    def __str__(self) -> str:
        """The files, and the slice as names have it."""
        files = " + ".join(map(str, self.paths))
        return files if self.slice_axis is None else f"{files}#slice_{self.index:03d}"


@dataclass(frozen=True)
class SliceRule:
    """Which slices of a volume are images of a 2D data set, and what they show.

    Args:
        axis: 0 gives axial slices, 1 coronal, 2 sagittal ones (of volumes whose header knows the patient).
        every: one slice in so many is taken.
        min_foreground: share of the largest slice's foreground that a slice must have; foreground is what is brighter
            than a tenth of the volume's range, in any channel.
        min_mask_pixels: pixels of the mask from which a slice is of the second class. Slices with fewer, but not none,
            are left out, since neither class is true.
        classes: names of the classes without and with something in the mask.

    Raises:
        ValueError: for numbers out of range.
    """

    axis: int = 0
    every: int = 1
    min_foreground: float = 0.25
    min_mask_pixels: int = 10
    classes: tuple[str, str] = ("absent", "present")

    def __post_init__(self) -> None:
        if self.axis not in (0, 1, 2):
            raise ValueError(f"SliceRule: slice_axis must be 0, 1 or 2, got {self.axis!r}.")
        for name, value in (("slice_every", self.every), ("min_mask_pixels", self.min_mask_pixels)):
            if value < 1:
                raise ValueError(f"SliceRule: {name} must be at least 1, got {value}.")
        if not 0 <= self.min_foreground <= 1:
            raise ValueError(f"SliceRule: min_foreground must be in [0, 1], got {self.min_foreground}.")
        if isinstance(self.classes, str) or len(self.classes) != 2:
            raise ValueError(f"SliceRule: mask_classes must be two names, got {self.classes!r}.")
        object.__setattr__(self, "classes", tuple(self.classes))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> SliceRule | None:
        """The rule of a data set or of a trained model.

        Args:
            options: those of :func:`~monai_jointdiff.data.open_source`; of the rule's, missing ones are the defaults.

        Returns:
            the rule; None where `slice_axis` is missing or None: volumes are not cut.

        Raises:
            ValueError: for numbers out of range.
        """
        if options.get("slice_axis") is None:
            return None
        return cls(**{name: options[option] for option, name in _OPTIONS.items() if option in options})

    def indices(self, volume: np.ndarray) -> list[int]:
        """The slices with enough in them.

        Args:
            volume: (C, depth, rows, columns) in [-1, 1].

        Returns:
            their numbers, increasing; none for a volume that is dark everywhere.
        """
        foreground = np.moveaxis(np.any(volume > _DARK, axis=0), self.axis, 0)
        counts = foreground.sum(axis=(1, 2))
        enough = (counts > 0) & (counts >= self.min_foreground * counts.max())
        return [index for index in np.flatnonzero(enough).tolist() if index % self.every == 0]

    def labels(self, mask: np.ndarray, indices: Sequence[int]) -> dict[int, int]:
        """The class of each slice by the mask.

        Args:
            mask: (depth, rows, columns) bool.
            indices: numbers of slices.

        Returns:
            0 or 1 for each slice whose class is certain.
        """
        counts = np.moveaxis(mask, self.axis, 0).sum(axis=(1, 2))
        return {
            index: int(counts[index] > 0)
            for index in indices
            if counts[index] == 0 or counts[index] >= self.min_mask_pixels
        }
