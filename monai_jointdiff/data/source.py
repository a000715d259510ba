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

"""Where images come from, chosen by one option: phantoms, an `.npz`, a folder of files, a MedMNIST set by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, Transform

from monai_jointdiff.data.folder import read_folder
from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.labels import encode_labels
from monai_jointdiff.data.medmnist import download_medmnist
from monai_jointdiff.data.npz import read_npz
from monai_jointdiff.data.phantoms import CHEST_CLASSES, ChestPhantoms
from monai_jointdiff.data.reading import ImagePreprocessing, image_size_tuple
from monai_jointdiff.data.splits import complete_parts

__all__ = ["ImageSource", "PrepareItem", "open_source"]

PARTS = ("train", "val", "test")
PHANTOM_COUNTS = (6000, 300, 600)
_MEDMNIST = "medmnist:"


class PrepareItem(Transform):
    """From an item of a part to what a network is given.

    Args:
        prepare: from a file or an array to a tensor (C, *spatial) in [-1, 1].
        phantoms: draws the images whose item holds a number.
    """

    def __init__(self, prepare: ImagePreprocessing, phantoms: ChestPhantoms | None = None) -> None:
        self.prepare = prepare
        self.phantoms = phantoms

    def __call__(self, item: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Prepare one item.

        Args:
            item: `image` (a file, an array, or the number of a phantom), `label`, `name`.

        Returns:
            `image` (C, *spatial) float32, `label` (an integer, or K entries), `name`; for phantoms also `mask`,
            (1, *spatial) bool, where the finding is.

        Raises:
            ValueError: when the image cannot be used; the message names it.
        """
        prepared = dict(item)
        if isinstance(item["label"], Sequence):
            prepared["label"] = torch.tensor(item["label"], dtype=torch.float32)
        else:
            prepared["label"] = torch.tensor(int(item["label"]))
        if self.phantoms is None or not isinstance(item["image"], int):
            prepared["image"] = self.prepare(item["image"])
            return prepared
        phantom = self.phantoms(item["image"])
        prepared["image"], prepared["mask"] = self.prepare(phantom.image), torch.from_numpy(phantom.mask)
        return prepared


@dataclass(frozen=True)
class ImageSource:
    """A data set: its parts as lists of dictionaries, and how an item becomes a tensor.

    Args:
        name: what it is, without absolute paths.
        items: for `train`, `val` and `test` a list of items with `image`, `label` and `name`.
        class_names: names in the order of the labels.
        multi_label: an image may have several labels.
        prepare: reads, scales and pads.
        phantoms: draws the images, if they are phantoms.
        opened_with: seed and columns, on which the division into parts depends.
    """

    name: str
    items: Mapping[str, list[dict[Hashable, Any]]]
    class_names: list[str]
    multi_label: bool
    prepare: ImagePreprocessing
    phantoms: ChestPhantoms | None = None
    opened_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return self.prepare.spatial_dims

    @property
    def image_size(self) -> tuple[int, ...]:
        """Rows, columns, or depth, rows, columns."""
        return self.prepare.image_size

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.prepare.in_channels

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    def part(self, name: str) -> list[dict[Hashable, Any]]:
        """Items of one part.

        Args:
            name: `train`, `val` or `test`.

        Returns:
            dictionaries with `image` (a path, an array, or a number), `label` and `name`.

        Raises:
            ValueError: for another name, or a part without images.
        """
        if name not in PARTS:
            raise ValueError(f"ImageSource: {name!r} is no part; right are {', '.join(PARTS)}.")
        if not self.items[name]:
            counts = ", ".join(f"{part} {len(self.items[part])}" for part in PARTS)
            raise ValueError(f"ImageSource: the {name} part of {self.name} has no images ({counts}).")
        return self.items[name]

    def preprocessing(self) -> Compose:
        """From an item to `image` (C, *image_size) in [-1, 1], `label` and `name`."""
        return Compose([PrepareItem(self.prepare, self.phantoms)])

    def description(self) -> dict[str, Any]:
        """What inference has to know about the data, ready for JSON: classes, size, channels, intensity rule."""
        return {
            "class_names": list(self.class_names),
            "multi_label": self.multi_label,
            "spatial_dims": self.spatial_dims,
            "image_size": list(self.image_size),
            "in_channels": self.in_channels,
            "intensity": self.prepare.intensity.as_dict(),
            "opened_with": dict(self.opened_with),
        }

    def summary(self) -> str:
        """Where the data come from, and how many images each part and class has."""
        size = " x ".join(map(str, self.image_size))
        channels = f"{self.in_channels} channel{'s' * (self.in_channels > 1)}"
        lines = [f"data: {self.name}, {size}, {channels}, {self.prepare.intensity}"]
        for part in PARTS:
            counts = self._counts(part)
            words = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
            lines.append(f"  {part}: {len(self.items[part])} images" + (f" ({words})" if words else ""))
        return "\n".join(lines)

    def _counts(self, part: str) -> dict[str, int]:
        """Images of each class, and without a label."""
        labels = [item["label"] for item in self.items[part]]
        if self.multi_label:
            counts = {name: sum(label[k] == 1 for label in labels) for k, name in enumerate(self.class_names)}
            return {**counts, "unlabelled": sum(all(entry == -1 for entry in label) for label in labels)}
        found = Counter(labels)
        return {**{name: found[k] for k, name in enumerate(self.class_names)}, "unlabelled": found[-1]}

    def preflight(self) -> None:
        """Read every image once.

        Raises:
            ValueError: naming all images that cannot be used, each with the reason.
        """
        bad = []
        if self.phantoms is None:
            for item in (item for part in PARTS for item in self.items[part]):
                try:
                    self.prepare(item["image"])
                except ValueError as error:
                    bad.append(f"  {item['name']}: {error}")
        if bad:
            raise ValueError(f"ImageSource: {len(bad)} images of {self.name} cannot be used:\n" + "\n".join(bad))

    def with_label_list(self, label_list: str | Path | None) -> ImageSource:
        """Keep the labels of the training images on a list; all others train without.

        Args:
            label_list: text file with one image name a line; None keeps all labels.

        Returns:
            a source with these labels.

        Raises:
            ValueError: when the file cannot be read, is empty, or names an image that is not in the training part.
        """
        if label_list is None:
            return self
        try:
            lines = Path(label_list).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"ImageSource: cannot read the label list {label_list}: {error}") from error
        listed = {line.strip() for line in lines} - {""}
        unknown = sorted(listed - {item["name"] for item in self.items["train"]})
        if unknown or not listed:
            raise ValueError(
                f"ImageSource: the label list {label_list} "
                + (f"names {unknown[0]!r}, which is no training image." if unknown else "is empty.")
            )
        missing: Any = [-1.0] * self.num_classes if self.multi_label else -1
        train = [item if item["name"] in listed else {**item, "label": missing} for item in self.items["train"]]
        return replace(self, items={**self.items, "train": train})


def open_source(
    dataset_dir: str | int | Path | None = None,
    *,
    spatial_dims: int = 2,
    image_size: int | Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    image_column: str = "file",
    label_column: str | Sequence[str] = "label",
    split_column: str = "split",
    patient_column: str = "patient",
    label_list: str | Path | None = None,
    in_channels: int | None = None,
    intensity: IntensityRule | Mapping[str, Any] | None = None,
    multi_label: bool | None = None,
    phantom_counts: Sequence[int] = PHANTOM_COUNTS,
) -> ImageSource:
    """Open a data set; what `dataset_dir` is decides the reader.

    Args:
        dataset_dir: None: phantoms; an `.npz` in MedMNIST's layout; a folder of image files; `medmnist:NAME`. A number
            is taken as the name of a folder.
        spatial_dims: 2 or 3.
        image_size: one number or one per axis. None: that of the `.npz`, 32 for phantoms, 64 (2D) or 32 (3D) for files.
        class_names: names in the order of the labels. None: from the data.
        seed: of the phantoms, and of parts that are drawn.
        image_column: column of the CSV with the file, relative to the folder.
        label_column: column with the label, or several (0/1 each) for multi-label data.
        split_column: column with the part, if there is one.
        patient_column: column with the patient, if there is one; no patient is in two parts.
        label_list: text file naming the training images whose labels are used.
        in_channels: channels of the result. None: from the data.
        intensity: rule, or its arguments. None: from the data.
        multi_label: an image may have several labels, even if none of these has. None: from the data.
        phantom_counts: phantoms in train, val and test.

    Returns:
        the data set.

    Raises:
        ValueError: when it cannot be read, or its content is not as it should be.
    """
    if dataset_dir is None:
        source = _phantoms(spatial_dims, 32 if image_size is None else image_size, class_names, seed, phantom_counts)
        return source.with_label_list(label_list)
    text = str(dataset_dir)
    path = download_medmnist(text[len(_MEDMNIST) :], image_size) if text.startswith(_MEDMNIST) else Path(text)
    if path.is_dir():
        columns = (image_column, label_column, split_column, patient_column)
        found = read_folder(path, spatial_dims, *columns)
    elif path.is_file() and path.suffix == ".npz":
        found = read_npz(path, spatial_dims)
    elif path.exists():
        raise ValueError(f"open_source: {path} is neither a folder nor an .npz file.")
    else:
        raise ValueError(
            f"open_source: there is no {path}; --dataset_dir takes a folder, an .npz file or medmnist:NAME."
        )
    records = found.records
    encoded = encode_labels(
        [record.label for record in records],
        found.class_names if class_names is None else class_names,
        [record.name for record in records],
        multi_label,
    )
    groups = [record.patient for record in records] if any(record.patient for record in records) else None
    keys = [tuple(label) if isinstance(label, list) else label for label in encoded.labels]
    parts = complete_parts([record.part for record in records], keys, groups, seed)
    items: dict[str, list[dict[Hashable, Any]]] = {part: [] for part in PARTS}
    for record, label, part in zip(records, encoded.labels, parts, strict=True):
        items[part].append({"image": record.image, "label": label, "name": record.name})
    prepare = ImagePreprocessing(
        spatial_dims,
        image_size_tuple(found.image_size if image_size is None else image_size, spatial_dims),
        found.in_channels if in_channels is None else in_channels,
        found.intensity if intensity is None else intensity,
    )
    name = text if text.startswith(_MEDMNIST) else path.resolve().name
    opened_with = {
        "seed": seed,
        "image_column": image_column,
        "label_column": label_column if isinstance(label_column, str) else list(label_column),
        "split_column": split_column,
        "patient_column": patient_column,
    }
    source = ImageSource(name, items, encoded.class_names, encoded.multi_label, prepare, opened_with=opened_with)
    return source.with_label_list(label_list)


def _phantoms(
    spatial_dims: int,
    image_size: int | Sequence[int],
    class_names: Sequence[str] | None,
    seed: int,
    counts: Sequence[int],
) -> ImageSource:
    if class_names is not None and tuple(class_names) != CHEST_CLASSES:
        raise ValueError(
            f"open_source: phantoms have the classes {', '.join(CHEST_CLASSES)}, got {', '.join(class_names)}; "
            "say where other images are: --dataset_dir."
        )
    phantoms = ChestPhantoms(spatial_dims, image_size_tuple(image_size, spatial_dims), seed)
    ends = np.cumsum(counts)
    items: dict[str, list[dict[Hashable, Any]]] = {}
    for part, end, count in zip(PARTS, ends, counts, strict=True):
        numbers = range(int(end) - count, int(end))
        items[part] = [{"image": n, "label": phantoms.label(n), "name": f"phantom/{n:06d}"} for n in numbers]
    prepare = ImagePreprocessing(spatial_dims, phantoms.image_size, 1, IntensityRule())
    opened_with = {"seed": seed, "phantom_counts": list(counts)}
    return ImageSource(
        f"phantoms of seed {seed}", items, list(CHEST_CLASSES), False, prepare, phantoms, opened_with=opened_with
    )
