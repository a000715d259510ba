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

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, Transform

from monai_jointdiff.data.brain_phantoms import BrainPhantoms
from monai_jointdiff.data.folder import read_folder
from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.labels import encode_labels, split_names
from monai_jointdiff.data.medmnist import download_medmnist
from monai_jointdiff.data.npz import read_npz
from monai_jointdiff.data.phantoms import ChestPhantoms, Phantom, Phantoms
from monai_jointdiff.data.reading import Correction, ImagePreprocessing, image_size_tuple
from monai_jointdiff.data.records import Found, Record
from monai_jointdiff.data.skin_phantoms import SkinPhantoms
from monai_jointdiff.data.splits import complete_parts
from monai_jointdiff.data.volumes import SliceRule

__all__ = ["ImageSource", "PrepareItem", "make_phantoms", "open_source"]

PHANTOMS: dict[str, type[Phantoms]] = {"brain": BrainPhantoms, "chest": ChestPhantoms, "skin": SkinPhantoms}
PARTS = ("train", "val", "test")
ALL = "all"  # as a part: train, val and test together
PHANTOM_COUNTS = (6000, 300, 600)
_MEDMNIST = "medmnist:"


class PrepareItem(Transform):
    """From an item of a part to what a network is given.

    Args:
        prepare: from a file or an array to a tensor (C, *spatial) in [-1, 1].
        phantoms: draws the images whose item holds a number.
    """

    def __init__(self, prepare: ImagePreprocessing, phantoms: Callable[[int], Phantom] | None = None) -> None:
        self.prepare = prepare
        self.phantoms = phantoms

    def __call__(self, item: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Prepare one item.

        Args:
            item: `image` (files, an array, or the number of a phantom), `label`, `name`, `mask` (files or an array) if
                there is one, and `patient` if it is known.

        Returns:
            `image` (C, *spatial) float32, a MetaTensor if it comes from files; `label` (an integer, or K entries);
            `name`; `patient`, empty where it is not known; of phantoms and items with a mask also `mask`, (1, *spatial)
            bool, where the finding is.

        Raises:
            ValueError: when the image cannot be used; the message names it.
        """
        prepared = dict(item)
        prepared["patient"] = str(item.get("patient") or "")  # a batch has the same keys for all images
        if isinstance(item["label"], Sequence):
            prepared["label"] = torch.tensor(item["label"], dtype=torch.float32)
        else:
            prepared["label"] = torch.tensor(int(item["label"]))
        if item.get("mask") is not None:
            prepared["image"], prepared["mask"] = self.prepare.with_mask(item["image"], item["mask"])
            return prepared
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
        items: for `train`, `val` and `test` a list of items with `image`, `label` and `name`, `mask` if all have one,
            and `patient` where it is known.
        class_names: names in the order of the labels.
        multi_label: an image may have several labels.
        prepare: reads, scales and pads.
        phantoms: draws the images, if they are phantoms.
        channel_names: names of the channels; None where they are not known.
        opened_with: the options of :func:`open_source` that say which images there are and how they are divided.
        given_parts: parts that are as the data say; all others were drawn, or lost images to those that were.
    """

    name: str
    items: Mapping[str, list[dict[Hashable, Any]]]
    class_names: list[str]
    multi_label: bool
    prepare: ImagePreprocessing
    phantoms: Phantoms | None = None
    channel_names: list[str] | None = None
    opened_with: Mapping[str, Any] = field(default_factory=dict)
    given_parts: frozenset[str] = frozenset(PARTS)

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
            name: `train`, `val` or `test`; or `all`, in the order of the images' names.

        Returns:
            dictionaries with `image` (a path, an array, or a number), `label` and `name`, and `patient` where it is
            known.

        Raises:
            ValueError: for another name, or a part without images.
        """
        if name == ALL:
            return sorted((item for part in PARTS for item in self.items[part]), key=lambda item: str(item["name"]))
        if name not in PARTS:
            raise ValueError(f"ImageSource: {name!r} is no part; right are {', '.join((*PARTS, ALL))}.")
        if not self.items[name]:
            counts = ", ".join(f"{part} {len(self.items[part])}" for part in PARTS)
            raise ValueError(
                f"ImageSource: the {name} part of {self.name} has no images ({counts}). Give it some, by the split "
                "column of a CSV, folders or arrays named train, val and test; or add images, so that each part can be "
                "drawn."
            )
        return self.items[name]

    def preprocessing(self) -> Compose:
        """From an item to `image` (C, *image_size) in [-1, 1], `label` and `name`."""
        return Compose([PrepareItem(self.prepare, self.phantoms)])

    def description(self) -> dict[str, Any]:
        """What inference has to know about the data, ready for JSON: classes, size, channels, intensities."""
        correction = self.prepare.correction
        return {
            "class_names": list(self.class_names),
            "multi_label": self.multi_label,
            "spatial_dims": self.spatial_dims,
            "image_size": list(self.image_size),
            "in_channels": self.in_channels,
            "channel_names": self.channel_names,
            "intensity": self.prepare.intensity.as_dict(),
            "bias_correction": None if correction is None else correction.as_dict(),
            "opened_with": dict(self.opened_with),
        }

    def fingerprint(self) -> str:
        """Hash of which images are in which part, in their order: `sha256:` and 64 digits."""
        names = {part: [str(item["name"]) for item in self.items[part]] for part in PARTS}
        return f"sha256:{hashlib.sha256(json.dumps(names).encode()).hexdigest()}"

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
        """Read every image once, with its mask, and leave out the correction.

        Raises:
            ValueError: naming all images that cannot be used, each with the reason.
        """
        bad = []
        if self.phantoms is None:
            read = PrepareItem(self.prepare.without_correction())
            for item in (item for part in PARTS for item in self.items[part]):
                try:
                    read(item)
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


def make_phantoms(kind: str, spatial_dims: int, image_size: int | Sequence[int], seed: int = 0) -> Phantoms:
    """The phantoms that a program draws when it is given no images.

    Args:
        kind: `chest`, `brain` or `skin`.
        spatial_dims: 2 or 3; of `skin` 2.
        image_size: size of all axes, or one size per axis.
        seed: seed of the whole set.

    Returns:
        draws the image with a given number.

    Raises:
        ValueError: for an unknown kind, or sizes that are not right.
    """
    if kind not in PHANTOMS:
        raise ValueError(f"make_phantoms: phantoms must be one of {', '.join(PHANTOMS)}, got {kind!r}.")
    return PHANTOMS[kind](spatial_dims, image_size_tuple(image_size, spatial_dims), seed)


def open_source(
    dataset_dir: str | int | Path | None = None,
    *,
    spatial_dims: int = 2,
    image_size: int | Sequence[int] | None = None,
    class_names: str | Sequence[str] | None = None,
    seed: int = 0,
    image_column: str | Sequence[str] = "file",
    label_column: str | Sequence[str] = "label",
    split_column: str = "split",
    patient_column: str = "patient",
    mask_column: str | None = None,
    label_list: str | Path | None = None,
    in_channels: int | None = None,
    intensity: IntensityRule | Mapping[str, Any] | None = None,
    correction: Correction | None = None,
    multi_label: bool | None = None,
    slice_axis: int | None = None,
    slice_every: int = 1,
    min_foreground: float = 0.25,
    min_mask_pixels: int = 10,
    mask_classes: Sequence[str] = ("absent", "present"),
    phantoms: str = "chest",
    phantom_counts: Sequence[int] = PHANTOM_COUNTS,
    usual_columns: Mapping[str, str | Sequence[str] | None] | None = None,
) -> ImageSource:
    """Open a data set; what `dataset_dir` is decides the reader.

    Args:
        dataset_dir: None: phantoms; an `.npz` in MedMNIST's layout; a folder of image files; `medmnist:NAME`. A number
            is taken as the name of a folder.
        spatial_dims: 2 or 3.
        image_size: one number or one per axis. None: that of the `.npz`, 32 for phantoms, 64 (2D) or 32 (3D) for files.
        class_names: names in the order of the labels, also joined by commas. None: from the data.
        seed: of the phantoms, and of parts that are drawn.
        image_column: column of the CSV with the file, relative to the folder; or several (also joined by commas), one
            for each channel.
        label_column: column with the label, or several (0/1 each) for multi-label data.
        split_column: column with the part, if there is one.
        patient_column: column with the patient, if there is one; no patient is in two parts.
        mask_column: column with the file of the mask; None: there are no masks.
        label_list: text file naming the training images whose labels are used.
        in_channels: channels of the result. None: from the data.
        intensity: rule, or those of its arguments that are not to come from the data. None: from the data.
        correction: done to the values as stored, such as :class:`~monai_jointdiff.transforms.N4BiasFieldCorrection`.
        multi_label: an image may have several labels, even if none of these has. None: from the data.
        slice_axis: with 2 spatial dims, cut volumes across this axis (0: axial, 1: coronal, 2: sagittal slices); 2D
            images stay whole. None: volumes are refused.
        slice_every: take one slice in so many.
        min_foreground: foreground that a slice must have, as a share of the largest in its volume.
        min_mask_pixels: pixels of the mask from which a slice counts as the second of `mask_classes`; slices with
            fewer, but some, are left out.
        mask_classes: names of slices without and with something in the mask; without a mask a slice has the label of
            its volume.
        phantoms: which to draw, `chest`, `brain` or `skin`.
        phantom_counts: phantoms in train, val and test.
        usual_columns: by option, columns that a program names unless its user names others. Like the defaults here they
            do not matter where the data have no columns (phantoms, an `.npz`, a folder without a CSV); others are
            refused there. None: the defaults only.

    Returns:
        the data set.

    Raises:
        ValueError: when it cannot be read, its content is not as it should be, or columns are named and it has none.
        TypeError: when names of classes or columns are neither a text nor a sequence.
    """
    class_names = None if class_names is None else split_names(class_names, "class_names")
    image_size_tuple(1 if image_size is None else image_size, spatial_dims)  # wrong ones are refused before all work
    opened_with: dict[str, Any] = {
        "seed": seed,
        "image_column": _plain(image_column, "image_column"),
        "label_column": _plain(label_column, "label_column"),
        "split_column": split_column,
        "patient_column": patient_column,
        "mask_column": mask_column,
        "slice_axis": slice_axis,
        "slice_every": slice_every,
        "min_foreground": min_foreground,
        "min_mask_pixels": min_mask_pixels,
        "mask_classes": list(mask_classes),
        "phantoms": phantoms,
        "phantom_counts": list(phantom_counts),
    }
    if dataset_dir is None:
        _refuse_columns(
            opened_with, usual_columns or {}, frozenset(), "phantoms have no CSV (other images: --dataset_dir)"
        )
        drawn = make_phantoms(phantoms, spatial_dims, 32 if image_size is None else image_size, seed)
        source = _phantom_source(drawn, class_names, phantom_counts, _merged(IntensityRule(), intensity), correction)
        return replace(source, opened_with=opened_with).with_label_list(label_list)
    text = str(dataset_dir)
    by_name = text.startswith(_MEDMNIST)
    path = download_medmnist(text[len(_MEDMNIST) :], image_size, spatial_dims=spatial_dims) if by_name else Path(text)
    slices = SliceRule.from_options(opened_with) if spatial_dims == 2 else None
    columns = (image_column, label_column, split_column, patient_column, mask_column)
    found = _read(path, spatial_dims, columns, slices)
    has_none = f"{path.resolve().name} has " + ("no CSV" if path.is_dir() else "arrays in the place of columns")
    _refuse_columns(opened_with, usual_columns or {}, found.columns, has_none)
    records = found.records
    encoded = encode_labels(
        [record.label for record in records],
        found.class_names if class_names is None else class_names,
        [record.name for record in records],
        multi_label,
    )
    parts = _parts(records, encoded.labels, seed)
    moved = {record.part for record, part in zip(records, parts, strict=True) if record.part not in (None, part)}
    prepare = ImagePreprocessing(
        spatial_dims,
        image_size_tuple(found.image_size if image_size is None else image_size, spatial_dims),
        found.in_channels if in_channels is None else in_channels,
        _merged(found.intensity, intensity),
        correction,
    )
    name = text if by_name else path.resolve().name
    named = found.channel_names is not None and len(found.channel_names) == prepare.in_channels
    source = ImageSource(
        name,
        _items(records, encoded.labels, parts),
        encoded.class_names,
        encoded.multi_label,
        prepare,
        channel_names=found.channel_names if named else None,
        opened_with=opened_with,
        given_parts=frozenset(record.part for record in records if record.part is not None) - moved,
    )
    return source.with_label_list(label_list)


def _read(
    path: Path, spatial_dims: int, columns: tuple[Any, Any, str, str, str | None], slices: SliceRule | None
) -> Found:
    """What there is in a folder or an `.npz`."""
    if path.is_dir():
        return read_folder(path, spatial_dims, *columns, slices)
    if path.is_file() and path.suffix == ".npz":
        return read_npz(path, spatial_dims, slices)
    if path.exists():
        raise ValueError(f"open_source: {path} is neither a folder nor an .npz file.")
    raise ValueError(f"open_source: there is no {path}; --dataset_dir takes a folder, an .npz file or medmnist:NAME.")


def _parts(records: Sequence[Record], labels: Sequence[Any], seed: int) -> list[str]:
    """The part of each record; those that name none are divided, a patient's images together."""
    groups = [record.patient for record in records] if any(record.patient for record in records) else None
    keys = [tuple(label) if isinstance(label, list) else label for label in labels]
    return complete_parts([record.part for record in records], keys, groups, seed)


def _items(
    records: Sequence[Record], labels: Sequence[Any], parts: Sequence[str]
) -> dict[str, list[dict[Hashable, Any]]]:
    """The items of each part: image, label and name, mask where every record has one, patient where it is known."""
    items: dict[str, list[dict[Hashable, Any]]] = {part: [] for part in PARTS}
    with_masks = all(record.mask is not None for record in records)
    for record, label, part in zip(records, labels, parts, strict=True):
        item: dict[Hashable, Any] = {"image": record.image, "label": label, "name": record.name}
        if with_masks:
            item["mask"] = record.mask
        if record.patient is not None:
            item["patient"] = record.patient
        items[part].append(item)
    return items


def _refuse_columns(options: Mapping[str, Any], usual: Mapping[str, Any], used: frozenset[str], has_none: str) -> None:
    """A user who names a column must not believe that it is used where the data have none."""
    parameters = inspect.signature(open_source).parameters
    named = {
        name: value
        for name, value in options.items()
        if name.endswith("_column") and name not in used and value is not None
    }
    asked = []
    for name, value in named.items():
        known = [parameters[name].default, usual.get(name)]
        if split_names(value, name) not in [split_names(one, name) for one in known if one is not None]:
            asked.append(f"--{name} {','.join(split_names(value, name))}")
    if asked:
        raise ValueError(
            f"open_source: {', '.join(asked)} cannot be used: {has_none}. Columns are those of a CSV in a folder of "
            "images; without it sub-folders are parts and classes, and in an .npz the arrays {part}_labels, "
            "{part}_patients and {part}_masks are what columns are. Leave the option out, or add a CSV."
        )


def _plain(columns: str | Sequence[str], option: str) -> str | list[str]:
    return columns if isinstance(columns, str) else list(split_names(columns, option))


def _merged(rule: IntensityRule, intensity: IntensityRule | Mapping[str, Any] | None) -> IntensityRule:
    """The rule of the data, with what was given in its place."""
    if intensity is None or isinstance(intensity, IntensityRule):
        return intensity or rule
    return IntensityRule.from_dict({**rule.as_dict(), **intensity})


def _phantom_source(
    phantoms: Phantoms,
    class_names: Sequence[str] | None,
    counts: Sequence[int],
    intensity: IntensityRule,
    correction: Correction | None,
) -> ImageSource:
    if class_names is not None and tuple(class_names) != phantoms.class_names:
        raise ValueError(
            f"open_source: phantoms have the classes {', '.join(phantoms.class_names)}, got {', '.join(class_names)}; "
            "say where other images are: --dataset_dir."
        )
    ends = np.cumsum(counts)
    items: dict[str, list[dict[Hashable, Any]]] = {}
    for part, end, count in zip(PARTS, ends, counts, strict=True):
        numbers = range(int(end) - count, int(end))
        items[part] = [{"image": n, "label": phantoms.label(n), "name": f"phantom/{n:06d}"} for n in numbers]
    prepare = ImagePreprocessing(
        phantoms.spatial_dims, phantoms.image_size, phantoms.in_channels, intensity, correction
    )
    names = None if phantoms.channel_names is None else list(phantoms.channel_names)
    title = f"phantoms of seed {phantoms.seed}"
    return ImageSource(title, items, list(phantoms.class_names), False, prepare, phantoms, names)
