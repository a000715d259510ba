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

"""Which images train, which choose the model, which test it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import cast

import numpy as np

__all__ = ["PARTS", "canonical_part", "complete_parts"]

PARTS = ("train", "val", "test")
_ROUNDING = 1e-6  # of sums of shares
_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def canonical_part(name: str) -> str:
    """`"train"`, `"val"` or `"test"` for any of the names in use (training, valid, validation, dev, testing).

    Args:
        name: as written in a file, in any case.

    Returns:
        the name of the part here.

    Raises:
        ValueError: for any other name.
    """
    part = _ALIASES.get(str(name).strip().lower())
    if part is None:
        raise ValueError(f"canonical_part: {name!r} is no part of a data set; right are {', '.join(_ALIASES)}.")
    return part


def complete_parts(
    parts: Sequence[str | None],
    labels: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
) -> list[str]:
    """Give every image a part: validation and test parts that are missing are taken out of the training part.

    Images without a part go where their group's other images are, else they count as training images. Groups (patients)
    stay together, and each part gets its share of every label, and of the images, as nearly as whole groups allow. A
    data set without any training image is left as it is: it is there to be tested on.

    Args:
        parts: canonical part of each image, or None.
        labels: label of each image; a tuple has an entry for each of several classes, which are divided one by one.
        groups: patient of each image, None where unknown. None: each image for itself.
        seed: seed of the choice.
        val_fraction: share of the validation part, if it is missing.
        test_fraction: share of the test part, if it is missing.

    Returns:
        the part of each image.

    Raises:
        ValueError: when the fractions are not shares that leave something to train on, or a group has images in two
            parts.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"complete_parts: val_fraction and test_fraction must be at least 0 and together below 1, "
            f"got {val_fraction} and {test_fraction}."
        )
    keys: list[Hashable] = [
        ("image", index) if groups is None or groups[index] is None else ("group", groups[index])
        for index in range(len(parts))
    ]
    given = _given_parts(keys, parts)
    complete = [given.get(key, "train") for key in keys]
    fractions = {"test": test_fraction, "val": val_fraction}
    missing = {part: share for part, share in fractions.items() if part not in complete and share > 0}
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if complete[index] == "train":
            members[key].append(index)
    shares = {"train": 1 - sum(missing.values()), **missing}
    for group, part in _distribute(members, labels, shares, seed).items():
        for index in members[group]:
            complete[index] = part
    return complete


def _given_parts(keys: Sequence[Hashable], parts: Sequence[str | None]) -> dict[Hashable, str]:
    """The part of every group that has one."""
    given: dict[Hashable, str] = {}
    for key, part in zip(keys, parts, strict=True):
        if part is not None and given.setdefault(key, part) != part:
            _, group = cast(tuple[str, Hashable], key)
            raise ValueError(
                f"complete_parts: patient {group!r} has images in the {given[key]} and in the {part} part; the same "
                "patient may not be trained and tested on."
            )
    return given


def _distribute(
    members: Mapping[Hashable, Sequence[int]], labels: Sequence[Hashable], shares: Mapping[str, float], seed: int
) -> dict[Hashable, str]:
    """Groups with the rarest entry first, large ones before small ones, each to a part that lacks this entry.

    Source: iterative stratification, Sechidis et al. 2011, with groups in the place of images, and with what no part
    lacks as a whole (most of a class of three images) given to the part that lacks most images.
    """
    keys = list(members)
    order = [keys[position] for position in np.random.default_rng(seed).permutation(len(keys))]
    contents = {
        group: Counter(entry for index in members[group] for entry in _entries(labels[index]))
        for group in sorted(order, key=lambda key: -len(members[key]))
    }
    totals: Counter[Hashable] = Counter()
    for content in contents.values():
        totals.update(content)
    lacking = {part: {entry: share * total for entry, total in totals.items()} for part, share in shares.items()}
    images = dict.fromkeys(shares, 0.0)  # what a part lacks of its share of the images that were given out
    chosen: dict[Hashable, str] = {}
    while contents:
        rarest = min(totals, key=lambda entry: totals[entry])
        for group in [group for group, content in contents.items() if rarest in content]:
            content = contents.pop(group)
            for part, share in shares.items():
                images[part] += share * len(members[group])
            part = _neediest({part: lacking[part][rarest] for part in shares}, images, content[rarest])
            images[part] -= len(members[group])
            for entry, count in content.items():
                lacking[part][entry] -= count
                totals[entry] -= count
            chosen[group] = part
        del totals[rarest]
        totals = +totals
    return chosen


def _entries(label: Hashable) -> list[Hashable]:
    """What is stratified: a class, or each entry of a label of several classes."""
    return list(enumerate(label)) if isinstance(label, tuple) else [label]


def _neediest(lacking: Mapping[str, float], images: Mapping[str, float], count: int) -> str:
    """The part that lacks most of an entry, if it lacks `count` of it; else the one that lacks most images."""
    if max(lacking.values()) >= count - _ROUNDING:
        return max(lacking, key=lambda part: (round(lacking[part], 6), images[part]))
    return max(lacking, key=lambda part: (lacking[part] > _ROUNDING, images[part]))
