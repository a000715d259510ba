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

"""From labels as people write them to class indices or multi-hot vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["EncodedLabels", "encode_labels", "split_names"]

_MISSING = frozenset({"", "nan", "-1", "-1.0"})
_SEPARATOR = "|"
NO_FINDING = "no finding"  # in multi-label data: every label absent, and no class of its own


class EncodedLabels(NamedTuple):
    """Labels as networks take them."""

    labels: list[int] | list[list[float]]  # class index or -1; or K entries of 1, 0 or -1 (unknown)
    class_names: list[str]
    multi_label: bool


def encode_labels(
    labels: Sequence[Any], class_names: Sequence[str] | None, names: Sequence[str], multi_label: bool | None = None
) -> EncodedLabels:
    """Encode the labels of all images of all parts together.

    A label is a class index, a class name (upper and lower case are the same where class names are given), several
    names joined by `|`, or a sequence of K numbers 1, 0, -1. Missing are: nothing, nan and -1.

    Args:
        labels: one per image; None or a string of the CSV, a number, or K numbers.
        class_names: the classes in the order of the indices, also joined by commas. None: from the labels (names are
            sorted).
        names: names of the images, for messages.
        multi_label: read names as a set of labels even if no image has two of them. None: from the labels.

    Returns:
        labels, class names, and whether an image may have several labels. Without any label, the only class is
        "unlabelled".

    Raises:
        ValueError: when a label is out of range, unknown or not of the same kind as the others; the message names the
            image.
        TypeError: when `class_names` are neither a text nor a sequence.
    """
    given = None if class_names is None else list(split_names(class_names, "class_names"))
    if given is not None and len(set(given)) != len(given):
        raise ValueError(f"encode_labels: class_names holds a name twice: {', '.join(given)}.")
    if any(isinstance(label, (list, tuple)) for label in labels):
        return _from_vectors(labels, given, names)
    texts = [_text(label) for label in labels]
    if multi_label or (multi_label is None and any(_SEPARATOR in text for text in texts)):
        return _from_sets(texts, given, names)
    present = [text for text in texts if text not in _MISSING]
    by_name = given is not None and {text.casefold() for text in present} <= {name.casefold() for name in given}
    if present and not by_name and all(_is_whole(text) for text in present):
        return _from_indices(texts, given, names)
    if given is None:
        _refuse_numbers(texts, names)
    return _from_names(texts, given, names)


def split_names(names: str | Sequence[Any], option: str) -> tuple[str, ...]:
    """Names of classes or columns, also those joined by commas.

    Args:
        names: a text, or one name after the other.
        option: what they are, for the message.

    Returns:
        the names.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(names, str):
        return tuple(name.strip() for name in names.split(","))
    if not isinstance(names, Sequence):
        raise TypeError(f"split_names: {option} must be a list of names, or names joined by commas, got {names!r}.")
    return tuple(str(name) for name in names)


def _text(label: Any) -> str:
    """A label as text; missing ones as one of _MISSING."""
    text = "" if label is None else str(label).strip()
    return text.lower() if text.lower() in _MISSING else text


def _refuse_numbers(texts: Sequence[str], names: Sequence[str]) -> None:
    """Numbers among names, and fractions, are no classes unless class_names says so."""
    only_numbers = all(_is_number(text) for text in texts if text not in _MISSING)
    for text, name in zip(texts, names, strict=True):
        if text not in _MISSING and _is_number(text) and not (only_numbers and _is_whole(text)):
            raise ValueError(
                f"encode_labels: label {text!r} of '{name}' is a number that is neither a class index nor of the same "
                "kind as the other labels; if numbers are names of classes here, give class_names."
            )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def _from_indices(texts: Sequence[str], given: list[str] | None, names: Sequence[str]) -> EncodedLabels:
    indices = [-1 if text in _MISSING else int(float(text)) for text in texts]
    present = sorted({index for index in indices if index != -1})
    if given is None and present != list(range(len(present))):
        raise ValueError(
            f"encode_labels: the labels {', '.join(map(str, present))} (the last is that of "
            f"'{names[indices.index(present[-1])]}') are not 0 to K-1; missing labels are -1 (which unsigned numbers "
            "cannot hold: store the labels signed), and classes that do not occur need class_names."
        )
    class_names = [str(index) for index in present] if given is None else given
    for index, name in zip(indices, names, strict=True):
        if not -1 <= index < len(class_names):
            raise ValueError(
                f"encode_labels: label {index} of '{name}' is out of range; right are 0 to {len(class_names) - 1} "
                f"({', '.join(class_names)}) and -1 for missing."
            )
    return EncodedLabels(indices, class_names, False)


def _from_names(texts: Sequence[str], given: list[str] | None, names: Sequence[str]) -> EncodedLabels:
    class_names = given or sorted({text for text in texts if text not in _MISSING}) or ["unlabelled"]
    index_of = _lookup(class_names, given is not None)
    indices = [
        -1 if text in _MISSING else _index(text, index_of, class_names, name)
        for text, name in zip(texts, names, strict=True)
    ]
    return EncodedLabels(indices, class_names, False)


def _from_sets(texts: Sequence[str], given: list[str] | None, names: Sequence[str]) -> EncodedLabels:
    sets = [
        None if text in _MISSING else [part.strip() for part in text.split(_SEPARATOR) if part.strip()]
        for text in texts
    ]
    found = sorted({part for parts in sets for part in parts or () if part.casefold() != NO_FINDING})
    class_names = given or found or ["unlabelled"]
    index_of = _lookup(class_names, given is not None)
    vectors = []
    for parts, name in zip(sets, names, strict=True):
        vector = [-1.0 if parts is None else 0.0] * len(class_names)
        for part in parts or ():
            if part.casefold() != NO_FINDING:
                vector[_index(part, index_of, class_names, name)] = 1.0
        vectors.append(vector)
    return EncodedLabels(vectors, class_names, True)


def _from_vectors(labels: Sequence[Any], given: list[str] | None, names: Sequence[str]) -> EncodedLabels:
    count = len(next(label for label in labels if isinstance(label, (list, tuple))))
    class_names = [str(index) for index in range(count)] if given is None else given
    if len(class_names) != count:
        raise ValueError(
            f"encode_labels: the labels have {count} entries, but there are {len(class_names)} class names."
        )
    vectors = []
    for label, name in zip(labels, names, strict=True):
        if isinstance(label, (list, tuple)):
            entries = [_entry(entry, name) for entry in label]
        elif _text(label) in _MISSING:
            entries = [-1.0] * count
        else:
            raise ValueError(f"encode_labels: label {label!r} of '{name}' is one value, others have {count} entries.")
        if len(entries) != count:
            raise ValueError(f"encode_labels: the label of '{name}' has {len(entries)} entries, others have {count}.")
        vectors.append(entries)
    return EncodedLabels(vectors, class_names, True)


def _entry(entry: Any, name: str) -> float:
    """One entry of a multi-label vector: 1, 0, or -1 for unknown."""
    text = _text(entry)
    try:
        value = -1.0 if text in _MISSING else float(text)
    except ValueError:
        value = math.nan
    if value not in (0.0, 1.0, -1.0):
        raise ValueError(
            f"encode_labels: entry {entry!r} of the label of '{name}' is out of range; right are 1, 0, and -1 or "
            "nothing."
        )
    return value


def _lookup(class_names: Sequence[str], ignore_case: bool) -> dict[str, int]:
    index_of = {name.casefold(): index for index, name in enumerate(class_names)} if ignore_case else {}
    return index_of | {name: index for index, name in enumerate(class_names)}


def _index(text: str, index_of: dict[str, int], class_names: Sequence[str], name: str) -> int:
    index = index_of.get(text, index_of.get(text.casefold()))
    if index is None:
        raise ValueError(f"encode_labels: label {text!r} of '{name}' is none of the classes {', '.join(class_names)}.")
    return index
