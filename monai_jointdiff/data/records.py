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

"""What readers of data sets return, before labels are encoded and parts completed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_jointdiff.data.intensity import IntensityRule
from monai_jointdiff.data.volumes import ImageFiles

__all__ = ["Found", "Record"]


@dataclass(frozen=True)
class Record:
    """One image as a reader found it.

    Args:
        image: files, or (C, *spatial) array as stored.
        label: as stored; None where there is none.
        name: relative to what the user named.
        part: canonical part, or None.
        patient: patient, or None.
        mask: where the finding is: files, or (1, *spatial) array, above 0 inside; None where it is not known.
    """

    image: Path | ImageFiles | np.ndarray
    label: Any
    name: str
    part: str | None = None
    patient: str | None = None
    mask: Path | ImageFiles | np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """All that a reader found.

    Args:
        records: one per image.
        image_size: what to use if the user does not say.
        in_channels: channels of the images.
        intensity: rule that fits how the values are stored.
        class_names: names that the data bring with them, or None.
        channel_names: names of the channels, where the data say them; or None.
        columns: options of columns that the reader went by, such as `label_column`.
    """

    records: list[Record]
    image_size: int | Sequence[int]
    in_channels: int
    intensity: IntensityRule
    class_names: list[str] | None = None
    channel_names: list[str] | None = None
    columns: frozenset[str] = frozenset()
