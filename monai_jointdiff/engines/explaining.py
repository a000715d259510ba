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
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from monai.engines import PrepareBatch
from monai.inferers import Inferer
from torch import nn

from monai_jointdiff.data import draw_seed
from monai_jointdiff.engines.bundle import json_word, load_weights
from monai_jointdiff.engines.description import ModelDescription
from monai_jointdiff.engines.first_stage import weights_fingerprint
from monai_jointdiff.engines.serving import (
    MAY_HAVE_TRAINED,
    NOT_HELD_OUT,
    images_to_classify,
    load_trained,
    part_in_words,
    require_trained,
    source_of_model,
    space_of_model,
)
from monai_jointdiff.inferers import CounterfactualInferer, CounterfactualResult, JointDiffusionInferer, LatentSpace

__all__ = [
    "CounterfactualPrepareBatch",
    "CounterfactualTargets",
    "HeadJudge",
    "NamedImagesPrepareBatch",
    "class_of_target",
    "class_to_generate",
    "fingerprint_of_model",
    "images_to_explain",
    "open_oracle",
    "question_in_words",
    "spread",
]

OUT_OF = "out_of"  # of an item: of how many images some were taken
ALL = "all"  # as --target: every other answer, side by side

_OF_PART = {
    "train": "the train part: these images trained the model",
    "val": "the val part: these images chose epoch and thresholds of the model",
    "all": MAY_HAVE_TRAINED,
}

_Item = TypeVar("_Item")

_SAME_FOR_ORACLE = ("class_names", "multi_label", "image_size", "in_channels", "intensity", "bias_correction")
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
            f"class_to_generate: --class_label is {class_label!r}, but the model is not class-conditional. Let its "
            "head lead to the class (--rule classifier), or train one that is with train.json and "
            "train_conditional.json of the bundle."
        )
    if not description.multi_label:
        return index
    return [1 if k == index else -1 for k in range(len(description.class_names))]


def question_in_words(description: ModelDescription, target: int | str | None, enforce: bool | str | None) -> str:
    """What will be asked of each image, for the user to see what became of the options.

    Args:
        description: of the model.
        target: as for :func:`class_of_target`, or `all`: every other class, or every label, in turn.
        enforce: True: the target is to be present; False: absent; None: present, or for a model of several labels the
            opposite of what it is.

    Returns:
        a sentence.

    Raises:
        ValueError: for an unknown target, none where one is needed, or `enforce` false of all classes.
    """
    wanted = _flag(enforce)
    if _is_all(target, description.class_names):
        if description.multi_label:
            return f"For each label in turn: what would have to change for it to be {_PRESENCE[wanted]}?"
        if wanted is False:
            raise ValueError("question_in_words: --target all asks for every other class; --enforce false needs one.")
        return "For each other class in turn: what would have to change for it?"
    index = class_of_target(target, description.class_names)
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
    dataset_dir: str | int | None,
    description: ModelDescription,
    limit: int | str | None = 16,
    part: str | None = None,
    **options: Any,
) -> list[dict[Hashable, Any]]:
    """Items to explain, of many images some that are evenly spread over their list.

    Where images are left out, or taken that are not held out from the training, a line printed says so.

    Args:
        dataset_dir: as for :func:`~monai_jointdiff.engines.images_to_classify`.
        description: of the model.
        limit: number of images at most; None: all.
        part: None: the images to classify, whose labels are not asked for; `train`, `val`, `test` or `all`:
            this part of the data with its labels, divided as in training.
        options: as for :func:`~monai_jointdiff.engines.images_to_classify`.

    Returns:
        items as of :func:`~monai_jointdiff.engines.images_to_classify`; `not_held_out` is in those of any part but
        `test`, and `out_of` in all where some were left out: how many there were.

    Raises:
        ValueError: when there is nothing to explain, the limit is below 1, the part is unknown or drawn otherwise than
            for the training, labels do not fit the model, or masks are asked for and an image has none.
    """
    if part is None:
        items = images_to_classify(dataset_dir, description, **options)
    else:
        source = source_of_model(description, dataset_dir, **options)
        print(part_in_words(source, part, description), flush=True)
        known: dict[Hashable, Any] = {} if part == "test" else {NOT_HELD_OUT: _OF_PART[part]}
        items = [{**item, **known} for item in source.part(part)]
        if options.get("mask_column") is not None and not all("mask" in item for item in items):
            raise ValueError(
                f"images_to_explain: --mask_column {options['mask_column']} finds no mask for some images of "
                f"{source.name}. Every image must have one, an empty one where there is nothing to find."
            )
    there = len(items)
    items = spread(items, limit)
    if len(items) < there:
        print(f"only {len(items)} of {there} images, evenly spread; all of them with --limit null", flush=True)
        items = [{**item, OUT_OF: there} for item in items]
    if reasons := {item[NOT_HELD_OUT]: None for item in items if NOT_HELD_OUT in item}:
        print(f"not held out: {'; '.join(reasons)}", flush=True)
    return items


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
        target: as for :func:`class_of_target`, the same for all images; or `all`, for
            :class:`CounterfactualTargets`.
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
        wanted = ALL if _is_all(target, class_names) else class_of_target(target, class_names)
        super().__init__(seed, "counterfactual", progress, target=wanted, enforce=_flag(enforce))


class CounterfactualTargets(Inferer):
    """Counterfactuals toward one target, or toward each of them from the same encoding, so that they compare.

    Args:
        inferer: makes the counterfactuals.
    """

    def __init__(self, inferer: CounterfactualInferer) -> None:
        super().__init__()
        self.inferer = inferer

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        target: int | str | None = None,
        enforce: bool | None = True,
        **keywords: Any,
    ) -> tuple[CounterfactualResult, ...]:
        """Make the counterfactuals of a batch.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: the joint network.
            target: as for the inferer, the same for all images; or `"all"`: as its
                :py:meth:`~monai_jointdiff.inferers.CounterfactualInferer.every_answer`.
            enforce: as for the inferer.
            keywords: further arguments of the inferer, such as the seed: the same for all targets.

        Returns:
            the results, one for each target.

        Raises:
            ValueError: for another text.
        """
        if not isinstance(target, str):
            return (self.inferer(inputs, network, target, enforce, **keywords),)
        if target != ALL:
            raise ValueError(f"CounterfactualTargets: target must be an index, None or {ALL!r}, got {target!r}.")
        return self.inferer.every_answer(inputs, network, enforce, **keywords)


class HeadJudge:
    """Probabilities of images by the head of a trained network, as its training left them: without temperature.

    Args:
        network: the network.
        description: of it.
        space: where it works.
        autocast_dtype: type to run the network in under autocast; None for its own precision.
    """

    def __init__(
        self,
        network: nn.Module,
        description: ModelDescription,
        space: LatentSpace,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.network = network
        self.multi_label = description.multi_label
        scheduler = description.build_scheduler("ddim")
        self.inferer = JointDiffusionInferer(scheduler, autocast_dtype, space.autoencoder, space.scale_factor)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Classify.

        Args:
            images: (N, C, *spatial) in [-1, 1], on any device.

        Returns:
            (N, K) on the CPU.
        """
        device = next(self.network.parameters()).device
        logits = self.inferer.classify(images.to(device), self.network).double().cpu()
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


def fingerprint_of_model(ckpt_dir: str | Path | None) -> str | None:
    """The identity of trained weights.

    Args:
        ckpt_dir: folder of `model.pt`; None: no model.

    Returns:
        :func:`~monai_jointdiff.engines.weights_fingerprint` of them; None where there are none.
    """
    path = None if ckpt_dir is None else Path(ckpt_dir) / "model.pt"
    return weights_fingerprint(load_weights(path)) if path is not None and path.is_file() else None


def open_oracle(
    oracle_dir: str | Path | None, description: ModelDescription, ckpt_dir: str | Path, device: torch.device
) -> HeadJudge | None:
    """Another trained model, to judge the counterfactuals of the first; only its head is asked.

    Args:
        oracle_dir: folder of its `model.pt` and `model.json`; None (`null`): there is none.
        description: of the model that is explained.
        ckpt_dir: folder of that model.
        device: for the oracle.

    Returns:
        the oracle; None without a folder.

    Raises:
        ValueError: when there is no trained model that learned to classify, it is the very model that is explained, or
            it takes other images or knows other classes.
    """
    oracle_dir = json_word(oracle_dir)
    if oracle_dir is None:
        return None
    require_trained(oracle_dir, program="any model of the same images and classes will do")
    if fingerprint_of_model(oracle_dir) == fingerprint_of_model(ckpt_dir):
        raise ValueError(
            "open_oracle: --oracle has the weights of the model that is explained. A judge must be another model, best "
            "of another architecture, seed or training."
        )
    judge = ModelDescription.load(Path(oracle_dir) / "model.json")
    judge.require("classify")
    different = [key for key in _SAME_FOR_ORACLE if judge.data.get(key) != description.data.get(key)]
    if different:
        raise ValueError(
            "open_oracle: --oracle must take the same images and know the same classes as the model, but it differs in "
            + "; ".join(f"{key}: {judge.data.get(key)} instead of {description.data.get(key)}" for key in different)
            + "."
        )
    network = judge.build_network().to(device)
    load_trained(network, oracle_dir)
    return HeadJudge(network, judge, space_of_model(judge, oracle_dir, device))


def _is_all(target: int | str | None, class_names: Sequence[str]) -> bool:
    """Whether every target is meant; a class of that name comes first."""
    return target == ALL and ALL not in class_names


def _flag(value: bool | str | None) -> bool | None:
    flag = json_word(value)
    if flag is None or isinstance(flag, bool):
        return flag
    raise ValueError(f"CounterfactualPrepareBatch: --enforce must be true, false or null, got {value!r}.")
