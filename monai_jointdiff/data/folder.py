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

"""Data sets that are folders of image files: with a CSV, with one sub-folder per class, or with one per image."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.labels import split_names
from monai_jointdiff.data.reading import (
    has_image_suffix,
    is_dicom,
    is_dicom_slice,
    is_gray,
    named_or_is_dicom,
    read_image,
    read_volume,
)
from monai_jointdiff.data.records import Found, Record
from monai_jointdiff.data.splits import canonical_part
from monai_jointdiff.data.volumes import ImageFiles, SliceRule

__all__ = ["find_images", "list_images", "read_folder"]

_DEFAULT_SIZE = {2: 64, 3: 32}
_OF_NAMES = frozenset({"image_column", "mask_column"})  # options that are used where files are known by their names
_OF_A_TABLE = _OF_NAMES | {"label_column", "split_column", "patient_column"}
_PROBED = 16  # images read to find out whether the data set is gray


def find_images(folder: str | Path) -> list[Path]:
    """All image files in a folder and its sub-folders, hidden ones left out, sorted.

    Args:
        folder: where to look.

    Returns:
        paths that begin with `folder`; images are known by their name, DICOM files also by their content.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in visible if has_image_suffix(path) or is_dicom(path)]


def _images_and_series(folder: Path, spatial_dims: int) -> list[Path]:
    """Image files of a folder; in 3D a folder with slices of DICOM stands for these."""
    files = find_images(folder)
    series: set[Path] = set()
    for path in files if spatial_dims == 3 else []:
        if path.parent not in series and is_dicom_slice(path):
            series.add(path.parent)
    return sorted(series | {path for path in files if path.parent not in series or not named_or_is_dicom(path)})


def _name_below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path != folder else folder.resolve().name


def list_images(
    path: str | Path,
    image_column: str | Sequence[str] = "file",
    slices: SliceRule | None = None,
    mask_column: str | None = None,
    spatial_dims: int = 2,
) -> list[Record]:
    """What there is to look at in a file or a folder; labels and parts are not asked for.

    Args:
        path: an image file, or a folder with image files in it and its sub-folders.
        image_column: several columns (also joined by commas): each image of the folder lies in several files, named in
            its CSV or, without a CSV, as in :func:`read_folder`.
        slices: how volumes are cut; None: they are not.
        mask_column: column with the file of the mask, or a word of its name, as in :func:`read_folder`; every image
            must have one. None: masks are not looked for.
        spatial_dims: 2 or 3; in 3D a folder with slices of DICOM is one image, which has the folder's name.

    Returns:
        images and their names relative to the folder; there may be none.

    Raises:
        ValueError: when a file that a CSV names is missing, a volume to be cut cannot be read, or masks are asked for
            and an image has none.
    """
    path, columns = Path(path), split_names(image_column, "image_column")
    if not path.is_dir():
        records = [Record(path, None, path.name)]
    elif len(columns) == 1 and mask_column is None:
        records = [Record(file, None, _name_below(path, file)) for file in _images_and_series(path, spatial_dims)]
    else:
        table = _find_csv(path)
        wanted = _Columns(columns, mask=mask_column)
        records = _by_names(path, wanted, spatial_dims) if table is None else _by_csv(path, table, wanted)
    without = [record.name for record in records if record.mask is None]
    if mask_column is not None and (without or not records):
        found = f"{len(without)} of {len(records)} images" + f" ({', '.join(without)})" * bool(without)
        raise ValueError(
            f"list_images: --mask_column {mask_column} finds no mask for {found} in '{path}'. A CSV names images and "
            f"masks; without one the words {', '.join(columns)} and {mask_column} are looked for in the names of files."
        )
    return records if slices is None else _cut(records, slices)[0]


def read_folder(
    folder: str | Path,
    spatial_dims: int = 2,
    image_column: str | Sequence[str] = "file",
    label_column: str | Sequence[str] = "label",
    split_column: str = "split",
    patient_column: str = "patient",
    mask_column: str | None = None,
    slices: SliceRule | None = None,
) -> Found:
    """List the images of a folder, with labels from `labels.csv` (or the only CSV), else from the sub-folders' names.

    Without a CSV, sub-folders `train`, `val`, `test` are parts and the sub-folders in them (or, without parts, in the
    folder itself) are classes; images that lie directly in the folder have no label. With several image columns, each
    folder that holds a file for all of them is an image, its own name is no class, and a file is known by a word of its
    name: `flair` finds `case07_flair.nii.gz`. In 3D a folder with slices of DICOM is one image, and counts as a file.

    Args:
        folder: the folder.
        spatial_dims: 2 or 3.
        image_column: column with the file, relative to the folder; or several columns (also joined by commas), whose
            files have one channel each.
        label_column: column with the label, or several columns (also joined by commas) with 1, 0 or nothing.
        split_column: column with the part; "split" may be missing.
        patient_column: column with the patient; "patient" may be missing.
        mask_column: column with the file of the mask, which may be empty; None: there are no masks.
        slices: 2D images are cut from volumes by this rule, and have the label of their mask if there is one, else that
            of their volume; slices of a volume stay together when parts are drawn. None: they are not cut.

    Returns:
        paths and labels. Of images that are not cut, nothing but a few is read.

    Raises:
        ValueError: without images, for a missing column, a file that is listed but not there, or volumes to be cut
            that cannot be read.
    """
    folder = Path(folder)
    table = _find_csv(folder)
    by_mask = slices is not None and mask_column is not None
    columns = _Columns(
        split_names(image_column, "image_column"),
        split_names(label_column, "label_column"),
        split_column,
        patient_column,
        mask_column,
        label_needed=not by_mask,
    )
    used: frozenset[str] = frozenset()
    if table is not None:
        records, used = _by_csv(folder, table, columns), _OF_A_TABLE
    elif len(columns.images) > 1:
        records, used = _by_names(folder, columns, spatial_dims), _OF_NAMES
    else:
        records = _by_folders(folder, spatial_dims)
    if not records:
        alone = "" if len(columns.images) == 1 else f", no sub-folder with one for each of {', '.join(columns.images)}"
        raise ValueError(
            f"read_folder: '{folder}' holds no images (JPEG, PNG, DICOM, NIfTI, NRRD){alone} and no rows in a CSV."
        )
    channels = len(columns.images)
    if slices is not None:
        records, channels = _cut(records, slices)
    if channels == 1:
        channels = _channels(records, spatial_dims)
    class_names = list(slices.classes) if slices is not None and by_mask else None
    channel_names = list(columns.images) if len(columns.images) > 1 else None
    return Found(records, _DEFAULT_SIZE[spatial_dims], channels, IntensityRule(), class_names, channel_names, used)


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table say what."""

    images: tuple[str, ...]
    labels: tuple[str, ...] = ()
    split: str = "split"
    patient: str = "patient"
    mask: str | None = None
    label_needed: bool = True

    def needed(self) -> list[str]:
        """Columns that must be there: all that were named, and the files."""
        optional = {"split": self.split, "patient": self.patient}  # only under these names may a column be missing
        labels = self.labels if self.label_needed else ()
        masks = () if self.mask is None else (self.mask,)
        return [*self.images, *labels, *masks, *(name for default, name in optional.items() if name != default)]


def _find_csv(folder: Path) -> Path | None:
    tables = sorted(folder.glob("*.csv"))
    if (folder / "labels.csv") in tables:
        return folder / "labels.csv"
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ValueError(f"read_folder: '{folder}' holds several CSV files ({names}); name the right one labels.csv.")
    return tables[0] if tables else None


def _by_csv(folder: Path, table: Path, columns: _Columns) -> list[Record]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"read_folder: cannot read '{table}' as a CSV in UTF-8: {error}.") from error
    missing = [name for name in columns.needed() if name not in header]
    if missing:
        raise ValueError(
            f"read_folder: {table.name} has no column {', '.join(map(repr, missing))}; it has {', '.join(header)}. "
            "Say which to use: --image_column, --label_column, --split_column, --patient_column."
        )
    _check_files(folder, table, columns, rows)
    return [
        Record(
            image=_image(folder / row[column] for column in columns.images),
            label=_label(row, columns.labels),
            name=_name(row[columns.images[0]], folder),
            part=_part(row, columns, f"{table.name}, line {line}"),
            patient=row.get(columns.patient) or None,
            mask=folder / row[columns.mask] if columns.mask is not None and row[columns.mask] else None,
        )
        for line, row in enumerate(rows, start=2)
    ]


def _part(row: Mapping[str, str], columns: _Columns, place: str) -> str | None:
    """The part that a table gives an image, if it gives one."""
    try:
        return canonical_part(row[columns.split]) if row.get(columns.split) else None
    except ValueError as error:
        file = row[columns.images[0]]
        raise ValueError(f"read_folder: {place} ({file}), column {columns.split!r}: {error}") from error


def _check_files(folder: Path, table: Path, columns: _Columns, rows: Sequence[Mapping[str, str]]) -> None:
    """Every image is named once, and all files are there."""
    for column in columns.images:
        empty = [str(line) for line, row in enumerate(rows, start=2) if not row[column]]
        if empty:
            raise ValueError(f"read_folder: no file in column {column!r} of {table.name}, lines {', '.join(empty)}.")
        names = Counter(_name(row[column], folder) for row in rows)
        repeated = sorted(name for name, count in names.items() if count > 1)
        if repeated:
            raise ValueError(f"read_folder: {table.name} lists files more than once: {', '.join(repeated)}.")
    files = [row[column] for row in rows for column in (*columns.images, columns.mask) if column and row[column]]
    absent = [file for file in files if not (folder / file).exists()]
    if absent:
        raise ValueError(
            f"read_folder: {len(absent)} files of {table.name} are not in '{folder}': {', '.join(absent)}."
        )


def _image(paths: Iterable[Path]) -> Path | ImageFiles:
    files = tuple(paths)
    return files[0] if len(files) == 1 else ImageFiles(files)


def _name(file: str, folder: Path) -> str:
    """The file as seen from the folder: results name images, and never tell where the data lie."""
    path, top = Path(os.path.normpath(file)), Path(os.path.abspath(folder))
    if not path.is_absolute():
        return path.as_posix()
    if not path.is_relative_to(top):
        raise ValueError(f"read_folder: '{file}' is an absolute path outside of '{folder}'; name files relative to it.")
    return path.relative_to(top).as_posix()


def _label(row: Mapping[str, str], columns: Sequence[str]) -> Any:
    return row.get(columns[0]) if len(columns) == 1 else [row[column] for column in columns] or None


def _by_folders(folder: Path, spatial_dims: int) -> list[Record]:
    records = []
    for path in _images_and_series(folder, spatial_dims):
        part, label = _part_and_label(path.relative_to(folder).parent.parts)
        records.append(Record(path, label, _name_below(folder, path), part))
    return records


def _part_and_label(above: Sequence[str]) -> tuple[str | None, str | None]:
    """What the folders above an image say: the part, if the first is named so, then the class."""
    part = canonical_part(above[0]) if above and _is_part(above[0]) else None
    rest = above if part is None else above[1:]
    return part, rest[0] if rest else None


def _by_names(folder: Path, columns: _Columns, spatial_dims: int) -> list[Record]:
    """One image for each folder with a file for each channel, known by a word of its name."""
    together = defaultdict(list)
    for path in _images_and_series(folder, spatial_dims):
        if path != folder:
            together[path.parent].append(path)
    records = []
    for place, paths in sorted(together.items()):
        found = [_with_word(paths, word) for word in columns.images]
        if not any(found):
            continue
        lacking = [word for word, path in zip(columns.images, found, strict=True) if path is None]
        if lacking:
            raise ValueError(f"read_folder: '{place}' has no file with {', '.join(map(repr, lacking))} in its name.")
        files = tuple(path for path in found if path is not None)
        part, label = _part_and_label(place.relative_to(folder).parts[:-1])
        mask = None if columns.mask is None else _with_word(paths, columns.mask)
        name, patient = files[0].relative_to(folder).as_posix(), place.relative_to(folder).as_posix()
        records.append(Record(ImageFiles(files), label, name, part, patient, mask))
    return records


def _with_word(paths: Sequence[Path], word: str) -> Path | None:
    """The file with a word in its name, upper or lower case; words are letters and digits."""
    found = [path for path in paths if word.casefold() in re.split(r"[^0-9a-z]+", path.name.casefold())]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"read_folder: '{found[0].parent}' has several files with {word!r} in their names: {names}.")
    return found[0] if found else None


def _cut(records: Sequence[Record], slices: SliceRule) -> tuple[list[Record], int]:
    """Slices of all volumes, and the largest number of channels of these; images that are no volumes stay whole."""
    cut: list[Record] = []
    channels, bad = 1, []
    for record in records:
        try:
            found, count = _cut_one(record, slices)
        except ValueError as error:
            bad.append(f"  {record.name}: {error}")
            continue
        cut.extend(found)
        channels = max(channels, count)
    if bad:
        raise ValueError(f"read_folder: {len(bad)} volumes cannot be cut into slices:\n" + "\n".join(bad))
    return cut, channels


def _cut_one(record: Record, slices: SliceRule) -> tuple[list[Record], int]:
    files = _files(record.image)
    volume = read_volume(files)
    if volume is None:
        return [record], len(files.paths)
    indices = slices.indices(IntensityRule()(volume))
    mask = None if record.mask is None else _files(record.mask)
    labels: Mapping[int, Any] = dict.fromkeys(indices, record.label)
    if mask is not None:
        drawn = read_volume(mask)
        if drawn is None or drawn.shape[1:] != volume.shape[1:]:
            shape = None if drawn is None else drawn.shape[1:]
            raise ValueError(f"the shape of its mask '{mask}' is {shape}, its own is {volume.shape[1:]}.")
        numbers = slices.labels(np.any(drawn > 0, axis=0), indices)
        labels = {index: slices.classes[number] for index, number in numbers.items()}
    found = [
        replace(
            record,
            image=replace(files, slice_axis=slices.axis, index=index),
            label=label,
            name=f"{record.name}#slice_{index:03d}",
            patient=record.patient or record.name,
            mask=None if mask is None else replace(mask, slice_axis=slices.axis, index=index),
        )
        for index, label in labels.items()
    ]
    return found, len(volume)


def _files(image: Path | ImageFiles | np.ndarray) -> ImageFiles:
    assert not isinstance(image, np.ndarray)  # readers of folders know files only
    return image if isinstance(image, ImageFiles) else ImageFiles((image,))


def _is_part(name: str) -> bool:
    try:
        canonical_part(name)
    except ValueError:
        return False
    return True


def _channels(records: Sequence[Record], spatial_dims: int) -> int:
    """Channels of the data set, from a few images: 1 if all of these are gray, however they are stored."""
    chosen = np.unique(np.linspace(0, len(records) - 1, _PROBED).astype(int))
    counts = set()
    for index in chosen:
        image = records[index].image
        if not isinstance(image, Path):
            continue  # slices and files of one channel each are counted where they are found
        try:
            array = read_image(image, spatial_dims)
        except ValueError:
            continue  # the check of all files names every bad one
        counts.add(1 if len(array) == 3 and is_gray(array) else len(array))
    return max(counts, default=1)
