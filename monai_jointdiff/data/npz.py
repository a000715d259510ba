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
from pathlib import Path
from typing import Any

import numpy as np

from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.records import Found, Record
from monai_jointdiff.data.splits import canonical_part

__all__ = ["read_npz"]


def read_npz(path: str | Path, spatial_dims: int = 2) -> Found:
    """Read `{train,val,test}_{images,labels}`, and `{part}_patients` and `class_names` where they are there.

    Images are (N, rows, columns) or (N, rows, columns, channels) with 2 spatial axes, (N, depth, rows, columns) or
    (N, depth, rows, columns, channels) with 3. Labels are (N,) or (N, 1) classes, or (N, K) entries of a multi-label
    problem; a part without labels is unlabelled.

    Args:
        path: the file; pickled content is refused.
        spatial_dims: 2 or 3.

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
    parts = [key[: -len("_images")] for key in arrays if key.endswith("_images")]
    if not parts:
        raise ValueError(
            f"read_npz: '{path}' has no train_images, val_images or test_images; it has {', '.join(arrays)}."
        )
    images = {part: _with_channels(arrays[f"{part}_images"], f"{part}_images", path, spatial_dims) for part in parts}
    shapes = {stack.shape[1:] for stack in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"read_npz: the parts of '{path}' have images of different shapes: {sorted(shapes)}.")
    records = [record for part in parts for record in _records(part, images[part], arrays, path)]
    in_channels, *size = next(iter(shapes))
    names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    first = images.get("train", images[parts[0]])
    return Found(records, size, in_channels, IntensityRule.for_array(first), names)


def _with_channels(stack: np.ndarray, key: str, path: Path, spatial_dims: int) -> np.ndarray:
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
    return stack[:, None] if stack.ndim == spatial_dims + 1 else np.moveaxis(stack, -1, 1)


def _records(part: str, images: np.ndarray, arrays: dict[str, np.ndarray], path: Path) -> list[Record]:
    count = len(images)
    labels: list[Any] = [None] * count
    if f"{part}_labels" in arrays:
        stored = arrays[f"{part}_labels"]
        stored = stored[:, 0] if stored.ndim == 2 and stored.shape[1] == 1 else stored
        if len(stored) != count or stored.ndim not in (1, 2):
            raise ValueError(
                f"read_npz: {part}_labels in '{path}' has shape {stored.shape}, but there are {count} images."
            )
        labels = stored.tolist()
    patients = arrays.get(f"{part}_patients")
    if patients is not None and patients.shape != (count,):
        raise ValueError(
            f"read_npz: {part}_patients in '{path}' has shape {patients.shape}, but there are {count} images."
        )
    return [
        Record(
            image=images[n],
            label=labels[n],
            name=f"{part}/{n:06d}",
            part=canonical_part(part),
            patient=None if patients is None else str(patients[n]),
        )
        for n in range(count)
    ]
