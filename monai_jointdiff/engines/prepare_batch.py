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

"""From a batch of the loader to the arguments of inferer and loss; noise and timesteps by draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from monai.engines import PrepareBatch
from torch import Tensor

from monai_jointdiff.data import draw_seed
from monai_jointdiff.inferers import LatentSpace
from monai_jointdiff.losses import favero_weight, min_snr_weight
from monai_jointdiff.schedulers import GridScheduler

__all__ = ["JointPrepareBatch", "PreparedBatch", "ValidationPrepareBatch"]

TASKS = ("joint", "denoise", "classify")
BY_SNR = {"min_snr": min_snr_weight, "favero": favero_weight}
WEIGHTINGS = ("uniform", *BY_SNR)


class PreparedBatch(NamedTuple):
    """What an engine gives its inferer and its loss.

    Args:
        inputs: image (N, C, *spatial), or its latents, first argument of the inferer.
        targets: `label` (M,) int64 or (M, K) float, `target` (N, C, *spatial), `weight` (N,); second argument of the
            loss.
        args: none.
        kwargs: `noise` (N, C, *spatial), `timesteps` (N,), `clean` (M, C, *spatial) and, if the network is
            class-conditional, `class_labels`; keywords of the inferer.
    """

    inputs: Tensor
    targets: dict[str, Tensor]
    args: tuple[()]
    kwargs: dict[str, Tensor]


class JointPrepareBatch(PrepareBatch):
    """Turns a batch of the loader into the arguments of a joint training step.

    Noise, timestep and label dropout of an image are functions of (seed, number of its draw): a resumed run, another
    number of workers and another number of processes see the same. They are drawn on the CPU in float32 whatever the
    device, so they do not depend on it.

    With an autoencoder both images are encoded here, since the target of a prediction may depend on the latents, and
    noise is drawn in their shape; the inferer, which is then given latents, is one without the autoencoder.

    Args:
        scheduler: noise process; gives the prediction's target and the SNR.
        seed: of the run.
        weighting: w(t): `uniform` (1), `min_snr` (:func:`~monai_jointdiff.losses.min_snr_weight`) or `favero`
            (:func:`~monai_jointdiff.losses.favero_weight`).
        gamma: bound of the SNR in the weight, of `min_snr` and `favero`.
        clean_key: key of the image that the head sees (augmented), (N, C, *spatial).
        label_dropout: probability with which an image's class is hidden from a class-conditional network, in [0, 1].
        class_conditional: whether the network is given the class.
        num_classes: number of classes, the index of the null class; needed by a class-conditional network with
            integer labels (a multi-label network has a row of -1 for it).
        task: `joint`; `denoise` for a network without head (no `clean`, no `label`); `classify` for one without
            decoder (the clean image is the input, the label the only target). The controls of the joint model.
        autoencoder: an ``AutoencoderKL`` on whose latents the network is trained; it is given no gradient.
        scale_factor: factor of the latents.

    Raises:
        ValueError: for an unknown weighting or task, a probability out of range, or a missing `num_classes`.

    Example:
        >>> from monai_jointdiff.schedulers import make_scheduler
        >>> prepare = JointPrepareBatch(make_scheduler("ddim"), seed=0, clean_key="image")
        >>> batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.tensor([0, -1]), "draw": torch.tensor([6, 7])}
        >>> image, targets, _, keywords = prepare(batch, "cpu")
        >>> sorted(targets), sorted(keywords)
        (['label', 'target', 'weight'], ['clean', 'noise', 'timesteps'])
    """

    def __init__(
        self,
        scheduler: GridScheduler,
        seed: int,
        weighting: str = "uniform",
        gamma: float = 5.0,
        clean_key: str = "image_cls",
        label_dropout: float = 0.15,
        class_conditional: bool = False,
        num_classes: int | None = None,
        task: str = "joint",
        autoencoder: Any = None,
        scale_factor: float = 1.0,
    ) -> None:
        name = type(self).__name__
        if weighting not in WEIGHTINGS:
            raise ValueError(f"{name}: weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
        if task not in TASKS:
            raise ValueError(f"{name}: task must be one of {TASKS}, got {task!r}.")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"{name}: label_dropout must be in [0, 1], got {label_dropout}.")
        self.scheduler = scheduler
        self.seed = seed
        self.weighting = weighting
        self.gamma = gamma
        self.clean_key = clean_key
        self.label_dropout = label_dropout
        self.class_conditional = class_conditional
        self.num_classes = num_classes
        self.task = task
        self.space = LatentSpace(autoencoder, scale_factor)

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> PreparedBatch:
        """Prepare one batch.

        Args:
            batchdata: `image` (N, C, *spatial) in [-1, 1], the image at `clean_key`, `label` ((N,) int64 or (N, K)),
                and what identifies the images: `draw` (N,).
            device: of the results.
            non_blocking: as for `Tensor.to`.
            kwargs: further arguments of `Tensor.to` for the images, for example `dtype`.

        Returns:
            arguments of the inferer and of the loss.

        Raises:
            ValueError: if the batch lacks a key, or labels do not fit a class-conditional network.
        """
        move = partial(_move, device=device, non_blocking=non_blocking)
        if self.task == "classify":
            clean = self._encode(move(self._tensor(batchdata, self.clean_key), **kwargs))
            return PreparedBatch(clean, {"label": move(self._tensor(batchdata, "label"))}, (), {})

        prepared = self._noisy_part(batchdata, device, non_blocking, **kwargs)
        if self.task == "joint":
            prepared.targets["label"] = move(self._tensor(batchdata, "label"))
            prepared.kwargs["clean"] = self._encode(move(self._tensor(batchdata, self.clean_key), **kwargs))
        return prepared

    def seeds(self, batchdata: Mapping[str, Any]) -> list[int]:
        """One seed per image, of its noise, timestep and label dropout."""
        draws = self._tensor(batchdata, "draw")
        return [draw_seed(self.seed, int(draw), "noise") for draw in draws]

    def _noisy_part(
        self, batchdata: Mapping[str, Any], device: str | torch.device | None, non_blocking: bool, **kwargs: Any
    ) -> PreparedBatch:
        """What the denoising needs, without the images that the head sees and without their labels."""
        move = partial(_move, device=device, non_blocking=non_blocking)
        image = self._encode(move(self._tensor(batchdata, "image"), **kwargs))
        seeds = self.seeds(batchdata)
        drawn = [_draw(seed, image.shape[1:], self.scheduler.num_train_timesteps) for seed in seeds]
        noise = move(torch.stack([one.noise for one in drawn])).to(image.dtype)
        timesteps = torch.tensor([one.timestep for one in drawn])
        weight = move(self._weight(timesteps).to(image.dtype))
        timesteps = move(timesteps)
        targets = {"target": self.scheduler.training_target(image, noise, timesteps), "weight": weight}
        keywords = {"noise": noise, "timesteps": timesteps}
        if self.class_conditional:
            hidden = torch.tensor([one.uniform < self.label_dropout for one in drawn])
            keywords["class_labels"] = move(self._class_labels(self._tensor(batchdata, "label"), hidden))
        return PreparedBatch(image, targets, (), keywords)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """What the network sees of images (N, C, *spatial)."""
        return self.space.encode(images)

    def _weight(self, timesteps: Tensor) -> Tensor:
        if self.weighting == "uniform":
            return torch.ones(len(timesteps))
        return BY_SNR[self.weighting](self.scheduler.snr(timesteps), self.scheduler.prediction_type, self.gamma)

    def _class_labels(self, label: Tensor, hidden: Tensor) -> Tensor:
        """The network's class condition: the null class for hidden and unlabelled images."""
        if label.ndim == 2:
            return torch.where(hidden[:, None], -torch.ones_like(label), label)
        if self.num_classes is None:
            raise ValueError(f"{type(self).__name__}: a class-conditional network with classes needs num_classes.")
        return torch.where(hidden | (label < 0), torch.full_like(label, self.num_classes), label)

    def _tensor(self, batchdata: Mapping[str, Any], key: str) -> Tensor:
        if key not in batchdata:
            raise ValueError(f"{type(self).__name__}: the batch has no '{key}', it has {sorted(batchdata)}.")
        value = torch.as_tensor(batchdata[key])
        return value.as_tensor() if isinstance(value, MetaTensor) else value  # the subclass costs 50 % in a network


class ValidationPrepareBatch(JointPrepareBatch):
    """Turns a batch of a validation or test loader into the arguments of the joint forward.

    The image is its own clean image. Noise and timestep of an image are functions of (seed, its name), the same in
    every validation, whatever the order of the images, the batch size and the number of processes. A class-conditional
    network is given the class where it is known.

    Args:
        scheduler: noise process.
        seed: of the validation.
        weighting: w(t), as in :class:`JointPrepareBatch`.
        gamma: as in :class:`JointPrepareBatch`.
        class_conditional: whether the network is given the class.
        num_classes: as in :class:`JointPrepareBatch`.
        task: as in :class:`JointPrepareBatch`.
        name_key: key of the images' names in the batch.
        autoencoder: as in :class:`JointPrepareBatch`.
        scale_factor: as in :class:`JointPrepareBatch`.
    """

    def __init__(
        self,
        scheduler: GridScheduler,
        seed: int,
        weighting: str = "uniform",
        gamma: float = 5.0,
        class_conditional: bool = False,
        num_classes: int | None = None,
        task: str = "joint",
        name_key: str = "name",
        autoencoder: Any = None,
        scale_factor: float = 1.0,
    ) -> None:
        super().__init__(
            scheduler,
            seed,
            weighting,
            gamma,
            clean_key="image",
            label_dropout=0.0,
            class_conditional=class_conditional,
            num_classes=num_classes,
            task=task,
            autoencoder=autoencoder,
            scale_factor=scale_factor,
        )
        self.name_key = name_key

    def seeds(self, batchdata: Mapping[str, Any]) -> list[int]:
        """One seed per image, of its noise and timestep."""
        names = batchdata.get(self.name_key)
        if not isinstance(names, Sequence) or isinstance(names, str):
            raise ValueError(f"{type(self).__name__}: the batch has no list of names at '{self.name_key}'.")
        return [draw_seed(self.seed, 0, f"validation/{name}") for name in names]


class _Draw(NamedTuple):
    noise: Tensor  # (C, *spatial) float32
    timestep: int  # in [0, T)
    uniform: float  # in [0, 1)


def _move(tensor: Tensor, **options: Any) -> Tensor:
    return tensor.to(**options)


def _draw(seed: int, shape: torch.Size, num_train_timesteps: int) -> _Draw:
    generator = torch.Generator().manual_seed(seed)
    timestep = int(torch.randint(num_train_timesteps, (), generator=generator))
    uniform = float(torch.rand((), generator=generator))
    return _Draw(torch.randn(shape, generator=generator), timestep, uniform)
