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


"""The way back: from the array that a network gave to the pixels of the image as it is stored."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ITKReader, NibabelReader
from monai.data.image_reader import ImageReader
from monai.data.utils import to_affine_nd
from monai.utils import optional_import

from monai_jointdiff.data.reading import NIFTI_ENDINGS, PICTURE_ENDINGS, knows_the_patient, resize_and_pad
from monai_jointdiff.data.volumes import ImageFiles

__all__ = ["OriginalGrid", "nifti_bytes", "original_grid"]

nibabel, _ = optional_import("nibabel")
orientations, _ = optional_import("nibabel.orientations")
pil_image, _ = optional_import("PIL.Image")
pil_ops, _ = optional_import("PIL.ImageOps")

_AXIAL = (("L", "P", "S"), np.diag([-1.0, -1.0, 1.0, 1.0]))  # columns, rows, depth of canonical volumes


@dataclass(frozen=True)
class OriginalGrid:
    """The pixels of an image as it is stored, and how they lie in its canonical array.

    Args:
        shape: sizes of the canonical axes, (rows, columns) or (depth, rows, columns).
        spacing: size of a pixel along each of them; only ratios matter.
        axes: for each axis of the file, which canonical axis it is; None for an axis of a single slice, which
            canonical pictures do not have. Files begin with the columns.
        backward: for each axis of the file, whether the canonical axis runs against it.
        affine: (4, 4), from the indices of the file to millimeters toward right, front and head; None for pictures and
            arrays, which lie in no patient.
        oriented: False when the header says that the directions of the affine mean nothing.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axes: tuple[int | None, ...]
    backward: tuple[bool, ...]
    affine: np.ndarray | None = None
    oriented: bool = True

    @classmethod
    def of_array(cls, shape: Sequence[int]) -> OriginalGrid:
        """The grid of an array without a file: a picture, or a volume with pixels of one millimeter in axial order.

        Args:
            shape: (rows, columns) or (depth, rows, columns).

        Returns:
            the grid.
        """
        count = len(shape)
        affine = None if count == 2 else _AXIAL[1]
        axes = tuple(reversed(range(count)))
        return cls(tuple(shape), (1.0,) * count, axes, (False,) * count, affine)

    def cut(self, axis: int, index: int) -> OriginalGrid:
        """The grid of one slice of a volume, at its place in the patient.

        Args:
            axis: canonical axis across which the volume is cut.
            index: number of the slice along it.

        Returns:
            a grid of two canonical axes; the file keeps three, of which one has a single slice.
        """
        across = self.axes.index(axis)
        affine = None
        if self.affine is not None:
            affine = self.affine.copy()
            number = self.shape[axis] - 1 - index if self.backward[across] else index
            affine[:3, 3] += number * affine[:3, across]
        return replace(
            self,
            shape=tuple(n for k, n in enumerate(self.shape) if k != axis),
            spacing=tuple(s for k, s in enumerate(self.spacing) if k != axis),
            axes=tuple(None if k is None or k == axis else k - (k > axis) for k in self.axes),
            affine=affine,
        )

    def restore(self, image: np.ndarray) -> np.ndarray:
        """Undo the scaling and padding of :class:`~monai_jointdiff.data.ImagePreprocessing`.

        Args:
            image: (C, *model_size), from the network's grid.

        Returns:
            (C, *shape) float32 in canonical order: the padding is cut off, the rest scaled to the size of the file.

        Raises:
            ValueError: for another number of axes.
        """
        if image.ndim != len(self.shape) + 1:
            raise ValueError(
                f"OriginalGrid: an image with {len(self.shape)} spatial axes expected, got shape {image.shape}."
            )
        covered = resize_and_pad(np.ones((1, *self.shape), np.float32), image.shape[1:], self.spacing, fill=0.0)[0] > 0
        inner = image[(slice(None), *(_extent(covered, axis) for axis in range(covered.ndim)))]
        ratios = [wanted / given for wanted, given in zip(self.shape, inner.shape[1:], strict=True)]
        return resize_and_pad(np.asarray(inner, dtype=np.float32), self.shape, ratios)

    def in_file_order(self, image: np.ndarray) -> np.ndarray:
        """From canonical order to the axes of the file.

        Args:
            image: (C, *shape).

        Returns:
            the axes of the file, such as (columns, rows, slices), and channels last if there are several.
        """
        kept = [axis for axis in self.axes if axis is not None]
        turned = image.transpose(*(axis + 1 for axis in kept), 0)
        for position, axis in enumerate(self.axes):
            if axis is None:
                turned = np.expand_dims(turned, position)
            elif self.backward[position]:
                turned = np.flip(turned, position)
        return np.ascontiguousarray(turned[..., 0] if len(image) == 1 else turned)


def original_grid(image: str | Path | ImageFiles | np.ndarray, spatial_dims: int) -> OriginalGrid:
    """Where the pixels of an image lie that :func:`~monai_jointdiff.data.read_image` can read.

    Args:
        image: the file (a folder is a DICOM series), several files of one image or a slice of them, or a (C, *spatial)
            array as stored.
        spatial_dims: 2 or 3.

    Returns:
        its grid.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(image, np.ndarray):
        return OriginalGrid.of_array(image.shape[1:])
    if isinstance(image, ImageFiles):
        if image.slice_axis is None:
            return original_grid(image.paths[0], spatial_dims)
        return original_grid(image.paths[0], 3).cut(image.slice_axis, image.index)
    if not isinstance(image, (str, Path)):
        raise TypeError(f"original_grid: a file or an array expected, got {type(image).__name__}.")
    path = Path(image)
    if path.name.lower().endswith(PICTURE_ENDINGS):
        with pil_image.open(path) as picture:
            columns, rows = pil_ops.exif_transpose(picture).size  # upright, as it is read
        return OriginalGrid.of_array((rows, columns))
    return _grid_of_volume(path, spatial_dims)


def _grid_of_volume(path: Path, spatial_dims: int) -> OriginalGrid:
    """DICOM, NIfTI, NRRD, MetaImage, in the steps of :mod:`~monai_jointdiff.data.reading`."""
    reader: ImageReader = NibabelReader() if path.name.lower().endswith(NIFTI_ENDINGS) else ITKReader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array, meta = reader.get_data(reader.read(str(path)))
    sizes = array.shape[:-1] if isinstance(meta.get("original_channel_dim"), int) else array.shape
    affine = np.asarray(to_affine_nd(3, np.asarray(meta["affine"], dtype=float)))
    oriented = knows_the_patient(meta)
    place = [(axis, False) for axis in range(len(sizes))]  # of each axis of the file before the order is reversed
    if spatial_dims == 3 and len(sizes) == 3 and oriented:
        turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(_AXIAL[0]))
        place = [(int(axis), sign < 0) for axis, sign in turn]
    single = [axis for axis, size in enumerate(sizes) if size == 1]
    dropped = single[-1] if spatial_dims == 2 and len(sizes) == 3 and single else None
    used = [axis for axis in range(len(sizes)) if axis != dropped]
    order = sorted(used, key=lambda axis: -place[axis][0])  # canonical axes, slowest first
    spacing = [float(s) if np.isfinite(s) and s > 0 else 1.0 for s in np.linalg.norm(affine[:3, :3], axis=0)]
    return OriginalGrid(
        shape=tuple(sizes[axis] for axis in order),
        spacing=tuple(spacing[axis] for axis in order),
        axes=tuple(None if axis == dropped else order.index(axis) for axis in range(len(sizes))),
        backward=tuple(backward for _, backward in place),
        affine=affine,
        oriented=oriented,
    )


def nifti_bytes(image: np.ndarray, grid: OriginalGrid) -> bytes:
    """An image on its original grid as the content of a `.nii.gz` file, with the place in the patient.

    Args:
        image: (C, *shape) in canonical order, of :meth:`OriginalGrid.restore`.
        grid: with an affine.

    Returns:
        the content, the same for the same image.

    Raises:
        ValueError: for a grid without an affine.
        OptionalImportError: without nibabel.
    """
    if grid.affine is None:
        raise ValueError("nifti_bytes: a grid with an affine expected; pictures lie in no patient.")
    file: Any = nibabel.Nifti1Image(grid.in_file_order(image), grid.affine)
    if not grid.oriented:
        file.set_sform(None, 0)
        file.set_qform(None, 0)
        file.header.set_zooms([*np.linalg.norm(grid.affine[:3, :3], axis=0), *[1.0] * 3][: file.ndim])
    return gzip.compress(file.to_bytes(), mtime=0)


def _extent(covered: np.ndarray, axis: int) -> slice:
    """From the first to the last index along an axis at which anything is covered."""
    others = tuple(other for other in range(covered.ndim) if other != axis)
    found = np.flatnonzero(covered.any(axis=others))
    return slice(int(found[0]), int(found[-1]) + 1)
