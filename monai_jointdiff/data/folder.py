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

"""Data sets that are folders of image files, with a CSV or with one sub-folder per class."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.reading import has_image_suffix, is_dicom, is_gray, read_image
from monai_jointdiff.data.records import Found, Record
from monai_jointdiff.data.splits import canonical_part

__all__ = ["find_images", "read_folder"]

_DEFAULT_SIZE = {2: 64, 3: 32}
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


def read_folder(
    folder: str | Path,
    spatial_dims: int = 2,
    image_column: str = "file",
    label_column: str | Sequence[str] = "label",
    split_column: str = "split",
    patient_column: str = "patient",
) -> Found:
    """List the images of a folder, with labels from `labels.csv` (or the only CSV), else from the sub-folders' names.

    Without a CSV, sub-folders `train`, `val`, `test` are parts and the sub-folders in them (or, without parts, in the
    folder itself) are classes; images that lie directly in the folder have no label.

    Args:
        folder: the folder.
        spatial_dims: 2 or 3.
        image_column: column with the file, relative to the folder.
        label_column: column with the label, or several columns (also joined by commas) with 1, 0 or nothing.
        split_column: column with the part; "split" may be missing.
        patient_column: column with the patient; "patient" may be missing.

    Returns:
        paths and labels; nothing but a few images is read.

    Raises:
        ValueError: without images, for a missing column, or a file that is listed but not there.
    """
    folder = Path(folder)
    table = _find_csv(folder)
    if table is None:
        records = _by_folders(folder)
    else:
        columns = label_column.split(",") if isinstance(label_column, str) else list(label_column)
        records = _by_csv(folder, table, image_column, [c.strip() for c in columns], split_column, patient_column)
    if not records:
        raise ValueError(
            f"read_folder: '{folder}' holds no images (JPEG, PNG, DICOM, NIfTI, NRRD) and no rows in a CSV."
        )
    return Found(records, _DEFAULT_SIZE[spatial_dims], _channels(records, spatial_dims), IntensityRule())


def _find_csv(folder: Path) -> Path | None:
    tables = sorted(folder.glob("*.csv"))
    if (folder / "labels.csv") in tables:
        return folder / "labels.csv"
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ValueError(f"read_folder: '{folder}' holds several CSV files ({names}); name the right one labels.csv.")
    return tables[0] if tables else None


def _by_csv(
    folder: Path, table: Path, image_column: str, label_columns: list[str], split_column: str, patient_column: str
) -> list[Record]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"read_folder: cannot read '{table}' as a CSV in UTF-8: {error}.") from error
    optional = {"split": split_column, "patient": patient_column}  # only under these names may a column be missing
    needed = [image_column, *label_columns, *(name for default, name in optional.items() if name != default)]
    missing = [name for name in needed if name not in header]
    if missing:
        raise ValueError(
            f"read_folder: {table.name} has no column {', '.join(map(repr, missing))}; it has {', '.join(header)}. "
            "Say which to use: --image_column, --label_column, --split_column, --patient_column."
        )
    empty = [str(line) for line, row in enumerate(rows, start=2) if not row[image_column]]
    if empty:
        raise ValueError(f"read_folder: no file in column {image_column!r} of {table.name}, lines {', '.join(empty)}.")
    repeated = sorted(name for name, count in Counter(row[image_column] for row in rows).items() if count > 1)
    if repeated:
        raise ValueError(f"read_folder: {table.name} lists files more than once: {', '.join(repeated)}.")
    absent = [row[image_column] for row in rows if not (folder / row[image_column]).exists()]
    if absent:
        names = ", ".join(absent)
        raise ValueError(f"read_folder: {len(absent)} files of {table.name} are not in '{folder}': {names}.")
    return [
        Record(
            image=folder / row[image_column],
            label=_label(row, label_columns),
            name=_name(row[image_column], folder),
            part=canonical_part(row[split_column]) if row.get(split_column) else None,
            patient=row.get(patient_column) or None,
        )
        for row in rows
    ]


def _name(file: str, folder: Path) -> str:
    """The file as seen from the folder: results name images, and never tell where the data lie."""
    path = Path(file)
    if not path.is_absolute():
        return path.as_posix()
    if not path.is_relative_to(folder.absolute()):
        raise ValueError(f"read_folder: '{file}' is an absolute path outside of '{folder}'; name files relative to it.")
    return path.relative_to(folder.absolute()).as_posix()


def _label(row: Mapping[str, str], columns: Sequence[str]) -> Any:
    return row[columns[0]] if len(columns) == 1 else [row[column] for column in columns]


def _by_folders(folder: Path) -> list[Record]:
    records = []
    for path in find_images(folder):
        *above, _ = path.relative_to(folder).parts
        part = None
        if above and _is_part(above[0]):
            part, above = canonical_part(above[0]), above[1:]
        label = above[0] if above else None
        records.append(Record(path, label, path.relative_to(folder).as_posix(), part))
    return records


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
        assert isinstance(image, Path)
        try:
            array = read_image(image, spatial_dims)
        except ValueError:
            continue  # the check of all files names every bad one
        counts.add(1 if len(array) == 3 and is_gray(array) else len(array))
    return max(counts, default=1)
