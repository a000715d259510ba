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

"""Removal of the uneven sensitivity of an MR receiver (N4) on SimpleITK."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, optional_import

__all__ = ["N4BiasFieldCorrection", "N4BiasFieldCorrectiond"]

sitk, _ = optional_import("SimpleITK")

_MASKS = ("otsu", "positive")
_OTSU_BINS = 200
_LEAST_SIZE = 16  # voxels that are left along an axis of the image on which the field is estimated


class N4BiasFieldCorrection(Transform):
    """Divide an MR image by its smooth bias field, found by N4 (Tustison et al., IEEE TMI 29(6):1310, 2010).

    Every channel is corrected for itself. The field is estimated on a shrunken image inside a mask and has mean 1
    (geometric) there, so that the overall brightness stays. What is 0 stays 0; an image with values below zero (such as
    one divided by its standard deviation after its mean was subtracted) is taken to have its zero at its minimum.

    Args:
        shrink_factor: the field is estimated on every n-th voxel along each axis (fewer where less than 16 would be
            left): 4 takes seconds for a head, 1 minutes.
        mask: where the field is estimated if no mask is given: `otsu` (brighter than Otsu's threshold of the channel),
            or `positive` (wherever there is a signal, for images whose background is 0).
        iterations: at most so many at each resolution of the field, from coarse to fine; their number is the number of
            resolutions.
        convergence_threshold: a resolution ends when the field changes by less; at ITK's 0.001 some end too early.

    Raises:
        ValueError: for a shrink factor or iterations below 1, or an unknown mask.

    Example:

        .. code-block:: python

            image = LoadImage(image_only=True, ensure_channel_first=True)("flair.nii.gz")
            corrected = N4BiasFieldCorrection(shrink_factor=4)(image)
    """

    backend = [TransformBackends.NUMPY]

    def __init__(
        self,
        shrink_factor: int = 4,
        mask: str = "otsu",
        iterations: Sequence[int] = (50, 50, 50, 50),
        convergence_threshold: float = 0.0001,
    ) -> None:
        name = type(self).__name__
        if shrink_factor < 1:
            raise ValueError(f"{name}: shrink_factor must be at least 1, got {shrink_factor}.")
        if mask not in _MASKS:
            raise ValueError(f"{name}: mask must be one of {', '.join(_MASKS)}, got {mask!r}.")
        if not iterations or min(iterations) < 1:
            raise ValueError(f"{name}: iterations must be positive numbers, got {iterations}.")
        self.shrink_factor = int(shrink_factor)
        self.mask = mask
        self.iterations = tuple(int(count) for count in iterations)
        self.convergence_threshold = float(convergence_threshold)

    def as_dict(self) -> dict[str, Any]:
        """The arguments by name, ready for JSON."""
        return {
            "shrink_factor": self.shrink_factor,
            "mask": self.mask,
            "iterations": list(self.iterations),
            "convergence_threshold": self.convergence_threshold,
        }

    def __call__(self, img: NdarrayOrTensor, mask: NdarrayOrTensor | None = None) -> NdarrayOrTensor:
        """Correct one image.

        Args:
            img: (C, *spatial), 2D or 3D; the spacing of a MetaTensor's affine is respected.
            mask: (1 or C, *spatial), above 0 where the field is to be estimated.

        Returns:
            (C, *spatial) float32 of the kind of `img`, with its meta data; a channel with nothing in the mask is as it
            was.

        Raises:
            ValueError: for other than 2 or 3 spatial axes, a mask of another shape, NaN or infinite values.
        """
        image = np.asarray(img.detach().cpu() if hasattr(img, "detach") else img, dtype=np.float32)
        if image.ndim not in (3, 4):
            raise ValueError(f"{type(self).__name__}: needs (C, *spatial) in 2D or 3D, got shape {image.shape}.")
        if not np.isfinite(image).all():
            raise ValueError(f"{type(self).__name__}: the image holds NaN or infinite values.")
        regions = self._regions(image, mask)
        spacing = _spacing(img, image.ndim - 1)
        corrected = np.stack([self._correct(*pair, spacing) for pair in zip(image, regions, strict=True)])
        return convert_to_dst_type(corrected, img, dtype=np.float32)[0]

    def _regions(self, image: np.ndarray, mask: NdarrayOrTensor | None) -> Sequence[np.ndarray | None]:
        """For each channel where its field is estimated; None where the channel itself decides."""
        if mask is None:
            return [None] * len(image)
        region = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask) > 0
        if region.shape[1:] != image.shape[1:] or len(region) not in (1, len(image)):
            raise ValueError(
                f"{type(self).__name__}: the mask of an image of shape {image.shape} must have that shape or one "
                f"channel, got {region.shape}."
            )
        return list(np.broadcast_to(region, image.shape))

    def _correct(self, channel: np.ndarray, region: np.ndarray | None, spacing: Sequence[float]) -> np.ndarray:
        """One channel (*spatial)."""
        zero = min(float(channel.min()), 0.0)
        signal = channel - np.float32(zero)
        if region is None:
            region = _above_otsu(signal) if self.mask == "otsu" else signal > 0
        region = region & (signal > 0)  # N4 takes logarithms
        if not region.any():
            return channel
        log_field = self._log_field(signal, region, spacing)
        return signal * np.exp(log_field[region].mean() - log_field) + np.float32(zero)

    def _log_field(self, signal: np.ndarray, region: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """(*spatial) natural logarithm of the bias field."""
        image, mask = sitk.GetImageFromArray(signal), sitk.GetImageFromArray(region.astype(np.uint8))
        for each in (image, mask):
            each.SetSpacing(list(spacing)[::-1])  # ITK counts axes from the last
        factors = [min(self.shrink_factor, max(1, size // _LEAST_SIZE)) for size in image.GetSize()]
        small, small_mask = sitk.Shrink(image, factors), sitk.Shrink(mask, factors)
        if not sitk.GetArrayViewFromImage(small_mask).any():  # a region between the voxels that are left
            small, small_mask = image, mask
        corrector = sitk.N4BiasFieldCorrectionImageFilter()
        corrector.SetMaximumNumberOfIterations(list(self.iterations))
        corrector.SetConvergenceThreshold(self.convergence_threshold)
        corrector.SetNumberOfThreads(1)  # loaders run several of these; and the result is that of any machine
        corrector.Execute(small, small_mask)
        return sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image))


class N4BiasFieldCorrectiond(MapTransform):
    """Dictionary version of :class:`N4BiasFieldCorrection`.

    Args:
        keys: of the images.
        mask_key: key of the mask where the fields are estimated; None: by `mask`.
        shrink_factor: as in :class:`N4BiasFieldCorrection`.
        mask: as there.
        iterations: as there.
        convergence_threshold: as there.
        allow_missing_keys: pass over keys that an item lacks.
    """

    backend = N4BiasFieldCorrection.backend

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str | None = None,
        shrink_factor: int = 4,
        mask: str = "otsu",
        iterations: Sequence[int] = (50, 50, 50, 50),
        convergence_threshold: float = 0.0001,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.correct = N4BiasFieldCorrection(shrink_factor, mask, iterations, convergence_threshold)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Correct the images of one item.

        Args:
            data: holds the images, and the mask if there is a key for it.

        Returns:
            a copy with the corrected images.
        """
        item = dict(data)
        mask = None if self.mask_key is None else item[self.mask_key]
        for key in self.key_iterator(item):
            item[key] = self.correct(item[key], mask)
        return item


def _above_otsu(signal: np.ndarray) -> np.ndarray:
    """(*spatial) bool, brighter than the threshold of Otsu."""
    chosen = sitk.OtsuThreshold(sitk.GetImageFromArray(signal), 0, 1, _OTSU_BINS)
    return sitk.GetArrayFromImage(chosen).astype(bool)


def _spacing(image: Any, spatial_dims: int) -> list[float]:
    """Size of a voxel along each axis; 1 where the image does not know."""
    if not isinstance(image, MetaTensor):
        return [1.0] * spatial_dims
    lengths = np.linalg.norm(np.asarray(image.affine, dtype=float)[:-1, :spatial_dims], axis=0)
    return [float(length) if np.isfinite(length) and length > 0 else 1.0 for length in lengths]
