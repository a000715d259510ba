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


"""From the options of a program that explains to the arguments of its inferer."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from monai.engines import PrepareBatch

from monai_jointdiff.data import draw_seed
from monai_jointdiff.engines.bundle import json_word
from monai_jointdiff.engines.description import ModelDescription
from monai_jointdiff.engines.serving import images_to_classify

__all__ = [
    "CounterfactualPrepareBatch",
    "NamedImagesPrepareBatch",
    "class_of_target",
    "class_to_generate",
    "images_to_explain",
    "question_in_words",
    "spread",
]

_Item = TypeVar("_Item")

_PRESENCE = {True: "present", False: "absent", None: "the opposite of what it is"}


def class_of_target(target: int | str | None, class_names: Sequence[str], option: str = "--target") -> int | None:
    """The class that a user names.

    Args:
        target: name of a class (which may be a number, and then counts as the name); or the index of one, from 0; or
            None (`null`): no class in particular.
        class_names: names in the order of the logits.
        option: by which the user names it, for the message.

    Returns:
        its index; None for None.

    Raises:
        ValueError: for anything else, with the names that there are.
    """
    names = list(class_names)
    if str(target) in names:
        return names.index(str(target))
    target = json_word(target)
    if target is None:
        return None
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(names):
        return target
    close = difflib.get_close_matches(str(target), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"class_of_target: {option} is {target!r}, it must be one of {', '.join(names)}, an index from 0 to "
        f"{len(names) - 1}, or null.{hint}"
    )


def class_to_generate(description: ModelDescription, class_label: int | str | None) -> int | list[int] | None:
    """The condition under which images of a class are generated.

    Args:
        description: of the model.
        class_label: as for :func:`class_of_target`.

    Returns:
        the class; of a model of several labels an entry for each, 1 for that label and -1 (open) for the others; None
        for None.

    Raises:
        ValueError: for an unknown class, or any class where the model is not class-conditional.
    """
    index = class_of_target(class_label, description.class_names, "--class_label")
    if index is None:
        return None
    if not description.class_conditional:
        raise ValueError(
            f"class_to_generate: --class_label is {class_label!r}, but the model is not class-conditional. Train one "
            "that is with train.json and train_conditional.json of the bundle."
        )
    if not description.multi_label:
        return index
    return [1 if k == index else -1 for k in range(len(description.class_names))]


def question_in_words(description: ModelDescription, target: int | str | None, enforce: bool | str | None) -> str:
    """What will be asked of each image, for the user to see what became of the options.

    Args:
        description: of the model.
        target: as for :func:`class_of_target`.
        enforce: True: the target is to be present; False: absent; None: present, or for a model of several labels the
            opposite of what it is.

    Returns:
        a sentence.

    Raises:
        ValueError: for an unknown target, or none where one is needed.
    """
    index, wanted = class_of_target(target, description.class_names), _flag(enforce)
    if index is None:
        if description.multi_label or wanted is False:
            raise ValueError(
                f"question_in_words: --target is needed; it must be one of {', '.join(description.class_names)}."
            )
        return "What would have to change for the most probable other class?"
    name = description.class_names[index]
    if description.multi_label:
        return f"What would have to change for {name} to be {_PRESENCE[wanted]}?"
    return f"What would have to change for {'another class than ' if wanted is False else ''}{name}?"


def images_to_explain(
    dataset_dir: str | int | None, description: ModelDescription, limit: int | str | None = 16, **options: Any
) -> list[dict[Hashable, Any]]:
    """Items to explain, of many images some that are evenly spread over their list.

    Args:
        dataset_dir: as for :func:`~monai_jointdiff.engines.images_to_classify`.
        description: of the model.
        limit: number of images at most; None: all.
        options: as for :func:`~monai_jointdiff.engines.images_to_classify`.

    Returns:
        items with `image`, `label` and `name`.

    Raises:
        ValueError: when there is nothing to explain, or the limit is below 1.
    """
    return spread(images_to_classify(dataset_dir, description, **options), limit)


def spread(items: Sequence[_Item], limit: int | str | None, option: str = "--limit") -> list[_Item]:
    """Of many items some that are evenly spread over their list, the first and the last among them.

    Args:
        items: the list.
        limit: number of items at most; None (`null`): all.
        option: by which the user gives the limit, for the message.

    Returns:
        the items, in their order.

    Raises:
        ValueError: when the limit is no whole number of at least 1.
    """
    count = json_word(limit)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"spread: {option} must be a whole number of at least 1, or null, got {limit!r}.")
    if count is None or len(items) <= count:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int)]


class NamedImagesPrepareBatch(PrepareBatch):
    """Turns a batch into the arguments of an inferer that adds noise: a function of (seed, name of the image).

    Args:
        seed: of the noise.
        stream: what the noise is for; other purposes get other noise.
        progress: show a progress bar for each batch.
        keywords: further keywords of the inferer, the same for all images.
    """

    def __init__(self, seed: int, stream: str, progress: bool | str = False, **keywords: Any) -> None:
        self.seed = seed
        self.stream = stream
        self.keywords = {**keywords, "progress": json_word(progress) is True}

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any, tuple[()], dict[str, Any]]:
        """Prepare one batch.

        Args:
            batchdata: `image` (N, C, *spatial) in [-1, 1], `name` (N texts), `label` where it is known.
            device: where the images go.
            non_blocking: as for `Tensor.to`.
            kwargs: further arguments of `Tensor.to`.

        Returns:
            images, labels as they came, no arguments, and the keywords of the inferer.
        """
        image = torch.as_tensor(batchdata["image"]).to(device=device, non_blocking=non_blocking, **kwargs)
        seeds = [draw_seed(self.seed, 0, f"{self.stream}/{name}") for name in batchdata["name"]]
        return image, batchdata.get("label"), (), {**self.keywords, "seed": seeds}


class CounterfactualPrepareBatch(NamedImagesPrepareBatch):
    """Turns a batch into the arguments of a :class:`~monai_jointdiff.inferers.CounterfactualInferer`.

    The noise of an image is a function of (seed, its name), whatever the batch it is in.

    Args:
        class_names: names in the order of the logits.
        target: as for :func:`class_of_target`, the same for all images.
        enforce: True: the target is to be present; False: absent; None: present, or in a model of several labels the
            opposite of what it is.
        seed: of the noise.
        progress: show a progress bar over the steps of each batch.

    Raises:
        ValueError: for an unknown target, or `enforce` that is no truth value.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        target: int | str | None = None,
        enforce: bool | str | None = None,
        seed: int = 0,
        progress: bool | str = False,
    ) -> None:
        wanted = class_of_target(target, class_names)
        super().__init__(seed, "counterfactual", progress, target=wanted, enforce=_flag(enforce))


def _flag(value: bool | str | None) -> bool | None:
    flag = json_word(value)
    if flag is None or isinstance(flag, bool):
        return flag
    raise ValueError(f"CounterfactualPrepareBatch: --enforce must be true, false or null, got {value!r}.")
