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
"""The network as a reverse chain sees it: with its condition, guidance and precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .chain import ReverseChain
from .guidance import Edit, Guidance, GuidanceStep

__all__ = ["Denoiser"]


class Denoiser:
    """Predictions of a network for a reverse chain, and what they took.

    ``calls`` counts calls of the network or of its encoder alone, ``evaluations`` the images in them: a call on the
    conditional and the unconditional half of classifier-free guidance evaluates each image twice.

    Args:
        network: the joint network, or any network called as ``network(x, timesteps)``.
        autocast_dtype: type to run the network in under autocast; None for its own precision.
    """

    def __init__(self, network: nn.Module, autocast_dtype: torch.dtype | None = None) -> None:
        self.network = network
        self.autocast_dtype = autocast_dtype
        self.calls = 0
        self.evaluations = 0
        self.labels: torch.Tensor | None = None
        self.context: torch.Tensor | None = None
        self.bare = _bare_network(network)
        self.name = type(self.bare).__name__
        self.num_classes: int | None = getattr(self.bare, "num_classes", None)
        self.multi_label = bool(getattr(self.bare, "multi_label", False))

    def set_condition(
        self,
        batch_size: int,
        device: torch.device,
        class_labels: int | torch.Tensor | None = None,
        context: torch.Tensor | None = None,
    ) -> None:
        """Takes the condition of the batch, after comparing it with the network.

        Args:
            batch_size: number of images N.
            device: where they are.
            class_labels: one class, classes (N,), or multi-hot (N, K); None for the null class.
            context: context (N, L, D).

        Raises:
            ValueError: when the network is not class-conditional, or labels have the wrong shape or range.
        """
        self.context = None if context is None else plain(context).to(device)
        if class_labels is None:
            self.labels = None
            return
        # MONAI's networks tell by num_class_embeds; of a network with neither attribute nothing is known
        if getattr(self.bare, "class_conditional", getattr(self.bare, "num_class_embeds", True)) in (None, False):
            raise ValueError(f"JointDiffusionInferer: class_labels given, but {self.name} is not class-conditional.")
        self.labels = torch.as_tensor(unwrap(class_labels), device=device)
        if self.multi_label:
            self._check_labels("multi-hot", (batch_size, self.num_classes), -1, 1)
            self.labels = self.labels.to(torch.float32)
        else:
            self.labels = self.labels.expand(batch_size) if self.labels.ndim == 0 else self.labels
            last = self.num_classes  # the null class
            if last is None and hasattr(self.bare, "num_class_embeds"):
                last = self.bare.num_class_embeds - 1
            self._check_labels("class indices", (batch_size,), 0, last)

    def _check_labels(self, kind: str, shape: tuple[Any, ...], low: int, high: int | None) -> None:
        labels: Any = self.labels
        integers = self.multi_label or not labels.is_floating_point()
        if tuple(labels.shape) != shape or not integers:
            raise ValueError(
                f"JointDiffusionInferer: class_labels of {self.name} must be {kind} of shape {shape}, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        if bool((labels < low).any()) or (high is not None and bool((labels > high).any())):
            raise ValueError(
                f"JointDiffusionInferer: class_labels of {self.name} must lie in [{low}, {high}], "
                f"got {labels.tolist()}."
            )

    def check_guidance(self, batch_size: int, guidance_scale: float | torch.Tensor, guidance: Guidance | None) -> None:
        """Compares the guidance asked for with the network and its condition.

        Args:
            batch_size: number of images N.
            guidance_scale: scale of classifier-free guidance, one number or one per image (N,).
            guidance: rule, or None.

        Raises:
            ValueError: when classifier-free guidance has no class, or the target or the head does not fit.
            TypeError: when the network lacks what the guidance needs.
            RuntimeError: when a rule needs gradients within ``torch.inference_mode``.
        """
        plainly = _is(guidance_scale, 0.0) or _is(guidance_scale, 1.0)
        if not plainly and self.labels is None:
            raise ValueError(f"JointDiffusionInferer: guidance_scale={guidance_scale} needs class_labels.")
        if not _is(guidance_scale, 1.0) and self.labels is not None and self.num_classes is None:
            raise TypeError(
                f"JointDiffusionInferer: guidance_scale={guidance_scale} needs a network with a null class "
                f"(JointDiffusionUNet), got {self.name}."
            )
        if guidance is None:
            return
        guidance.check_network(self.bare)
        guidance.check(batch_size, self.bare.num_classes, self.multi_label)
        if torch.is_inference_mode_enabled():
            rule = type(guidance).__name__
            raise RuntimeError(f"{rule} needs gradients: sample under torch.no_grad, not torch.inference_mode.")

    def __call__(
        self,
        chain: ReverseChain,
        index: int,
        sample: torch.Tensor,
        guidance_scale: float | torch.Tensor = 1.0,
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """The model output (N, C, *spatial) at a step of a chain.

        Args:
            chain: the chain.
            index: which step, counted from 0.
            sample: sample (N, C, *spatial) of the chain before the step.
            guidance_scale: scale of classifier-free guidance, one number or one per image (N,).
            guidance: rule, or None.

        Returns:
            Model output (N, C, *spatial), guided, without a graph, float32.
        """
        x_t = chain.model_input(index, sample)
        timestep = chain.timesteps[index]
        if guidance is None:
            return self.predict(x_t, timestep, guidance_scale)

        def predict(sample: torch.Tensor, edit: Edit | None = None) -> torch.Tensor:
            return self.predict(sample, timestep, guidance_scale, edit)

        parametrization = chain.parametrization(index)
        return guidance(GuidanceStep(x_t, parametrization, predict, self.classify, self.head, self.multi_label))

    def predict(
        self,
        sample: torch.Tensor,
        timestep: float,
        guidance_scale: float | torch.Tensor = 1.0,
        edit: Edit | None = None,
    ) -> torch.Tensor:
        """The model output for x_t, ``null + guidance_scale (conditional - null)``.

        Args:
            sample: x_t (N, C, *spatial).
            timestep: timestep of all images.
            guidance_scale: scale of classifier-free guidance, one number or one per image (N,).
            edit: changes the encoder's maps before the decoder sees them.

        Returns:
            Model output (N, C, *spatial), float32.
        """
        if self.labels is None or _is(guidance_scale, 1.0):
            return self._forward(sample, timestep, self.labels, self.context, edit)
        null = torch.full_like(self.labels, -1 if self.multi_label else self.num_classes)  # type: ignore[arg-type]
        if _is(guidance_scale, 0.0):
            return self._forward(sample, timestep, null, self.context, edit)
        context = None if self.context is None else torch.cat([self.context, self.context])
        both = self._forward(torch.cat([sample, sample]), timestep, torch.cat([self.labels, null]), context, edit)
        conditional, unconditional = both.chunk(2)
        if isinstance(guidance_scale, torch.Tensor):
            guidance_scale = guidance_scale.to(sample).reshape(-1, *[1] * (sample.ndim - 1))
        return unconditional + guidance_scale * (conditional - unconditional)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) of clean images (N, C, *spatial)."""
        self._count(images)
        return classify(images, self.network, self.autocast_dtype)

    def head(self, features: Any) -> torch.Tensor:
        """Logits (M, K) from encoder maps."""
        return at_least_float32(self.bare.head(features))

    def _forward(
        self,
        sample: torch.Tensor,
        timestep: float,
        labels: torch.Tensor | None,
        context: torch.Tensor | None,
        edit: Edit | None,
    ) -> torch.Tensor:
        self._count(sample)
        dtype = torch.int64 if isinstance(timestep, int) else torch.float32
        timesteps = torch.full((len(sample),), timestep, dtype=dtype, device=sample.device)
        condition = given(context=context, class_labels=labels)
        with autocast(sample, self.autocast_dtype):
            if edit is None:
                return at_least_float32(self.network(sample, timesteps, **condition))
            features = self.bare.encode(sample, timesteps, **condition)
            return at_least_float32(self.bare.decode(edit(features)))

    def _count(self, batch: torch.Tensor) -> None:
        self.calls += 1
        self.evaluations += len(batch)


def _is(guidance_scale: float | torch.Tensor, value: float) -> bool:
    """Whether one number for all images has this value."""
    return not isinstance(guidance_scale, torch.Tensor) and guidance_scale == value


def classify(images: torch.Tensor, network: nn.Module, autocast_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Logits (N, K) of clean images (N, C, *spatial), float32."""
    images = plain(images)
    with autocast(images, autocast_dtype):
        return at_least_float32(network(images))


def autocast(like: torch.Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to the type on the device of a tensor; no change for None."""
    return nullcontext() if dtype is None else torch.autocast(like.device.type, dtype=dtype)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule has its own mode back (a frozen one stays frozen)."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def without_ddp(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel: one process may sample alone, without waiting for the others."""
    return network.module if isinstance(network, (DataParallel, DistributedDataParallel)) else network


def _bare_network(network: nn.Module) -> Any:
    """The network inside DistributedDataParallel and ``torch.compile``, which has its attributes."""
    inner = getattr(without_ddp(network), "_orig_mod", without_ddp(network))
    return inner if inner is network else _bare_network(inner)


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def unwrap(x: Any) -> Any:
    """The plain tensor in a MetaTensor (which makes a small network half as slow again); anything else as it is."""
    return x.as_tensor() if isinstance(x, MetaTensor) else x


def plain(x: torch.Tensor) -> torch.Tensor:
    """A plain tensor of at least float32."""
    return at_least_float32(unwrap(x))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
