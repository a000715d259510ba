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

"""What the configurations of the bundles call: where they are, their options, weights to start from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from monai_jointdiff.data import BalancedOrder, DrawOrder, ImageSource, ShuffledOrder, labelled_names
from monai_jointdiff.engines.prepare_batch import TASKS
from monai_jointdiff.handlers.utils import is_writing_process
from monai_jointdiff.networks import HEADS

__all__ = [
    "PretrainedReport",
    "announce",
    "check_channels",
    "check_image_size",
    "check_options",
    "class_weights",
    "draw_order",
    "epoch_length",
    "find_bundle_root",
    "freeze_encoder",
    "head_classes",
    "json_word",
    "load_pretrained",
    "load_weights",
]

_ENCODER = ("conv_in", "time_embed", "down_blocks", "middle_block")
_CLASS_CONDITION = "class_embedding"
_LEAST = {  # options that are whole numbers, and the smallest that is right
    "batch_size": 1,
    "epochs": 1,
    "latent_channels": 1,
    "num_samples": 0,
    "num_workers": 0,
    "patience": 1,
    "val_interval": 1,
}
_WORDS = {"null": None, "none": None, "true": True, "false": False}


def find_bundle_root(name: str) -> str:
    """The folder of a bundle, seen from the repository's root or from the bundle itself.

    MONAI would take the current folder without a word and write `models/` into it; here any other place is refused.

    Args:
        name: the bundle's `name` in its metadata.json, which is its folder's name below `bundles/`.

    Returns:
        `bundles/<name>` or `.`.

    Raises:
        ValueError: from anywhere else.
    """
    for candidate in (Path("bundles") / name, Path()):
        metadata = candidate / "configs" / "metadata.json"
        if metadata.is_file() and json.loads(metadata.read_text(encoding="utf-8")).get("name") == name:
            return str(candidate)
    raise ValueError(
        f"find_bundle_root: {Path.cwd()} is neither the folder of the bundle '{name}' nor the repository that holds "
        f"bundles/{name}. Change there, or say where it is: --bundle_root PATH."
    )


def epoch_length(num_images: int, batch_size: int, world_size: int = 1) -> int:
    """Iterations in which the images pass once, rounded down, at least one.

    Args:
        num_images: images in the training part.
        batch_size: images per process and iteration.
        world_size: number of processes.

    Returns:
        the number of iterations.

    Raises:
        ValueError: for a training part without images or a batch size below 1.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(
            f"epoch_length: needs at least one training image and a batch size of at least 1, "
            f"got {num_images} images and a batch size of {batch_size}."
        )
    return max(1, num_images // (batch_size * world_size))


def draw_order(items: Sequence[Mapping[str, Any]], seed: int, balance: str = "none") -> DrawOrder:
    """Which training image the n-th draw of the run takes.

    Args:
        items: the training part.
        seed: seed of the order.
        balance: `sampler` draws every class equally often; anything else passes through all images in turn.

    Returns:
        a pure function of the number of the draw.

    Raises:
        ValueError: for `sampler` when an image may have several labels.
    """
    if balance == "sampler":
        if any(isinstance(item["label"], Sequence) for item in items):
            raise ValueError("draw_order: --balance sampler needs one class per image; use --balance weights.")
        return BalancedOrder([item["label"] for item in items], seed)
    return ShuffledOrder(len(items), seed)


def class_weights(items: Sequence[Mapping[str, Any]], num_classes: int, balance: str = "none") -> list[float] | None:
    """Weights of the classification term that give every class the same total weight.

    Args:
        items: the training part, of which the labelled images count.
        num_classes: number of classes K.
        balance: `weights` asks for them; anything else gives None.

    Returns:
        None, or K weights with mean 1 over the labelled images; where an image may have several labels, of each the
        weight of its presence, against 1 for its absence.

    Raises:
        ValueError: when a class has no labelled training image, or a label is present, or absent, in none.
    """
    if balance != "weights":
        return None
    labels = np.asarray([item["label"] for item in items])
    if labels.ndim == 2:
        counts, rest = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    else:
        counts = np.bincount(labels[labels >= 0], minlength=num_classes)
        rest = np.full(num_classes, counts.sum() / num_classes)
    if (counts == 0).any() or (rest == 0).any():
        k = int(np.minimum(counts, rest).argmin())
        kind = "without" if counts[k] else "of"
        raise ValueError(
            f"class_weights: no labelled training image {kind} class {k} of {num_classes} (in the order of the class "
            "names, the first is 0), so it can have no weight. Label one, or leave the classes unweighted "
            "(--balance none)."
        )
    return [float(weight) for weight in rest / counts]


def announce(source: ImageSource, ckpt_dir: str | Path, output_dir: str | Path, preflight: bool = True) -> None:
    """Say where the data come from and where results go (in the first process), then check all files.

    MONAI ignores a misspelt option without a word: this is where a user sees that `--datset_dir` was not understood.

    Args:
        source: the data.
        ckpt_dir: folder for weights.
        output_dir: folder for numbers and pictures.
        preflight: read every file before the work begins and name all bad ones.

    Raises:
        ValueError: naming all files that cannot be read.
    """
    if is_writing_process():
        print(f"{source.summary()}\nweights: {ckpt_dir}\nresults: {output_dir}", flush=True)
    if preflight:  # in every process, so that all of them stop
        source.preflight()


def check_options(
    amp: bool = False,
    compile: bool = False,
    balance: str = "none",
    task: str = "joint",
    head: str = "standardized",
    frozen_without_weights: bool = False,
    **numbers: float | None,
) -> None:
    """Refuse options that would be ignored or fail late.

    Args:
        amp: the engine's own mixed precision. Refused: it does nothing on the CPU; use `precision`.
        compile: `torch.compile`. Refused: MONAI 1.6.1's trainer wraps predictions in a way that breaks it.
        balance: `none`, `weights` (class weights in the loss) or `sampler` (classes drawn equally often).
        task: `joint`, `denoise` or `classify`. One half alone is refused in several processes: the other half has no
            gradient, and DistributedDataParallel wants one of every weight.
        head: variant of the head, one of :data:`~monai_jointdiff.networks.HEADS`.
        frozen_without_weights: the encoder is to be frozen, but nothing is loaded into it. Refused.
        numbers: None, or numbers that must be positive; of the options that count something, whole numbers, of
            `num_samples` and `num_workers` 0 or more.

    Raises:
        ValueError: naming the option and what is right.
    """
    if amp:
        raise ValueError("check_options: --amp is not supported; use --precision bf16 (autocast in the inferer).")
    if compile:
        raise ValueError("check_options: --compile is not supported: MONAI 1.6's trainer breaks torch.compile here.")
    if balance not in ("none", "weights", "sampler"):
        raise ValueError(f"check_options: --balance is {balance!r}, it must be 'none', 'weights' or 'sampler'.")
    if task not in TASKS:
        raise ValueError(f"check_options: --task is {task!r}, it must be one of {', '.join(TASKS)}.")
    if head not in HEADS:
        raise ValueError(f"check_options: --head is {head!r}, it must be one of {', '.join(HEADS)}.")
    if task != "joint" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"check_options: --task {task} leaves half of the network without gradients, which several processes "
            f"cannot; got {dist.get_world_size()} of them. Train in one."
        )
    if frozen_without_weights:
        raise ValueError("check_options: --freeze_encoder needs --pretrained: it would freeze random weights.")
    for name, value in numbers.items():
        if value is not None:
            _check_number(name, value)


def _check_number(name: str, value: Any) -> None:
    """Refuse an option that is no number of the right kind, or out of range."""
    if name in _LEAST:
        right = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= _LEAST[name]
        wanted = f"a whole number of at least {_LEAST[name]}"
    else:
        right = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and value > 0
        wanted = "a number greater than 0"
    if not right:
        raise ValueError(f"check_options: --{name} must be {wanted}, got {value!r}.")


def check_channels(channels: Sequence[int], norm_num_groups: int, num_head_channels: int | Sequence[int]) -> None:
    """Refuse channels of which no network can be built, before the data are read.

    Args:
        channels: of the network, one number for each level.
        norm_num_groups: groups of its normalization, which divide the channels of every level.
        num_head_channels: channels of an attention head, one number or one for each level; the last level has
            attention.

    Raises:
        ValueError: naming the option and what is right.
    """
    counts = isinstance(channels, Sequence) and all(type(number) is int and number > 0 for number in channels)
    if not counts or not channels:
        raise ValueError(
            "check_channels: --channels must be a list of positive whole numbers, one for each level of the network, "
            f'like "[16, 32, 64]", got {channels!r}.'
        )
    if any(number % norm_num_groups for number in channels):
        raise ValueError(
            f"check_channels: each number of --channels must be a multiple of {norm_num_groups}, the groups of the "
            f"normalization, got {list(channels)}."
        )
    head = num_head_channels if isinstance(num_head_channels, int) else num_head_channels[-1]
    if channels[-1] % head:
        raise ValueError(
            f"check_channels: the last number of --channels must be a multiple of {head}, the channels of an attention "
            f"head, got {list(channels)}; or give --network_def#num_head_channels a number that divides it."
        )


def check_image_size(image_size: Sequence[int], num_levels: int, name: str = "--image_size") -> None:
    """Refuse a size that cannot be halved at every level of the network.

    Args:
        image_size: of an image, or of its latents.
        num_levels: levels L of the network; each but the first halves the size.
        name: what has this size, for the message.

    Raises:
        ValueError: when a size is not a multiple of 2^(L-1).
    """
    factor = 2 ** (num_levels - 1)
    if any(size % factor for size in image_size):
        raise ValueError(
            f"check_image_size: a network of {num_levels} levels halves the image {num_levels - 1} times; each number "
            f"of {name} must be a multiple of {factor}, got {' x '.join(map(str, image_size))}."
        )


def head_classes(source: ImageSource, task: str = "joint") -> int:
    """Number of logits of the head: one for each class.

    A network that only denoises has a head, too, which learns nothing: its images need no labels, and where there are
    fewer than two classes it has two logits in their place.

    Args:
        source: the data.
        task: `joint`, `denoise` or `classify`.

    Returns:
        K.

    Raises:
        ValueError: when a head is to learn one class alone, which is no choice.
    """
    least = 1 if source.multi_label else 2
    if task == "denoise":
        return max(least, source.num_classes)
    if source.num_classes < least:
        labelled = any(map(labelled_names, source.items.values()))
        reason = f"all are of the class {source.class_names[0]!r}" if labelled else "no image has a label"
        raise ValueError(
            f"head_classes: {source.name} gives the head nothing to choose from: {reason}. Give the classes "
            "(--class_names a,b), or train without them (--task denoise)."
        )
    return source.num_classes


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A plain state dict from a file, without unpickling code.

    Args:
        path: `model.pt` (a state dict), or a resumable checkpoint, of which the EMA weights are taken.

    Returns:
        names to tensors, on the CPU.

    Raises:
        ValueError: when the file is missing, unreadable or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file; the file's name is what the user needs
        raise ValueError(f"load_weights: cannot read weights from {path}: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"load_weights: {path} holds no state dict (names to tensors).")
    return content


@dataclass(frozen=True)
class PretrainedReport:
    """Which keys a pretrained file filled.

    Args:
        loaded: keys taken from the file.
        missing: keys of the network that the file lacks (they keep their initialization).
        unexpected: keys of the file that the network lacks.
        mismatched: keys with another shape (they keep their initialization).
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def __str__(self) -> str:
        lines = [f"pretrained: {len(self.loaded)} tensors loaded"]
        for name in ("missing", "unexpected", "mismatched"):
            keys = getattr(self, name)
            lines.append(f"  {name}: {len(keys)}" + (f" ({', '.join(keys)})" if keys else ""))
        return "\n".join(lines)


def load_pretrained(network: nn.Module, path: str | Path | None) -> PretrainedReport | None:
    """Start from the weights of another training and say exactly which were taken.

    Args:
        network: changed in place.
        path: file with a state dict, or None: nothing is done.

    Returns:
        the report, also printed; None without a file.

    Raises:
        ValueError: when not a single tensor of the file fits.
    """
    if path is None:
        return None
    weights, own = load_weights(path), network.state_dict()
    fits = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    report = PretrainedReport(
        loaded=sorted(fits),
        missing=sorted(set(own) - set(weights)),
        unexpected=sorted(set(weights) - set(own)),
        mismatched=sorted(key for key in weights if key in own and own[key].shape != weights[key].shape),
    )
    if not fits:
        raise ValueError(f"load_pretrained: no tensor of {path} fits {type(network).__name__}.")
    network.load_state_dict(fits, strict=False)
    if is_writing_process():
        print(report)
    return report


def freeze_encoder(
    network: nn.Module, freeze: bool = True, report: PretrainedReport | None = None
) -> list[nn.Parameter]:
    """Stop the encoder (input convolution, time and class embedding, down and middle blocks) from learning.

    A class embedding that the pretrained file did not fill learns all the same: the class condition is then new.

    Args:
        network: a :class:`~monai_jointdiff.networks.JointDiffusionUNet`, changed in place.
        freeze: False leaves everything trainable.
        report: what :func:`load_pretrained` filled; None: all of the network has weights, or gets them from the
            checkpoint of a resumed run.

    Returns:
        the parameters that still learn, for the optimizer.

    Raises:
        ValueError: when the pretrained file left a part of the encoder at random; the message names the keys.
    """
    random = [] if report is None else sorted({*report.missing, *report.mismatched})
    if freeze:
        encoder = [key for key in random if key.split(".")[0] in _ENCODER]
        if encoder:
            raise ValueError(
                "freeze_encoder: the pretrained file does not fill the encoder, and --freeze_encoder would keep random "
                f"weights of {len(encoder)} tensors ({', '.join(encoder)}). Give the network the levels, channels and "
                "blocks of the file, or train its encoder, too (--freeze_encoder false)."
            )
        for name, parameter in network.named_parameters():
            part = name.split(".")[0]
            if part in _ENCODER or (part == _CLASS_CONDITION and name not in random):
                parameter.requires_grad_(False)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def json_word(value: Any) -> Any:
    """An option as JSON means it: `monai.bundle run` hands on `null`, `true` and `false` as texts.

    Args:
        value: as it came from the command line or a configuration.

    Returns:
        None, True or False for these words, anything else as it is.
    """
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value
