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

"""One way from a file or a stored array to the array that a network sees.

Canonical order of the axes is channel, (depth,) rows, columns. MONAI's readers give columns, rows(, depth).

====================  ==================================================================================================
JPEG, PNG, TIFF, BMP  `PILReader`, transposed to rows, columns; palettes and alpha are resolved
DICOM                 `ITKReader`; MONOCHROME1 is inverted (by ITK: air is dark then), a single slice loses its third
                      axis; a folder is read as one series
NIfTI                 `NibabelReader`
NRRD, MetaImage       `ITKReader`
====================  ==================================================================================================

Volumes whose header knows the patient are brought to axial order: depth from the feet to the head, rows from front to
back, columns from the patient's right to the left, as a radiologist sees axial slices. Pictures (2D) stay as they are
stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import ITKReader, NibabelReader, PILReader
from monai.data.image_reader import ImageReader
from monai.utils import optional_import

from monai_jointdiff.data.intensity import IntensityRule

__all__ = [
    "ImagePreprocessing",
    "has_image_suffix",
    "image_size_tuple",
    "is_dicom",
    "is_gray",
    "read_image",
    "resize_and_pad",
]

_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
_NIFTI = (".nii", ".nii.gz")
_ITK = (".dcm", ".dicom", ".nrrd", ".nhdr", ".mha", ".mhd")
_PIL_MODES = {
    "1": "L",
    "LA": "L",
    "La": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGBA": "RGB",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_COLORED = 16.0 / 255.0  # spread between channels, as a share of the range, from which a pixel counts as colored
_MARKINGS = 0.05  # share of colored pixels up to which an image is a gray one with markings burnt in


class _Stored(NamedTuple):
    """An image as it is stored, in canonical order."""

    array: np.ndarray  # (C, *spatial)
    spacing: tuple[float, ...]  # size of a pixel along each spatial axis; only ratios matter


def has_image_suffix(path: str | Path) -> bool:
    """Whether the name of a file says that it is an image of a kind that can be read."""
    return Path(path).name.lower().endswith((*_PICTURES, *_NIFTI, *_ITK))


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM by its content ("DICM" after a preamble of 128 bytes); its name need not say so."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_gray(image: np.ndarray) -> bool:
    """Whether a (3, *spatial) image is a gray one stored in three channels; a few colored markings do not count."""
    low, high = image.min(axis=0).astype(np.float64), image.max(axis=0).astype(np.float64)
    return bool(((high - low) > _COLORED * max(float(high.max()), 1.0)).mean() <= _MARKINGS)


def read_image(path: str | Path, spatial_dims: int = 2, in_channels: int | None = None) -> np.ndarray:
    """Read an image file in canonical order, values as stored.

    Args:
        path: the file; a folder is a DICOM series.
        spatial_dims: 2 or 3.
        in_channels: number of channels to return: gray images are repeated to 3, gray images stored as RGB become 1.
            None: as stored.

    Returns:
        (C, rows, columns) or (C, depth, rows, columns), dtype as stored.

    Raises:
        ValueError: when the file is missing, cannot be read, has other axes or channels, or holds NaN or infinite
            values; the message names the file.
    """
    return _read(path, spatial_dims, in_channels).array


def _read(path: str | Path, spatial_dims: int, in_channels: int | None) -> _Stored:
    path = Path(path)
    try:
        if not path.exists():
            raise ValueError("there is no such file")
        stored = _picture(path) if path.name.lower().endswith(_PICTURES) else _volume(path, spatial_dims)
        if stored.array.ndim != spatial_dims + 1:
            raise ValueError(
                f"it has {stored.array.ndim - 1} spatial axes {stored.array.shape[1:]}, spatial_dims is {spatial_dims}"
            )
        if stored.array.size == 0:
            raise ValueError(f"it has no pixels (shape {stored.array.shape})")
        if not np.isfinite(stored.array).all():
            raise ValueError("it holds NaN or infinite values")
        return stored._replace(array=_with_channels(stored.array, in_channels))
    except Exception as error:  # readers raise whatever they like, and mostly without the file's name
        raise ValueError(f"read_image: cannot use '{path}': {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") + "."


def _picture(path: Path) -> _Stored:
    """JPEG, PNG, TIFF, BMP: (columns, rows) or (columns, rows, channels) from PIL."""
    reader = PILReader(converter=lambda image: image.convert(_PIL_MODES.get(image.mode, image.mode)))
    array, _ = reader.get_data(reader.read(path))
    array = array[..., None] if array.ndim == 2 else array
    return _Stored(np.ascontiguousarray(array.transpose(2, 1, 0)), (1.0, 1.0))


def _volume(path: Path, spatial_dims: int) -> _Stored:
    """DICOM, NIfTI, NRRD, MetaImage: (columns, rows[, depth][, channels])."""
    reader: ImageReader = NibabelReader() if path.name.lower().endswith(_NIFTI) else ITKReader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array, meta = reader.get_data(reader.read(str(path)))
    array = _native(array)
    has_channels = isinstance(meta.get("original_channel_dim"), int)
    array = np.moveaxis(array, -1, 0) if has_channels else array[None]
    affine = np.asarray(meta["affine"], dtype=float)
    if spatial_dims == 3 and array.ndim == 4 and _knows_the_patient(meta):
        array, affine = _to_axial(array, affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[: array.ndim - 1]
    single = [axis for axis in range(1, array.ndim) if array.shape[axis] == 1]
    if spatial_dims == 2 and array.ndim == 4 and single:
        array, spacing = array.squeeze(single[-1]), np.delete(spacing, single[-1] - 1)
    array = array.transpose(0, *range(array.ndim - 1, 0, -1))
    return _Stored(
        np.ascontiguousarray(array), tuple(float(s) if np.isfinite(s) and s > 0 else 1.0 for s in spacing[::-1])
    )


def _native(array: np.ndarray) -> np.ndarray:
    """The machine's byte order, and no more than 32 bits for floating values."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _knows_the_patient(meta: Mapping[str, Any]) -> bool:
    """False for a NIfTI file whose header says that its axes mean nothing."""
    return "sform_code" not in meta or bool(int(meta["sform_code"]) > 0 or int(meta["qform_code"]) > 0)


def _to_axial(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn and flip (C, i, j, k) so that i runs to the patient's left, j to the back, k to the head."""
    orientations, _ = optional_import("nibabel.orientations")
    there = orientations.axcodes2ornt(("L", "P", "S"))
    turn = orientations.ornt_transform(orientations.io_orientation(affine), there)
    turned = orientations.apply_orientation(np.moveaxis(array, 0, -1), turn)
    return np.moveaxis(turned, -1, 0), affine @ orientations.inv_ornt_aff(turn, array.shape[1:])


def _with_channels(array: np.ndarray, in_channels: int | None) -> np.ndarray:
    """Bring (C, *spatial) to in_channels where that loses nothing."""
    channels = len(array)
    if in_channels is None or channels == in_channels:
        return array
    if channels == 1 and in_channels == 3:
        return np.repeat(array, 3, axis=0)
    if channels == 3 and in_channels == 1 and is_gray(array):
        if (array == array[:1]).all():
            return array[:1]
        luminance = np.tensordot(_LUMINANCE, array.astype(np.float64), axes=1)[None]
        return (luminance if np.issubdtype(array.dtype, np.floating) else np.rint(luminance)).astype(array.dtype)
    kind = "different (colored) channels" if channels == 3 and in_channels == 1 else "channels"
    raise ValueError(f"it has {channels} {kind}, but in_channels is {in_channels}")


class ImagePreprocessing:
    """From a file, or an array as stored, to the tensor that a network sees: intensities to [-1, 1], size, padding.

    The image is scaled to fit into `image_size` with its aspect kept (the physical one where the header gives the size
    of a pixel) and padded evenly with -1. Scaling down averages over the pixels that fall together (triangle filter).

    Args:
        spatial_dims: 2 or 3.
        image_size: rows, columns or depth, rows, columns; one number is used for all axes.
        in_channels: channels of the result.
        intensity: rule, or the arguments of one. None: :class:`IntensityRule`'s defaults.

    Raises:
        ValueError: when the sizes are not `spatial_dims` positive numbers.

    Example:

        .. code-block:: python

            description = json.load(open("models/model.json"))["data"]
            image = ImagePreprocessing.from_description(description)("patient.dcm")  # (C, rows, columns) in [-1, 1]
    """

    def __init__(
        self,
        spatial_dims: int,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        intensity: IntensityRule | Mapping[str, Any] | None = None,
    ) -> None:
        self.spatial_dims = spatial_dims
        self.image_size = image_size_tuple(image_size, spatial_dims)
        self.in_channels = in_channels
        rule = {} if intensity is None else intensity
        self.intensity = rule if isinstance(rule, IntensityRule) else IntensityRule.from_dict(rule)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> ImagePreprocessing:
        """The preprocessing of a trained model.

        Args:
            description: `ImageSource.description()`, as stored in `model.json`.

        Returns:
            the preprocessing, without the training data.
        """
        return cls(*(description[key] for key in ("spatial_dims", "image_size", "in_channels", "intensity")))

    def __call__(self, image: str | Path | np.ndarray) -> torch.Tensor:
        """Prepare one image.

        Args:
            image: a file, or a (C, *spatial) array with values as stored.

        Returns:
            (C, *image_size) float32 in [-1, 1].

        Raises:
            ValueError: when the image cannot be used; the message names the file.
        """
        if isinstance(image, np.ndarray):
            return self._prepare(_Stored(image, (1.0,) * self.spatial_dims))
        stored = _read(image, self.spatial_dims, self.in_channels)
        try:
            return self._prepare(stored)
        except ValueError as error:
            raise ValueError(f"ImagePreprocessing: cannot use '{image}': {_one_line(error)}") from error

    def _prepare(self, stored: _Stored) -> torch.Tensor:
        if stored.array.ndim != self.spatial_dims + 1 or len(stored.array) != self.in_channels:
            raise ValueError(
                f"ImagePreprocessing: needs ({self.in_channels}, {'depth, ' * (self.spatial_dims - 2)}rows, columns), "
                f"got shape {stored.array.shape}."
            )
        image = resize_and_pad(self.intensity(stored.array), self.image_size, stored.spacing)
        return torch.from_numpy(np.ascontiguousarray(image))


def image_size_tuple(image_size: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """One size per axis.

    Args:
        image_size: one number for all axes, or one per axis.
        spatial_dims: number of axes.

    Returns:
        the sizes of the axes.

    Raises:
        ValueError: when these are not `spatial_dims` positive whole numbers, or the axes not 2 or 3.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
    sizes = [image_size] * spatial_dims if isinstance(image_size, (int, np.integer)) else list(image_size)
    if len(sizes) != spatial_dims or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sizes):
        raise ValueError(f"image_size must be one positive whole number or {spatial_dims} of them, got {image_size!r}.")
    return tuple(int(n) for n in sizes)


def resize_and_pad(image: np.ndarray, size: Sequence[int], spacing: Sequence[float], fill: float = -1.0) -> np.ndarray:
    """Scale to fit into `size` with the aspect kept, and pad evenly on both sides.

    Args:
        image: (C, *spatial) float32.
        size: wanted spatial size.
        spacing: size of a pixel along each axis; only ratios matter.
        fill: value of the padding.

    Returns:
        (C, *size) float32.
    """
    extents = [n * s for n, s in zip(image.shape[1:], spacing, strict=True)]
    scale = min(n / extent for n, extent in zip(size, extents, strict=True))
    inner = [min(n, max(1, round(extent * scale))) for n, extent in zip(size, extents, strict=True)]
    for axis, count in enumerate(inner, start=1):
        if image.shape[axis] != count:
            weights = _triangle_filter(image.shape[axis], count)
            image = np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)
    before = [(n - count) // 2 for n, count in zip(size, inner, strict=True)]
    padding = [(b, n - count - b) for b, n, count in zip(before, size, inner, strict=True)]
    return np.pad(image, [(0, 0), *padding], constant_values=fill) if any(map(any, padding)) else image


@lru_cache(maxsize=64)
def _triangle_filter(given: int, wanted: int) -> np.ndarray:
    """(wanted, given) matrix of linear interpolation, widened to average when scaling down."""
    scale = given / wanted
    centers = (np.arange(wanted) + 0.5) * scale - 0.5
    weights = np.maximum(1.0 - np.abs(np.arange(given) - centers[:, None]) / max(scale, 1.0), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
