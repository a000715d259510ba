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

"""The autoencoder below a diffusion model on latents: its description, its weights, its scale."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.networks.nets import AutoencoderKL

from monai_jointdiff.data import ImageSource
from monai_jointdiff.engines.bundle import json_word, load_weights
from monai_jointdiff.handlers.atomic import atomic_save, atomic_write_text
from monai_jointdiff.inferers import LatentSpace

__all__ = [
    "AutoencoderDescription",
    "FirstStage",
    "autoencoder_arguments",
    "build_autoencoder",
    "describe_autoencoder",
    "latent_scale_factor",
    "load_autoencoder_weights",
    "open_first_stage",
    "weights_fingerprint",
]

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "autoencoder.pt", "autoencoder.json"
_OLD_NAMES = {"num_channels": "channels", "use_checkpointing": "use_checkpoint"}  # of monai-generative 0.2
_SAME = 1e-10  # of the mean square: smaller variances are rounding
_TRAIN = "Train one with train_autoencoder.json of the bundle"


@dataclass(frozen=True)
class AutoencoderDescription:
    """What a program needs to use a trained autoencoder: `models/autoencoder.json`, and a part of `model.json`.

    Args:
        network: arguments of MONAI's `AutoencoderKL`.
        scale_factor: by which latents are multiplied before a diffusion network sees them, > 0: 1 / their standard
            deviation on training images, so that they are as large as the noise (Rombach et al., arXiv 2112.10752, G).
        fingerprint: of the weights, see :func:`weights_fingerprint`.
        data: `ImageSource.description()` of the images it was trained on; None: not known.

    Raises:
        ValueError: for a scale factor that is not positive and finite.
    """

    network: dict[str, Any]
    scale_factor: float
    fingerprint: str
    data: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            raise ValueError(f"AutoencoderDescription: scale_factor must be > 0, got {self.scale_factor}.")

    @property
    def downsampling(self) -> int:
        """How many pixels of each axis become one."""
        return int(2 ** (len(self.network["channels"]) - 1))

    def latent_shape(self, image_size: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (L, *latent) of the latents of an image.

        Args:
            image_size: of the image, one number per axis.

        Returns:
            channels and size.

        Raises:
            ValueError: when a size is not divisible.
        """
        factor = self.downsampling
        if any(size % factor for size in image_size):
            raise ValueError(
                f"AutoencoderDescription: the autoencoder makes {factor} pixels one; each of image_size must be "
                f"divisible by it, got {' x '.join(map(str, image_size))}."
            )
        return (int(self.network["latent_channels"]), *(size // factor for size in image_size))

    def save(self, path: str | Path) -> None:
        """Write the description as JSON, never half written."""
        atomic_write_text(path, json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=4) + "\n")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AutoencoderDescription:
        """Read the content of an `autoencoder.json`, or of the part of a `model.json`.

        Args:
            content: as :meth:`save` writes it; without `format_version` in a `model.json`.

        Returns:
            the description.

        Raises:
            ValueError: when the format is another one or a part is missing.
        """
        version = content.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{cls.__name__}: format_version is {version!r}, this version of monai_jointdiff reads "
                f"{FORMAT_VERSION}."
            )
        missing = [key for key in ("network", "scale_factor", "fingerprint") if key not in content]
        if missing:
            raise ValueError(f"{cls.__name__}: missing in the autoencoder's description: {', '.join(missing)}.")
        return cls(
            network=autoencoder_arguments(content["network"]),
            scale_factor=float(content["scale_factor"]),
            fingerprint=str(content["fingerprint"]),
            data=content.get("data"),
        )


@dataclass(frozen=True)
class FirstStage:
    """A trained autoencoder with its description; it learns nothing any more.

    Args:
        network: in evaluation mode, without gradients.
        description: of it.
    """

    network: AutoencoderKL
    description: AutoencoderDescription

    @property
    def space(self) -> LatentSpace:
        """The way from images to scaled latents and back."""
        return LatentSpace(self.network, self.description.scale_factor)

    def save(self, directory: str | Path) -> None:
        """Write `autoencoder.pt`, a plain state dict, and `autoencoder.json`.

        Args:
            directory: of the files, made when it is missing.
        """
        weights = {key: value.detach().cpu() for key, value in self.network.state_dict().items()}
        atomic_save(weights, Path(directory) / WEIGHTS)
        self.description.save(Path(directory) / DESCRIPTION)

    @classmethod
    def load(
        cls, weights: str | Path, device: torch.device, description: AutoencoderDescription | None = None
    ) -> FirstStage:
        """Read weights that are described.

        Args:
            weights: `autoencoder.pt`.
            device: for the network.
            description: what a `model.json` says of the autoencoder; None: the `.json` file beside the weights.

        Returns:
            the autoencoder.

        Raises:
            ValueError: when a file is missing or unreadable, or they do not belong together.
        """
        weights = Path(weights)
        said_by = weights.with_suffix(".json").name if description is None else "model.json"
        if description is None:
            description = AutoencoderDescription.from_dict(_read_json(weights.with_suffix(".json")))
        network = build_autoencoder(description.network)
        load_autoencoder_weights(network, weights)
        if weights_fingerprint(network.state_dict()) != description.fingerprint:
            raise ValueError(
                f"FirstStage: {weights} is not the autoencoder that {said_by} is about: it was trained again or "
                "exchanged. Put the right one there, or train anew on this one."
            )
        return cls(_finished(network, device), description)


def autoencoder_arguments(definition: Mapping[str, Any]) -> dict[str, Any]:
    """All constructor arguments of an `AutoencoderKL`, defaults included, ready for JSON.

    Args:
        definition: those that were given; monai-generative's `num_channels` and `use_checkpointing` are understood.

    Returns:
        names and values.

    Raises:
        ValueError: for a name that `AutoencoderKL` does not have, or a missing `spatial_dims`.
    """
    if not isinstance(definition, Mapping):
        raise ValueError(
            f"autoencoder_arguments: a dictionary of AutoencoderKL's arguments expected, got {definition!r}."
        )
    given = {_OLD_NAMES.get(name, name): value for name, value in definition.items() if name != "_target_"}
    signature = inspect.signature(AutoencoderKL)
    unknown = sorted(set(given) - set(signature.parameters))
    if unknown or "spatial_dims" not in given:
        what = f"unknown: {', '.join(unknown)}" if unknown else "missing: spatial_dims"
        raise ValueError(
            f"autoencoder_arguments: {what}. MONAI's AutoencoderKL takes {', '.join(signature.parameters)}."
        )
    bound = signature.bind(**given)
    bound.apply_defaults()
    return {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in bound.arguments.items()}


def build_autoencoder(definition: Mapping[str, Any]) -> AutoencoderKL:
    """An untrained autoencoder.

    Args:
        definition: as for :func:`autoencoder_arguments`.

    Returns:
        the network.
    """
    return AutoencoderKL(**autoencoder_arguments(definition))


def load_autoencoder_weights(network: AutoencoderKL, path: str | Path) -> None:
    """Load weights of MONAI or monai-generative.

    monai-generative named the attention's layers otherwise, and had one that it never used (`proj_attn`): its weights
    give their own outputs only in a network with `include_fc=False`.

    Args:
        network: changed in place.
        path: file with a plain state dict, read with `weights_only=True`.

    Raises:
        ValueError: when the weights do not fit the network.
    """
    weights = load_weights(path)
    own = network.state_dict()
    is_old = any(name not in own and name.endswith((".proj_attn.weight", ".conv.conv.weight")) for name in weights)
    if is_old and any(name.endswith(".attn.out_proj.weight") for name in own):
        raise ValueError(
            f"load_autoencoder_weights: {path} holds weights of monai-generative, whose attention has no output layer; "
            "say include_fc false in the autoencoder's arguments."
        )
    try:
        if is_old:
            network.load_old_state_dict(dict(weights))
        else:
            network.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"load_autoencoder_weights: {path} does not fit the autoencoder's arguments: {error}"
        ) from error


def weights_fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, types, shapes and values: weights with another one are other weights.

    Args:
        state_dict: of a network.

    Returns:
        `sha256:` and 64 digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


@torch.no_grad()
def latent_scale_factor(
    network: AutoencoderKL, source: ImageSource, device: torch.device, max_images: int = 1000, batch_size: int = 64
) -> float:
    """1 / standard deviation of all entries of the (mean) latents of training images.

    Args:
        network: the autoencoder, in evaluation mode.
        source: the data.
        device: where the network is.
        max_images: images at most, evenly spread over the training part.
        batch_size: images at once.

    Returns:
        the factor.

    Raises:
        ValueError: when all latents are equal, or not finite.
    """
    items = source.part("train")
    step = math.ceil(len(items) / max_images)
    loader = DataLoader(Dataset(items[::step], source.preprocessing()), batch_size=batch_size, num_workers=0)
    count, total, squares = 0, 0.0, 0.0
    for batch in loader:
        latents = LatentSpace(network).encode(torch.as_tensor(batch["image"]).as_subclass(torch.Tensor).to(device))
        latents = latents.double()
        count += latents.numel()
        total += float(latents.sum())
        squares += float(latents.square().sum())
    variance = squares / count - (total / count) ** 2
    if not (math.isfinite(variance) and variance > _SAME * squares / count):
        raise ValueError(
            f"latent_scale_factor: the variance of the latents is {variance}, their mean square {squares / count}: "
            f"they tell nothing of the images. {_TRAIN} on these images."
        )
    return variance**-0.5


def open_first_stage(
    path: str | Path, source: ImageSource, device: torch.device, definition: Mapping[str, Any] | str | None = None
) -> FirstStage:
    """The autoencoder on whose latents a diffusion model is to be trained.

    Args:
        path: folder with `autoencoder.pt` and `autoencoder.json` as `train_autoencoder.json` leaves them; or any file
            with the plain state dict of an `AutoencoderKL` of MONAI or monai-generative.
        source: the data of the diffusion model. Of a file it also gives the scale factor.
        device: for the network.
        definition: constructor arguments of the autoencoder in a file; None: those in the `.json` file beside it with
            the same name.

    Returns:
        the autoencoder.

    Raises:
        ValueError: when there is none, its parts do not fit each other, or it does not fit the data.
    """
    weights, given = Path(path), json_word(definition)
    weights = weights if weights.suffix == ".pt" or weights.is_file() else weights / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"open_first_stage: there is no {weights}. {_TRAIN}, or name another: --autoencoder FILE.pt.")
    content: Any = _read_json(weights.with_suffix(".json")) if given is None else given
    if isinstance(content, Mapping) and "fingerprint" in content:
        stage = FirstStage.load(weights, device)
        _check_images(stage.description.network, source)
        _check_intensity(stage.description, source)
    else:
        network = build_autoencoder(content)
        load_autoencoder_weights(network, weights)
        _check_images(autoencoder_arguments(content), source)
        stage = describe_autoencoder(network, content, source, device, trained_on_it=False)
    stage.description.latent_shape(source.image_size)
    return stage


def describe_autoencoder(
    network: AutoencoderKL,
    definition: Mapping[str, Any],
    source: ImageSource,
    device: torch.device,
    trained_on_it: bool = True,
) -> FirstStage:
    """A trained autoencoder with its scale factor, measured on training images.

    Args:
        network: with its final weights.
        definition: its constructor arguments.
        source: the data.
        device: for the network.
        trained_on_it: whether it was trained on these data.

    Returns:
        the autoencoder, in evaluation mode and without gradients.
    """
    network = _finished(network, device)
    description = AutoencoderDescription(
        network=autoencoder_arguments(definition),
        scale_factor=latent_scale_factor(network, source, device),
        fingerprint=weights_fingerprint(network.state_dict()),
        data=source.description() if trained_on_it else None,
    )
    return FirstStage(network, description)


def _finished(network: AutoencoderKL, device: torch.device) -> AutoencoderKL:
    return network.to(device).eval().requires_grad_(False)


def _check_images(arguments: Mapping[str, Any], source: ImageSource) -> None:
    expected = {"spatial_dims": source.spatial_dims, "in_channels": source.in_channels}
    wrong = [
        f"{name} {arguments[name]} (of the images: {value})"
        for name, value in expected.items()
        if arguments[name] != value
    ]
    if wrong:
        raise ValueError(
            f"open_first_stage: the autoencoder is not one for images of {source.name}: {'; '.join(wrong)}."
        )


def _check_intensity(description: AutoencoderDescription, source: ImageSource) -> None:
    theirs = None if description.data is None else description.data["intensity"]
    ours = source.description()["intensity"]
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"open_first_stage: the autoencoder was trained on images scaled by {theirs}, those of {source.name} are "
            f"scaled by {ours}. {_TRAIN} on these images."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"open_first_stage: cannot read the arguments of the autoencoder from {path}: {error}. Put them there, or "
            "give them: --autoencoder_def."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"open_first_stage: {path} holds no JSON object.")
    return content
