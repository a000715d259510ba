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

"""From a trained model to programs that use it: its weights, data prepared as it knows them, noise to generate from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose
from torch import nn

from monai_jointdiff.data import (
    ImagePreprocessing,
    ImageSource,
    Phantom,
    Phantoms,
    PrepareItem,
    SliceRule,
    list_images,
    make_phantoms,
    open_source,
)
from monai_jointdiff.engines.bundle import json_word, load_weights
from monai_jointdiff.engines.description import ModelDescription
from monai_jointdiff.engines.first_stage import WEIGHTS, FirstStage
from monai_jointdiff.engines.generation import noise_of_draws
from monai_jointdiff.inferers import LatentSpace
from monai_jointdiff.transforms import N4BiasFieldCorrection

__all__ = [
    "announce_model",
    "division_of",
    "images_to_classify",
    "load_trained",
    "noise_items",
    "part_in_words",
    "preprocessing_of_model",
    "require_trained",
    "source_of_model",
    "space_of_model",
    "start_model",
]

NOT_HELD_OUT = "not_held_out"  # of an item: why figures on it are not those of a test, in words
MAY_HAVE_TRAINED = "all images, whatever part of the data they were in: they may have trained the model"
_OF_THE_MODEL = ("spatial_dims", "image_size", "class_names", "in_channels", "intensity", "multi_label")


def require_trained(
    ckpt_dir: str | Path, allow_untrained: bool | str = False, program: str = "train.json of this bundle"
) -> None:
    """Refuse to use a network that has learned nothing.

    Args:
        ckpt_dir: folder of `model.pt` and `model.json`.
        allow_untrained: go on all the same, for tests of the program itself.
        program: which trains such a network, for the message.

    Raises:
        ValueError: without a trained model.
    """
    if json_word(allow_untrained) is True or (Path(ckpt_dir) / "model.pt").is_file():
        return
    raise ValueError(
        f"require_trained: {ckpt_dir} holds no model.pt, and answers of an untrained network mean nothing. "
        f"Train first ({program}), or say where a trained model is: --ckpt_dir PATH. "
        "To try the program all the same: --allow_untrained true."
    )


def load_trained(network: nn.Module, ckpt_dir: str | Path) -> bool:
    """Load `model.pt`; where there is none, say so and leave the network untrained.

    Args:
        network: built from the description beside the weights, changed in place.
        ckpt_dir: folder of `model.pt` and `model.json`.

    Returns:
        whether there were weights.

    Raises:
        ValueError: when there are weights without a description, or they do not fit the network.
    """
    ckpt_dir = Path(ckpt_dir)
    if not (ckpt_dir / "model.pt").is_file():
        print(f"WARNING: {ckpt_dir} holds no model.pt: the network is UNTRAINED, its answers mean nothing.", flush=True)
        return False
    if not (ckpt_dir / "model.json").is_file():
        raise ValueError(f"load_trained: {ckpt_dir} holds model.pt but no model.json, which says how to use it.")
    try:
        network.load_state_dict(load_weights(ckpt_dir / "model.pt"))
    except RuntimeError as error:
        raise ValueError(
            f"load_trained: model.pt and model.json in {ckpt_dir} do not belong together: {error}"
        ) from error
    return True


def space_of_model(description: ModelDescription, ckpt_dir: str | Path, device: torch.device) -> LatentSpace:
    """Where a trained network works: on images, or on the latents of the autoencoder beside it.

    Args:
        description: of the model.
        ckpt_dir: folder of `model.pt`, `model.json` and, of a model on latents, `autoencoder.pt`.
        device: for the autoencoder.

    Returns:
        `autoencoder` (None for images) and `scale_factor`, as the inferers take them.

    Raises:
        ValueError: when the autoencoder is missing, or another one than that of the training.
    """
    if description.autoencoder is None:
        return LatentSpace()
    return FirstStage.load(Path(ckpt_dir) / WEIGHTS, device, description.autoencoder).space


def start_model(description: ModelDescription, ckpt_dir: str | Path, first_stage: FirstStage | None = None) -> None:
    """Make room for the first weights that a training is about to write, and describe them.

    The weights of an earlier run go only now, so that a run that fails before loses nothing, and weights and
    description in a folder belong together at any time.

    Args:
        description: of the network in training.
        ckpt_dir: folder of `model.pt` and `model.json`.
        first_stage: of a network on latents the autoencoder, which is copied to the folder.
    """
    (Path(ckpt_dir) / "model.pt").unlink(missing_ok=True)
    if first_stage is not None:
        first_stage.save(ckpt_dir)
    description.save(Path(ckpt_dir) / "model.json")


def source_of_model(description: ModelDescription, dataset_dir: str | int | None, **options: Any) -> ImageSource:
    """Labelled data for a trained model: size, channels, classes and intensities are the model's.

    Seed and columns are those of the training unless others are given: on them depends which images are in which part,
    and a test part drawn in another way would hold training images.

    Args:
        description: of the model.
        dataset_dir: as in training.
        options: columns and seed of :func:`~monai_jointdiff.data.open_source`; None takes the training's.

    Returns:
        the data set.

    Raises:
        ValueError: when the data do not fit the model.
    """
    data = description.data
    fixed = {key: data[key] for key in _OF_THE_MODEL} | {"correction": _correction(data)}
    given = {key: value for key, value in options.items() if value is not None}
    trained = data.get("opened_with", {})
    usual = {key: value for key, value in trained.items() if key.endswith("_column")}
    source = open_source(dataset_dir, **fixed, **{**trained, **given}, usual_columns=usual)
    if source.multi_label != description.multi_label:
        kinds = {True: "several labels", False: "one class"}
        raise ValueError(
            f"source_of_model: the model gives an image {kinds[description.multi_label]}, "
            f"{source.name} gives it {kinds[source.multi_label]}."
        )
    return source


def division_of(source: ImageSource) -> str:
    """Hash of which images train and which test, by which a model knows the data it was trained on.

    The validation part does not count: a training with few labels leaves some of it out
    (:func:`~monai_jointdiff.data.open_with_few_labels`).

    Args:
        source: the data.

    Returns:
        `sha256:` and 64 digits.
    """
    names = {part: sorted(str(item["name"]) for item in source.items[part]) for part in ("train", "test")}
    return f"sha256:{hashlib.sha256(json.dumps(names).encode()).hexdigest()}"


def part_in_words(source: ImageSource, part: str, description: ModelDescription) -> str:
    """Which part of the data is taken, for the user to see how much of them it is.

    A part that is drawn exists only of the data of the training, unchanged: one more image, or another label, and the
    seed draws all parts anew, training images into the test part.

    Args:
        source: labelled data.
        part: `train`, `val`, `test` or `all`.
        description: of the model that is evaluated.

    Returns:
        a sentence.

    Raises:
        ValueError: for another part, or one without images; for a part drawn otherwise than for the training.
    """
    count, total = len(source.part(part)), len(source.part("all"))
    if part == "all":
        return f"taken: all {total} images"
    drawn = "" if part in source.given_parts else _how_drawn(source, part, description)
    return (
        f"taken: the {part} part{drawn}: {count} of {total} images "
        "(of data that the model was not trained on take all: --part all)"
    )


def _how_drawn(source: ImageSource, part: str, description: ModelDescription) -> str:
    """How a part that the data do not name was drawn, in words."""
    if description.division is None:
        return ", drawn by the seed (whether as for training is not recorded)"
    if description.division != division_of(source):
        raise ValueError(
            f"part_in_words: {source.name} does not say which images are its {part} part, and they are not those of "
            "the training, or divided otherwise: a part drawn by the seed could hold training images. Of data that "
            "the model was not trained on take all: --part all. Where images, labels or patients were added or changed "
            "since the training, a split column must say which images it was trained on."
        )
    return ", drawn by the seed as for training"


def images_to_classify(
    dataset_dir: str | int | None, description: ModelDescription, seed: int | None = None, **options: Any
) -> list[dict[Hashable, Any]]:
    """Items to classify, whose labels are not asked for.

    Args:
        dataset_dir: an image file; a folder, with all image files in it and its sub-folders; what :func:`open_source`
            takes otherwise: its test part, or all images where the data do not say which are in it.
        description: of the model.
        seed: of the phantoms; None: that of the training.
        options: those of :func:`~monai_jointdiff.data.open_source` that say which files make up an image and how
            volumes are cut; None, or not given: the training's. Masks of files are read where `mask_column` is given.

    Returns:
        items with `image`, `label` (missing, for files) and `name`, the path relative to the folder, for slices with
        their number (`head.nii.gz#slice_077`); where they are known `mask` and `patient`, of slices at least the name
        of their volume; and `not_held_out`, why, where all images were taken, whatever part of the data they are in.

    Raises:
        ValueError: when there is nothing to classify.
    """
    if not _reads_all_files(dataset_dir):
        source = source_of_model(description, dataset_dir, seed=seed, **options)
        if "test" in source.given_parts:
            return list(source.part("test"))
        return [{**item, NOT_HELD_OUT: MAY_HAVE_TRAINED} for item in source.part("all")]
    path = Path(str(dataset_dir))
    given = {key: value for key, value in options.items() if value is not None}
    known = {**description.data.get("opened_with", {}), **given}
    columns, spatial_dims = known.get("image_column", "file"), description.data["spatial_dims"]
    slices = SliceRule.from_options(known) if spatial_dims == 2 else None
    records = list_images(path, columns, slices, given.get("mask_column"), spatial_dims)
    if not records:
        raise ValueError(f"images_to_classify: {path} holds no images (JPEG, PNG, DICOM, NIfTI, NRRD).")
    missing: Any = [-1.0] * len(description.class_names) if description.multi_label else -1
    return [
        {"image": record.image, "label": missing, "name": record.name, NOT_HELD_OUT: MAY_HAVE_TRAINED}
        | ({} if record.mask is None else {"mask": record.mask})
        | ({} if record.patient is None else {"patient": record.patient})
        for record in records
    ]


def _reads_all_files(dataset_dir: str | int | None) -> bool:
    """Whether :func:`images_to_classify` takes all image files, without asking which part of the data they are in.

    Args:
        dataset_dir: as there.

    Returns:
        True of a folder and of an image file.
    """
    path = None if dataset_dir is None else Path(str(dataset_dir))
    return path is not None and path.suffix != ".npz" and path.exists()


def preprocessing_of_model(description: ModelDescription, seed: int | None = None) -> Compose:
    """The model's own way from an item to its input.

    Args:
        description: holds size, channels and intensity rule.
        seed: of the phantoms, for items that are numbers of phantoms; None: that of the training.

    Returns:
        a transform of items. Phantoms are made when the first of their numbers comes: a model of images may have a size
        of which there are none.
    """
    data = description.data
    opened_with = data.get("opened_with", {})
    seed = opened_with.get("seed", 0) if seed is None else seed
    kind = opened_with.get("phantoms", "chest")
    phantoms = _PhantomsWhenAsked(partial(make_phantoms, kind, data["spatial_dims"], data["image_size"], seed))
    return Compose([PrepareItem(ImagePreprocessing.from_description(data, _correction(data)), phantoms)])


class _PhantomsWhenAsked:
    """Draws phantoms like what `make` gives, which is called for the first of them."""

    def __init__(self, make: Callable[[], Phantoms]) -> None:
        self._make = make
        self._phantoms: Phantoms | None = None

    def __call__(self, number: int) -> Phantom:
        if self._phantoms is None:
            self._phantoms = self._make()
        return self._phantoms(number)


def _correction(data: Mapping[str, Any]) -> N4BiasFieldCorrection | None:
    """The correction of the images a model was trained on, made from its description."""
    arguments = data.get("bias_correction")
    return None if arguments is None else N4BiasFieldCorrection(**arguments)


def noise_items(count: int, image_shape: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Items whose image is the starting noise of a sample.

    Args:
        count: number of samples, at least 1.
        image_shape: (C, *spatial).
        seed: of the noise.

    Returns:
        dictionaries with `image` (C, *spatial) and `name`.

    Raises:
        ValueError: for fewer than one sample.
    """
    if count < 1:
        raise ValueError(f"noise_items: the number of samples must be at least 1, got {count}.")
    return [{"image": noise_of_draws([n], image_shape, seed)[0], "name": f"sample_{n:05d}"} for n in range(count)]


def announce_model(
    description: ModelDescription,
    dataset_dir: str | int | None,
    items: Sized,
    ckpt_dir: str | Path,
    output_dir: str | Path,
) -> None:
    """Say what will be classified, with which model, and where the results go.

    Args:
        description: of the model.
        dataset_dir: as the user gave it; None: phantoms.
        items: the images.
        ckpt_dir: folder of the model.
        output_dir: folder for the results.
    """
    trained = description.trained and (Path(ckpt_dir) / "model.pt").is_file()
    state = "trained" if trained else "UNTRAINED"
    origin = "phantoms (no --dataset_dir)" if dataset_dir is None else str(dataset_dir)
    size = " x ".join(map(str, description.image_size))
    print(
        f"data: {origin}, {len(items)} images\n"
        f"model: {ckpt_dir} ({state}; {size}; classes {', '.join(description.class_names)})\n"
        f"decision: {description.decision}\nresults: {output_dir}",
        flush=True,
    )
