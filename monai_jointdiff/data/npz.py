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

"""Data sets in one `.npz` in the layout of MedMNIST."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.records import Found, Record
from monai_jointdiff.data.splits import canonical_part
from monai_jointdiff.data.volumes import SliceRule

__all__ = ["read_npz"]


def read_npz(path: str | Path, spatial_dims: int = 2, slices: SliceRule | None = None) -> Found:
    """Read `{train,val,test}_{images,labels}`, and patients or lesions, masks, and `class_names` where they are.

    Images are (N, rows, columns) or (N, rows, columns, channels) with 2 spatial axes, (N, depth, rows, columns) or
    (N, depth, rows, columns, channels) with 3; the channels may come second, too, if `channels` names them. Labels are
    (N,) or (N, 1) classes, or (N, K) entries of a multi-label problem; a part without labels is unlabelled. Masks are
    (N, *spatial), above 0 inside. `{part}_patients` (N,) say which images belong together (empty: none with
    it); without them `{part}_lesions` do. Arrays without a part (`images`, `labels`, ...) are divided later.

    Args:
        path: the file; pickled content is refused.
        spatial_dims: 2 or 3.
        slices: arrays of one axis more than 2D images with channels have are volumes with channels, which are cut by
            this rule; a slice has the class of its mask, without masks that of the volume. None: they are refused.

    Returns:
        images and labels as stored.

    Raises:
        ValueError: when the file cannot be read, holds no images, or an array does not have the right shape.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {key: content[key] for key in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"read_npz: cannot read '{path}': {error}") from error
    prefixes = [key[: -len("images")] for key in arrays if key == "images" or key.endswith("_images")]
    if not prefixes:
        raise ValueError(
            f"read_npz: '{path}' has no train_images, val_images, test_images or images; it has {', '.join(arrays)}."
        )
    names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    cut = slices is not None and spatial_dims == 2 and all(arrays[f"{prefix}images"].ndim == 5 for prefix in prefixes)
    channels = len(arrays["channels"]) if "channels" in arrays else None
    images = {
        prefix: _with_channels(arrays[f"{prefix}images"], f"{prefix}images", path, 3 if cut else spatial_dims, channels)
        for prefix in prefixes
    }
    shapes = {stack.shape[1:] for stack in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"read_npz: the parts of '{path}' have images of different shapes: {sorted(shapes)}.")
    records = [record for prefix in prefixes for record in _records(prefix, images[prefix], arrays, path)]
    rule = IntensityRule.for_array(images.get("train_", images[prefixes[0]]))
    if cut and slices is not None:
        records = [one for record in records for one in _cut(record, slices, rule)]
        if not records:
            raise ValueError(f"read_npz: the volumes of '{path}' have no slices with anything in them.")
        names = list(slices.classes) if any(record.mask is not None for record in records) else names
    image = records[0].image
    assert isinstance(image, np.ndarray)
    channel_names = [str(name) for name in arrays["channels"]] if "channels" in arrays else None
    return Found(records, image.shape[1:], len(image), rule, names, channel_names)


def _cut(record: Record, slices: SliceRule, rule: IntensityRule) -> list[Record]:
    """The slices of one volume, each an image of its own."""
    volume, mask = record.image, record.mask
    assert isinstance(volume, np.ndarray)
    assert mask is None or isinstance(mask, np.ndarray)
    indices = slices.indices(rule(volume))
    labels = dict.fromkeys(indices, record.label) if mask is None else slices.labels(mask[0] > 0, indices)
    return [
        replace(
            record,
            image=np.take(volume, index, axis=1 + slices.axis),
            label=label,
            name=f"{record.name}#slice_{index:03d}",
            patient=record.patient or record.name,
            mask=None if mask is None else np.take(mask, index, axis=1 + slices.axis),
        )
        for index, label in labels.items()
    ]


def _with_channels(stack: np.ndarray, key: str, path: Path, spatial_dims: int, channels: int | None) -> np.ndarray:
    """(N, C, *spatial) from how the file holds them."""
    if stack.ndim not in (spatial_dims + 1, spatial_dims + 2) or len(stack) == 0:
        axes = "depth, rows, columns" if spatial_dims == 3 else "rows, columns"
        raise ValueError(
            f"read_npz: {key} in '{path}' must be (N, {axes}) or (N, {axes}, channels) with spatial_dims "
            f"{spatial_dims}, got shape {stack.shape}."
        )
    if np.issubdtype(stack.dtype, np.floating) and not np.isfinite(stack).all():
        bad = int(np.flatnonzero(~np.isfinite(stack.reshape(len(stack), -1)).all(axis=1))[0])
        raise ValueError(f"read_npz: image {bad} of {key} in '{path}' holds NaN or infinite values.")
    if stack.ndim == spatial_dims + 1:
        return stack[:, None]
    second = channels is not None and stack.shape[1] == channels != stack.shape[-1]
    return stack if second else np.moveaxis(stack, -1, 1)


def _records(prefix: str, images: np.ndarray, arrays: dict[str, np.ndarray], path: Path) -> list[Record]:
    count = len(images)
    labels: list[Any] = [None] * count
    if f"{prefix}labels" in arrays:
        stored = arrays[f"{prefix}labels"]
        stored = stored[:, 0] if stored.ndim == 2 and stored.shape[1] == 1 else stored
        if len(stored) != count or stored.ndim not in (1, 2):
            raise ValueError(
                f"read_npz: {prefix}labels in '{path}' has shape {stored.shape}, but there are {count} images."
            )
        labels = stored.tolist()
    key = next((key for key in (f"{prefix}patients", f"{prefix}lesions") if key in arrays), None)
    patients = None if key is None else arrays[key]
    if patients is not None and patients.shape != (count,):
        raise ValueError(f"read_npz: {key} in '{path}' has shape {patients.shape}, but there are {count} images.")
    masks = arrays.get(f"{prefix}masks")
    if masks is not None and masks.shape != (count, *images.shape[2:]):
        raise ValueError(
            f"read_npz: {prefix}masks in '{path}' has shape {masks.shape}, but the images are "
            f"{(count, *images.shape[2:])}."
        )
    part = canonical_part(prefix[:-1]) if prefix else None
    return [
        Record(
            image=images[n],
            label=labels[n],
            name=f"{prefix[:-1] or 'images'}/{n:06d}",
            part=part,
            patient=None if patients is None else str(patients[n]) or None,
            mask=None if masks is None else masks[n][None],
        )
        for n in range(count)
    ]
