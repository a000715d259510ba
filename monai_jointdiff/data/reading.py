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
JPEG, PNG, TIFF, BMP  `PILReader`, upright by their EXIF orientation, transposed to rows, columns; palettes and alpha
                      are resolved
DICOM                 `ITKReader`; MONOCHROME1 is inverted (by ITK: air is dark then), a single slice loses its third
                      axis; a folder is one series, and in 3D a single slice is refused
NIfTI                 `NibabelReader`
NRRD, MetaImage       `ITKReader`
====================  ==================================================================================================

Volumes whose header knows the patient are brought to axial order: depth from the feet to the head, rows from front to
back, columns from the patient's right to the left, as a radiologist sees axial slices. Pictures (2D) stay as they are
stored. An image may lie in several files of one channel each, and a 2D image may be a slice of a volume
(:class:`~monai_jointdiff.data.volumes.ImageFiles`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from monai.data import ITKReader, MetaTensor, NibabelReader, PILReader, to_affine_nd
from monai.data.image_reader import ImageReader
from monai.utils import optional_import

from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.volumes import ImageFiles

__all__ = [
    "Correction",
    "ImagePreprocessing",
    "has_image_suffix",
    "image_size_tuple",
    "is_dicom",
    "is_dicom_slice",
    "is_gray",
    "named_or_is_dicom",
    "read_image",
    "read_volume",
    "resize_and_pad",
]

pil_ops, _ = optional_import("PIL.ImageOps")

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
NIFTI_ENDINGS = (".nii", ".nii.gz")
_DICOM = (".dcm", ".dicom")
_ITK = (*_DICOM, ".nrrd", ".nhdr", ".mha", ".mhd")
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
_APART = 0.5  # pixels by which two files of one image may lie apart
_SEVERAL_SERIES = "(?s).*contains more than one DICOM series"  # what MONAI says
_KEPT_VOLUMES = 2  # volumes that stay in memory, in each process, while slices are cut from them


class Correction(Protocol):
    """What is done to the values of an image, as stored, before the intensity rule.

    :class:`~monai_jointdiff.transforms.N4BiasFieldCorrection` is one.
    """

    def __call__(self, img: Any) -> Any:
        """From a MetaTensor (C, *spatial) to the corrected one."""

    def __hash__(self) -> int: ...

    def as_dict(self) -> dict[str, Any]:
        """The arguments it was made with."""


class _Stored(NamedTuple):
    """An image in canonical order."""

    array: np.ndarray  # (C, *spatial)
    affine: np.ndarray  # (4, 4), from (depth, row, column) or (row, column, 0) to mm toward right, front, head
    in_patient: bool = False  # whether the header knows the patient

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a pixel along each spatial axis; only ratios matter."""
        lengths = np.linalg.norm(self.affine[:3, : self.array.ndim - 1], axis=0)
        return tuple(float(s) if np.isfinite(s) and s > 0 else 1.0 for s in lengths)

    def slice(self, axis: int, index: int) -> _Stored:
        """The slice of a volume, in its place."""
        rest = [n for n in range(3) if n != axis]
        affine = self.affine[:, [*rest, axis, 3]]
        affine[:, 3] += index * self.affine[:, axis]
        return self._replace(array=np.take(self.array, index, axis=1 + axis), affine=affine)


def has_image_suffix(path: str | Path) -> bool:
    """Whether the name of a file says that it is an image of a kind that can be read."""
    return Path(path).name.lower().endswith((*PICTURE_ENDINGS, *NIFTI_ENDINGS, *_ITK))


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM by its content ("DICM" after a preamble of 128 bytes); its name need not say so."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def named_or_is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM by its name or, if that is of no other kind, by its content."""
    return str(path).lower().endswith(_DICOM) or (not has_image_suffix(path) and is_dicom(path))


def is_dicom_slice(path: str | Path) -> bool:
    """Whether a file is one slice: DICOM with a single frame. Only its header is read."""
    if not named_or_is_dicom(path):
        return False
    itk, _ = optional_import("itk")
    header = itk.GDCMImageIO.New(FileName=str(path))
    try:
        header.ReadImageInformation()
    except RuntimeError:  # no image; the check of all files names it
        return False
    return bool(header.GetDimensions(2) == 1)


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


def read_volume(files: ImageFiles) -> np.ndarray | None:
    """Read the volume that slices are to be cut from.

    Args:
        files: its files; if these are one picture (JPEG, PNG, ...), nothing is read.

    Returns:
        (C, depth, rows, columns) as stored; None if the image has no third axis, or only one slice along an axis.

    Raises:
        ValueError: when a file is missing or cannot be read, or the files do not belong together; the message names
            the file.
    """
    if str(files.paths[0]).lower().endswith(PICTURE_ENDINGS):
        return None
    array = _read_together(files.paths, None, None).array
    return array if array.ndim == 4 and min(array.shape[1:]) > 1 else None


def _read(path: str | Path, spatial_dims: int | None, in_channels: int | None) -> _Stored:
    path = Path(path)
    try:
        if not path.exists():
            raise ValueError("there is no such file")
        stored = _picture(path) if path.name.lower().endswith(PICTURE_ENDINGS) else _volume(path, spatial_dims)
        if spatial_dims is not None and stored.array.ndim != spatial_dims + 1:
            hint = "; slices are cut from volumes where slice_axis says so" if stored.array.ndim == 4 else ""
            raise ValueError(
                f"it has {stored.array.ndim - 1} spatial axes {stored.array.shape[1:]}, spatial_dims is {spatial_dims}"
                + hint
            )
        if spatial_dims == 3 and 1 in stored.array.shape[1:] and (path.is_dir() or named_or_is_dicom(path)):
            raise ValueError("it is a single DICOM slice, spatial_dims is 3; name the folder of the series")
        if stored.array.size == 0:
            raise ValueError(f"it has no pixels (shape {stored.array.shape})")
        if not np.isfinite(stored.array).all():
            raise ValueError("it holds NaN or infinite values")
        return stored._replace(array=_with_channels(stored.array, in_channels))
    except UserWarning as error:
        raise ValueError(
            f"read_image: cannot use '{path}': it holds more than one DICOM series; give each a folder of its own."
        ) from error
    except Exception as error:  # readers raise whatever they like, and mostly without the file's name
        raise ValueError(f"read_image: cannot use '{path}': {_one_line(error)}") from error


def _read_together(paths: Sequence[Path], spatial_dims: int | None, in_channels: int | None) -> _Stored:
    """An image in one file, or in several of one channel each."""
    if len(paths) == 1:
        return _read(paths[0], spatial_dims, in_channels)
    if in_channels not in (None, len(paths)):
        raise ValueError(
            f"read_image: {len(paths)} files ({paths[0]}, ...) make {len(paths)} channels, not {in_channels}."
        )
    channels = [_read(path, spatial_dims, 1) for path in paths]
    for path, channel in zip(paths[1:], channels[1:], strict=True):
        _check_same_place(path, channel, paths[0], channels[0])
    return channels[0]._replace(array=np.concatenate([channel.array for channel in channels]))


def _check_same_place(path: Path | str, stored: _Stored, other_path: Path | str, other: _Stored) -> None:
    """Refuse two files of one image that differ in their spatial size, or lie elsewhere in the patient."""
    shape, right = stored.array.shape[1:], other.array.shape[1:]
    if shape != right:
        raise ValueError(f"read_image: cannot use '{path}': its shape is {shape}, that of '{other_path}' is {right}.")
    if stored.in_patient and other.in_patient:
        apart = np.abs(stored.affine - other.affine)[:3]
        farthest = apart[:, : len(shape)] @ np.array(shape) + apart[:, 3]
        if (farthest > _APART * min(other.spacing)).any():
            raise ValueError(
                f"read_image: cannot use '{path}': its header places it up to {farthest.max():.3g} mm away from "
                f"'{other_path}'."
            )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") + "."


def _picture(path: Path) -> _Stored:
    """JPEG, PNG, TIFF, BMP: (columns, rows) or (columns, rows, channels) from PIL."""
    reader = PILReader(converter=_upright)
    array, _ = reader.get_data(reader.read(path))
    array = array[..., None] if array.ndim == 2 else array
    return _Stored(np.ascontiguousarray(array.transpose(2, 1, 0)), np.eye(4))


def _upright(image: Any) -> Any:
    """A PIL image as viewers show it, with a mode whose values are intensities."""
    return pil_ops.exif_transpose(image).convert(_PIL_MODES.get(image.mode, image.mode))


def _volume(path: Path, spatial_dims: int | None) -> _Stored:
    """DICOM, NIfTI, NRRD, MetaImage: (columns, rows[, depth][, channels])."""
    reader: ImageReader = NibabelReader() if path.name.lower().endswith(NIFTI_ENDINGS) else ITKReader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=_SEVERAL_SERIES)  # of which MONAI would take the first
        array, meta = reader.get_data(reader.read(str(path)))
    array = _native(array)
    has_channels = isinstance(meta.get("original_channel_dim"), int)
    array = np.moveaxis(array, -1, 0) if has_channels else array[None]
    affine = to_affine_nd(3, np.asarray(meta["affine"], dtype=float))
    in_patient = knows_the_patient(meta)
    if spatial_dims != 2 and array.ndim == 4 and in_patient:
        array, affine = _to_axial(array, affine)
    axes = list(range(array.ndim - 1))
    single = [axis for axis in axes if array.shape[1 + axis] == 1]
    if spatial_dims == 2 and array.ndim == 4 and single:
        array = array.squeeze(1 + single[-1])
        axes.remove(single[-1])
    order = [*reversed(axes), *(axis for axis in range(3) if axis not in axes), 3]
    array = array.transpose(0, *range(array.ndim - 1, 0, -1))
    return _Stored(np.ascontiguousarray(array), affine[:, order], in_patient)


def _native(array: np.ndarray) -> np.ndarray:
    """The machine's byte order, and no more than 32 bits for floating values."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def knows_the_patient(meta: Mapping[str, Any]) -> bool:
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
    A slice has the intensities of its volume; the last volumes that slices were cut from stay in memory.

    Args:
        spatial_dims: 2 or 3.
        image_size: rows, columns or depth, rows, columns; one number is used for all axes.
        in_channels: channels of the result.
        intensity: rule, or the arguments of one. None: :class:`IntensityRule`'s defaults.
        correction: done to the stored values first, of slices to the whole volume.

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
        correction: Correction | None = None,
    ) -> None:
        self.spatial_dims = spatial_dims
        self.image_size = image_size_tuple(image_size, spatial_dims)
        self.in_channels = in_channels
        rule = {} if intensity is None else intensity
        self.intensity = rule if isinstance(rule, IntensityRule) else IntensityRule.from_dict(rule)
        self.correction = correction

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], correction: Correction | None = None
    ) -> ImagePreprocessing:
        """The preprocessing of a trained model.

        Args:
            description: `ImageSource.description()`, as stored in `model.json`.
            correction: what the description calls `bias_correction`, if it has one.

        Returns:
            the preprocessing, without the training data.

        Raises:
            ValueError: when the model was trained on corrected images and there is no correction, or the reverse.
        """
        wanted = description.get("bias_correction")
        given = None if correction is None else correction.as_dict()
        if wanted != given:
            raise ValueError(
                f"ImagePreprocessing: the model was trained with bias_correction {wanted}, got correction {given}; "
                "engines.preprocessing_of_model makes the right one."
            )
        keys = ("spatial_dims", "image_size", "in_channels", "intensity")
        return cls(**{key: description[key] for key in keys}, correction=correction)

    def without_correction(self) -> ImagePreprocessing:
        """The same without the correction: enough to find out whether images can be read."""
        return ImagePreprocessing(self.spatial_dims, self.image_size, self.in_channels, self.intensity)

    def __call__(self, image: str | Path | ImageFiles | np.ndarray) -> torch.Tensor:
        """Prepare one image.

        Args:
            image: a file, several files, a slice of these, or a (C, *spatial) array with values as stored.

        Returns:
            (C, *image_size) float32 in [-1, 1]. From files it is a MetaTensor, whose affine (4, 4) takes (depth, row,
            column), or (row, column, 0) in 2D, to millimetres toward the patient's right, front and head; of pictures,
            to pixels of the file.

        Raises:
            ValueError: when the image cannot be used; the message names the file.
        """
        return self._fit(self._load(image), isinstance(image, np.ndarray))

    def with_mask(
        self, image: str | Path | ImageFiles | np.ndarray, mask: str | Path | ImageFiles | np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare one image and the mask drawn on it.

        Args:
            image: as in :meth:`__call__`.
            mask: files, or a (1, *spatial) array, above 0 inside, of the spatial shape of the image.

        Returns:
            the image, and the mask (1, *image_size) bool of the pixels of which it covers half.

        Raises:
            ValueError: when one of them cannot be used, or they do not belong together; the message names the file.
        """
        stored = self._load(image)
        if isinstance(mask, np.ndarray):
            drawn = _Stored(mask > 0, np.eye(4))
        else:
            drawn = _read_slice(_as_files(mask), self.spatial_dims, 1, None, None)
            drawn = drawn._replace(array=drawn.array > 0)
        named = [str(each) if not isinstance(each, np.ndarray) else "an array" for each in (mask, image)]
        _check_same_place(named[0], drawn, named[1], stored)
        covered = resize_and_pad(drawn.array.astype(np.float32), self.image_size, stored.spacing, fill=0.0)
        return self._fit(stored, isinstance(image, np.ndarray)), torch.from_numpy(covered >= 0.5)

    def _load(self, image: str | Path | ImageFiles | np.ndarray) -> _Stored:
        """The image with intensities in [-1, 1], in its own size."""
        if isinstance(image, np.ndarray):
            if image.ndim != self.spatial_dims + 1 or len(image) != self.in_channels:
                raise ValueError(
                    f"ImagePreprocessing: needs ({self.in_channels}, {'depth, ' * (self.spatial_dims - 2)}rows, "
                    f"columns), got shape {image.shape}."
                )
            return _scale(_Stored(image, np.eye(4)), self.intensity, self.correction)
        return _read_slice(_as_files(image), self.spatial_dims, self.in_channels, self.intensity, self.correction)

    def _fit(self, stored: _Stored, is_array: bool) -> torch.Tensor:
        image = torch.from_numpy(np.ascontiguousarray(resize_and_pad(stored.array, self.image_size, stored.spacing)))
        if is_array:
            return image
        grid = _grid(stored.array.shape[1:], self.image_size, stored.spacing)
        return MetaTensor(image, affine=torch.from_numpy(stored.affine @ grid))


def _as_files(image: str | Path | ImageFiles) -> ImageFiles:
    return image if isinstance(image, ImageFiles) else ImageFiles((Path(image),))


def _scale(stored: _Stored, intensity: IntensityRule | None, correction: Correction | None) -> _Stored:
    """Correct and scale the intensities of a whole image."""
    array = stored.array if correction is None else _corrected(stored, correction, intensity)
    return stored if intensity is None else stored._replace(array=intensity(array))


def _corrected(stored: _Stored, correction: Correction, intensity: IntensityRule | None) -> np.ndarray:
    """The corrected values, in the range that the rule knows for values stored like this."""
    image = MetaTensor(torch.from_numpy(stored.array.astype(np.float32)), affine=torch.from_numpy(stored.affine))
    array = correction(image).numpy()
    if stored.array.dtype == np.uint8:
        return np.clip(np.rint(array), 0, 255).astype(np.uint8)
    known = intensity is not None and intensity.float_range is not None
    return np.clip(array, stored.array.min(), stored.array.max()) if known else array


def _read_slice(
    files: ImageFiles,
    spatial_dims: int,
    in_channels: int | None,
    intensity: IntensityRule | None,
    correction: Correction | None,
) -> _Stored:
    """An image of files, or a slice of such a volume, with intensities in [-1, 1]; without a rule as stored."""
    axis = files.slice_axis
    if axis is None:
        return _scaled(files.paths, spatial_dims, in_channels, intensity, correction)
    changed = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in files.paths)
    volume = _scaled_volume(files.paths, changed, in_channels, intensity, correction)
    count = volume.array.shape[1 + axis]
    if not 0 <= files.index < count:
        raise ValueError(f"ImagePreprocessing: cannot use '{files}': it has {count} slices along axis {axis}.")
    return volume.slice(axis, files.index)


@lru_cache(maxsize=_KEPT_VOLUMES)
def _scaled_volume(
    paths: tuple[Path, ...],
    changed: tuple[int, ...],  # times, so that a file that was written anew is read anew
    in_channels: int | None,
    intensity: IntensityRule | None,
    correction: Correction | None,
) -> _Stored:
    return _scaled(paths, 3, in_channels, intensity, correction)


def _scaled(
    paths: tuple[Path, ...],
    spatial_dims: int,
    in_channels: int | None,
    intensity: IntensityRule | None,
    correction: Correction | None,
) -> _Stored:
    stored = _read_together(paths, spatial_dims, in_channels)
    try:
        return _scale(stored, intensity, correction)
    except ValueError as error:
        raise ValueError(f"ImagePreprocessing: cannot use '{ImageFiles(paths)}': {_one_line(error)}") from error


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
        raise ValueError(f"--spatial_dims must be 2 or 3, got {spatial_dims!r}.")
    sizes = list(image_size) if isinstance(image_size, Iterable) else [image_size] * spatial_dims
    if len(sizes) != spatial_dims or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sizes):
        raise ValueError(
            f"--image_size must be one positive whole number or {spatial_dims} of them, got {image_size!r}."
        )
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
    inner, before = _layout(image.shape[1:], size, spacing)
    for axis, count in enumerate(inner, start=1):
        if image.shape[axis] != count:
            weights = _triangle_filter(image.shape[axis], count)
            image = np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)
    padding = [(b, n - count - b) for b, n, count in zip(before, size, inner, strict=True)]
    return np.pad(image, [(0, 0), *padding], constant_values=fill) if any(map(any, padding)) else image


def _layout(given: Sequence[int], size: Sequence[int], spacing: Sequence[float]) -> tuple[list[int], list[int]]:
    """Size of the scaled image along each axis, and the padding before it."""
    extents = [n * s for n, s in zip(given, spacing, strict=True)]
    scale = min(n / extent for n, extent in zip(size, extents, strict=True))
    inner = [min(n, max(1, round(extent * scale))) for n, extent in zip(size, extents, strict=True)]
    return inner, [(n - count) // 2 for n, count in zip(size, inner, strict=True)]


def _grid(given: Sequence[int], size: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """(4, 4) from pixels of the fitted image to those of the given one, centers at whole numbers."""
    grid = np.eye(4)
    for axis, (n, inner, before) in enumerate(zip(given, *_layout(given, size, spacing), strict=True)):
        grid[axis, axis] = n / inner
        grid[axis, 3] = (0.5 - before) * n / inner - 0.5
    return grid


@lru_cache(maxsize=64)
def _triangle_filter(given: int, wanted: int) -> np.ndarray:
    """(wanted, given) matrix of linear interpolation, widened to average when scaling down."""
    scale = given / wanted
    centers = (np.arange(wanted) + 0.5) * scale - 0.5
    weights = np.maximum(1.0 - np.abs(np.arange(given) - centers[:, None]) / max(scale, 1.0), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
