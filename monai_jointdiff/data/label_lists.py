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

"""Few labels out of many: which training images keep theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from monai_jointdiff.data.draws import draw_seed
from monai_jointdiff.data.source import ImageSource, open_source

__all__ = [
    "choose_labelled",
    "keep_few_labels",
    "labelled_names",
    "labels_fingerprint",
    "open_with_few_labels",
    "write_label_list",
]

LABELLED = "labelled"  # a validation part no larger than the labelled images


def choose_labelled(
    labels: Sequence[Any] | np.ndarray,
    count: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> np.ndarray:
    r"""Choose the images that keep their label: every class at least once, and otherwise in proportion.

    Images are taken one after the other. The next one shows the class with the largest :math:`n_k / (s_k + 1/2)`, where
    :math:`n_k` images have class k and :math:`s_k` of them are taken already (the divisor method of Webster and
    Sainte-Lague); classes of which none is taken come first, the rarest of them before the others. Within a class a
    random permutation decides. With one class per image the counts are proportional up to rounding; the lists of one
    seed are nested: 50 labels are among the 100 of the same seed.

    With several labels an image counts for each of its findings, as in iterative stratification (Sechidis et al.,
    "On the Stratification of Multi-label Data", ECML PKDD 2011); "no finding" counts as one more class.

    With groups (patients, lesions) a whole group is taken at once: all its images with a label, or none. This meets
    `count` only up to half a group: the last group is taken if the number comes nearer to `count` with it than without,
    and the first groups, one for each class, are taken in any case. Proportions hold as nearly as whole groups allow.

    Args:
        labels: (N,) class indices, -1 for unlabelled, or (N, K) entries 1, 0, and -1 for unknown. Images without any
            known entry cannot be chosen.
        count: number of images to choose. Give it or `fraction`.
        fraction: share of the images with a label, in (0, 1].
        seed: seed of the choice.
        groups: (N,) group of each image, None where unknown (an image for itself). None: each image for itself.

    Returns:
        (count,) indices of the chosen images, ascending.

    Raises:
        ValueError: when not exactly one of count and fraction is given, it is out of range, too small for all classes,
            or the groups are not one per image.

    Example:
        >>> choose_labelled([0, 0, 0, 0, 0, 0, 1, 1, -1, -1], count=4, seed=0)
        array([0, 3, 5, 7])
    """
    membership = _membership(labels)
    known = np.flatnonzero(membership.any(axis=1))
    wanted = _wanted(len(known), count, fraction)
    if groups is not None and len(groups) != len(membership):
        raise ValueError(f"choose_labelled: there are {len(groups)} groups for {len(membership)} images.")
    members: dict[Hashable, list[int]] = {}
    for index in known.tolist():
        group = None if groups is None else groups[index]
        members.setdefault(("image", index) if group is None else ("group", group), []).append(index)
    units = [np.asarray(indices) for indices in members.values()]
    contents = np.stack([membership[unit].sum(axis=0) for unit in units])  # (units, classes)

    chosen: list[int] = []
    taken = np.zeros(contents.shape[1], dtype=int)
    occurring = contents.any(axis=0)
    for unit in _sequence(contents, np.random.default_rng(draw_seed(seed, 0, "labelled images"))):
        every_class = bool((taken[occurring] > 0).all())
        overshoot = len(chosen) + len(units[unit]) - wanted
        if every_class and overshoot > wanted - len(chosen):
            break
        chosen.extend(units[unit])
        taken += contents[unit]
        if len(chosen) >= wanted and bool((taken[occurring] > 0).all()):
            break
    if groups is None and len(chosen) > wanted:
        raise ValueError(
            f"choose_labelled: {wanted} labels are too few for one of each of the {int(occurring.sum())} classes; "
            f"it takes {len(chosen)}."
        )
    return np.sort(np.asarray(chosen))


def _membership(labels: Sequence[Any] | np.ndarray) -> np.ndarray:
    """(N, classes) booleans: which classes an image has; with several labels the last class is "no finding"."""
    array = np.asarray(labels)
    if array.ndim not in (1, 2) or not len(array):
        raise ValueError(f"choose_labelled: labels must be (N,) or (N, K), got shape {array.shape}.")
    if array.ndim == 1:
        return np.asarray(array[:, None] == np.unique(array[array >= 0]))
    findings = array == 1
    none = ~findings.any(axis=1) & (array == 0).any(axis=1)
    return np.concatenate([findings, none[:, None]], axis=1)


def _wanted(labelled: int, count: int | None, fraction: float | None) -> int:
    if (count is None) == (fraction is None):
        raise ValueError(f"choose_labelled: give either count or fraction, got {count} and {fraction}.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"choose_labelled: fraction must be in (0, 1], got {fraction}.")
    wanted = round(fraction * labelled) if fraction is not None else count
    if wanted is None or not 1 <= wanted <= labelled:
        raise ValueError(f"choose_labelled: {wanted} labels are to be kept of {labelled} images with a label.")
    return wanted


def _sequence(contents: np.ndarray, generator: np.random.Generator) -> Iterator[int]:
    """All units, each once, in the order in which they are taken.

    Args:
        contents: (units, classes), how many images of each class a unit has.
        generator: random numbers.

    Yields:
        the number of a unit.
    """
    shuffled = generator.permutation(len(contents))
    queues = [iter(shuffled[contents[shuffled, k] > 0]) for k in range(contents.shape[1])]
    totals, taken = contents.sum(axis=0), np.zeros(contents.shape[1], dtype=int)
    open_classes = totals > 0
    used = np.zeros(len(contents), dtype=bool)
    while open_classes.any():
        with np.errstate(divide="ignore"):
            rarest_first = np.where(open_classes & (taken == 0), 1 / totals, 0.0)
        in_turn = np.where(open_classes, totals / (taken + 0.5), -np.inf)
        k = int(rarest_first.argmax() if rarest_first.any() else in_turn.argmax())
        unit = next((int(unit) for unit in queues[k] if not used[unit]), None)
        if unit is None:
            open_classes[k] = False
            continue
        used[unit] = True
        taken += contents[unit]
        yield unit


def write_label_list(path: str | Path, names: Sequence[str]) -> Path:
    """Write the names of the images that keep their label, one a line: what `label_list` of `open_source` reads.

    Args:
        path: of the text file; its folder is made when it is missing.
        names: names of images.

    Returns:
        the file.

    Raises:
        ValueError: for no names, the same name twice, or one that would not be read back as it is.
    """
    unfit = [name for name in names if not name or name != name.strip() or len(name.splitlines()) > 1]
    if unfit or not names or len(set(names)) < len(names):
        reason = (
            f"{unfit[0]!r} does not fit on a line" if unfit else "there are none" if not names else "one is there twice"
        )
        raise ValueError(f"write_label_list: the names must be different, each a line of text; {reason}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return path


def labelled_names(items: Sequence[Mapping[Hashable, Any]]) -> list[str]:
    """Names of the images that have a label.

    Args:
        items: with `label`, an integer or K entries, and `name`.

    Returns:
        names, in the order of the items.
    """
    return [str(item["name"]) for item in items if np.max(item["label"]) >= 0]


def labels_fingerprint(items: Sequence[Mapping[Hashable, Any]]) -> str:
    """Hash of which images have which label: two trainings may go on from each other only if it is the same.

    Args:
        items: with `label`, an integer or K entries, and `name`.

    Returns:
        `sha256:` and 64 digits, of the names and labels of the labelled images, in the order of the items.
    """
    labels = [np.asarray(item["label"]).tolist() for item in items if np.max(item["label"]) >= 0]
    content = json.dumps([labelled_names(items), labels])
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def open_with_few_labels(
    dataset_dir: str | int | Path | None = None,
    *,
    num_labels: int | None = None,
    label_seed: int = 0,
    validation_count: int | str | None = None,
    **options: Any,
) -> ImageSource:
    """Open a data set of which only some training images keep their label, and as few may validate; the test keeps all.

    Whoever has 50 labels has no 300 more to choose a model with: a result with few labels is honest only if the
    validation part is small, too.

    Args:
        dataset_dir: as of :func:`~monai_jointdiff.data.open_source`.
        num_labels: number of training images that keep their label, by :func:`choose_labelled`, whole patients
            (or lesions) together where the data know them. None: all that have one. With a `label_list` among the
            options: of those on the list.
        label_seed: seed of the choice.
        validation_count: labelled validation images at most, chosen by :func:`choose_labelled` with the same seed, but
            always one of each class; of a larger part all others are left out. `labelled`: as many as training images
            have a label. None: all images.
        options: further ones of :func:`~monai_jointdiff.data.open_source`.

    Returns:
        the data set.

    Raises:
        ValueError: as of :func:`~monai_jointdiff.data.open_source` and :func:`keep_few_labels`.
    """
    _check_validation_count(validation_count)  # before a large data set is read
    return keep_few_labels(open_source(dataset_dir, **options), num_labels, label_seed, validation_count)


def keep_few_labels(
    source: ImageSource,
    num_labels: int | None = None,
    label_seed: int = 0,
    validation_count: int | str | None = None,
) -> ImageSource:
    """Of an open data set some training images keep their label, and as few may validate; the test keeps all.

    Args:
        source: the data set.
        num_labels: as of :func:`open_with_few_labels`.
        label_seed: as of :func:`open_with_few_labels`.
        validation_count: as of :func:`open_with_few_labels`.

    Returns:
        the data set with fewer labels.

    Raises:
        ValueError: for another `validation_count`; as of :func:`choose_labelled`.
    """
    _check_validation_count(validation_count)
    if num_labels is not None:
        source = _with_labels(source, num_labels, label_seed)
    if validation_count is None:
        return source
    count = len(labelled_names(source.part("train"))) if validation_count == LABELLED else int(validation_count)
    return _with_validation(source, count, label_seed)


def _check_validation_count(validation_count: int | str | None) -> None:
    if not (validation_count in (None, LABELLED) or type(validation_count) is int and validation_count >= 1):
        raise ValueError(
            f"open_with_few_labels: validation_count must be a number >= 1, {LABELLED!r} or None, "
            f"got {validation_count!r}."
        )


def _with_labels(source: ImageSource, count: int, seed: int) -> ImageSource:
    """Of the training images so many keep their label."""
    train = source.part("train")
    patients = [item.get("patient") for item in train]
    groups = patients if any(patients) else None
    kept = set(choose_labelled([item["label"] for item in train], count, seed=seed, groups=groups).tolist())
    missing: Any = [-1.0] * source.num_classes if source.multi_label else -1
    items = [item if n in kept else {**item, "label": missing} for n, item in enumerate(train)]
    return replace(source, items={**source.items, "train": items})


def _with_validation(source: ImageSource, count: int, seed: int) -> ImageSource:
    """The validation part cut down to so many labelled images, or to as few more as one of each class takes.

    A part with no more labelled images stays as it is. A few training images of several findings each may show all of
    them where as few validation images cannot: this is no reason to refuse the training.
    """
    val = source.part("val")
    if len(labelled_names(val)) <= count:
        return source
    alone = range(len(val))  # with groups, of one image each, the count gives way where a class is missing
    chosen = choose_labelled([item["label"] for item in val], count, seed=seed, groups=alone)
    return replace(source, items={**source.items, "val": [val[n] for n in chosen.tolist()]})
