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
"""Rules that bend a reverse step toward a class, by the gradient of the network's own head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from monai_jointdiff.networks import ClassifierHead

from .chain import Parametrization

__all__ = ["ClassifierGuidance", "Guidance", "GuidanceStep", "RepresentationGuidance"]

Edit = Callable[[Any], Any]


class Predict(Protocol):
    """Prediction for a noisy batch, its encoder maps changed by ``edit`` before the decoder sees them."""

    def __call__(self, sample: torch.Tensor, edit: Edit | None = None) -> torch.Tensor:
        """Model output (N, C, *spatial) for x_t (N, C, *spatial)."""


@dataclass(frozen=True)
class GuidanceStep:
    """What a rule sees of a reverse step.

    Args:
        sample: x_t (N, C, *spatial).
        parametrization: noise level of x_t, and what the network predicts.
        predict: the model output for x_t, classifier-free guidance included. It can be differentiated.
        classify: logits (N, K) of clean images, at timestep 0. It can be differentiated.
        head: logits (M, K) from encoder maps. It can be differentiated.
        multi_label: whether the logits are independent labels.
    """

    sample: torch.Tensor
    parametrization: Parametrization
    predict: Predict
    classify: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[Any], torch.Tensor]
    multi_label: bool = False


class Guidance(ABC):
    """A rule that turns the prediction at a reverse step into a guided one.

    Args:
        target: class to move toward, one index or one per image (N,). In a multi-label network, the label to change.
        scale: strength, one number or one per image (N,); 0 leaves the prediction as it is, a negative one moves away
            from the target.
        enforce: in a multi-label network, True makes the label present and False absent, one for all images or one
            per image (N,); the other labels are free.
            A multi-class network knows True only.

    Raises:
        ValueError: when ``target`` is not made of class indices.
    """

    requires: tuple[str, ...] = ("num_classes",)
    """What the network must have for the rule."""

    def __init__(
        self,
        target: int | Sequence[int] | torch.Tensor,
        scale: float | torch.Tensor = 1.0,
        enforce: bool | torch.Tensor = True,
    ) -> None:
        self.target = torch.as_tensor(target)
        self.scale = torch.as_tensor(scale, dtype=torch.float64)
        self.enforce = torch.as_tensor(enforce, dtype=torch.bool)
        if self.target.is_floating_point() or self.target.dtype == torch.bool or self.target.ndim > 1:
            raise ValueError(
                f"{type(self).__name__}: target must be a class index or indices of shape (N,), "
                f"got {self.target.dtype} of shape {tuple(self.target.shape)}."
            )

    @abstractmethod
    def __call__(self, step: GuidanceStep) -> torch.Tensor:
        """The guided model output.

        Args:
            step: the reverse step. Gradients are off; a rule turns them on where it needs them.

        Returns:
            Model output (N, C, *spatial), without a graph.
        """

    def check_network(self, network: Any) -> None:
        """Compares the network with what the rule needs.

        Args:
            network: the bare network, not inside DistributedDataParallel or ``torch.compile``.

        Raises:
            TypeError: when the network lacks something.
        """
        missing = [name for name in self.requires if getattr(network, name, None) is None]
        if missing:
            raise TypeError(
                f"{type(self).__name__}: the network lacks {missing} (JointDiffusionUNet has them), "
                f"got {type(network).__name__}."
            )

    def check(self, batch_size: int, num_classes: int, multi_label: bool) -> None:
        """Compares the target with the network and the batch.

        Args:
            batch_size: number of images N.
            num_classes: number of logits K.
            multi_label: whether the logits are independent labels.

        Raises:
            ValueError: when a class is unknown, the number of targets wrong, or a class of a multi-class network is to
                be removed.
        """
        name = type(self).__name__
        given = (("targets", self.target), ("scales", self.scale), ("values of enforce", self.enforce))
        for what, values in given:
            if values.ndim > 1 or (values.ndim == 1 and len(values) != batch_size):
                raise ValueError(f"{name}: {what} of shape {tuple(values.shape)} for {batch_size} images.")
        if bool(((self.target < 0) | (self.target >= num_classes)).any()):
            raise ValueError(
                f"{name}: target must lie in [0, {num_classes - 1}], the network has {num_classes} classes, "
                f"got {self.target.tolist()}."
            )
        if not multi_label and not bool(self.enforce.all()):
            raise ValueError(f"{name}: enforce=False needs a multi-label network; choose another target class instead.")

    def loss(self, logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
        """Cross-entropy of the target, summed over the batch, so that no image feels its neighbours.

        Args:
            logits: logits (M, K); M is a multiple of the number of targets.
            multi_label: whether the logits are independent labels.

        Returns:
            ``sum -log softmax(logits)[target]``, or ``sum BCE(logits[target], enforce)`` when multi-label; a scalar.
        """
        targets = _for_each(self.target, logits).to(torch.int64)  # (M, 1)
        if not multi_label:
            return F.cross_entropy(logits, targets[:, 0], reduction="sum")
        chosen = logits.gather(1, targets)  # (M, 1)
        return F.binary_cross_entropy_with_logits(chosen, _for_each(self.enforce, logits).to(chosen), reduction="sum")


def _for_each(values: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """One value, or one per image (N,), for a batch (M, ...) that holds the images M / N times: (M, 1, ...)."""
    values = values.to(batch.device).reshape(-1)
    return values.repeat(len(batch) // len(values)).reshape(-1, *[1] * (batch.ndim - 1))


class ClassifierGuidance(Guidance):
    """Classifier guidance on the estimate of the clean image, as in Mediffusion.

    ``x0_hat = (x_t - sigma eps) / alpha``; ``g = d CE(head(encoder(x0_hat, t=0)), target) / d x_t``, through the
    network; ``eps' = eps + scale sigma g``. In terms of the score, ``-eps / sigma``, this adds
    ``scale grad log p(target | x0_hat)``.

    The head sees x0_hat at timestep 0, where it was trained (the published code hands it timestep t). One guided step
    costs two calls of the network and their backward pass.

    Sources: Kaleta et al., "Mediffusion", https://arxiv.org/abs/2411.09434; Dhariwal and Nichol, "Diffusion Models
    Beat GANs on Image Synthesis", https://arxiv.org/abs/2105.05233, Algorithm 2.

    Args:
        target: class to move toward, one index or one per image (N,). In a multi-label network, the label to change.
        scale: strength, one number or one per image (N,); 0 leaves the prediction as it is, a negative one moves away
            from the target.
        enforce: in a multi-label network, True makes the label present and False absent, one for all images or one
            per image (N,); the other labels are free.

    Example:

    .. code-block:: python

        result = inferer.sample(noise, network, scheduler, guidance=ClassifierGuidance(target=1, scale=2.0))
    """

    def __call__(self, step: GuidanceStep) -> torch.Tensor:
        """The guided model output (N, C, *spatial), see :py:class:`Guidance`."""
        with torch.enable_grad():
            x_t = step.sample.detach().requires_grad_()
            output = step.predict(x_t)
            logits = step.classify(step.parametrization.predict_original(output, x_t))
            (gradient,) = torch.autograd.grad(self.loss(logits, step.multi_label), x_t)  # (N, C, *spatial)
        change = _for_each(self.scale.to(gradient.dtype), gradient) * step.parametrization.sigma * gradient
        return step.parametrization.shift_epsilon(output.detach(), change)


class RepresentationGuidance(Guidance):
    """Guidance on the representations: the encoder's maps descend the cross-entropy before the decoder sees them.

    ``r <- r - scale d CE(head(r), target) / d r`` for every map r of the encoder and the middle block of x_t, as in
    JointDiffusion ("sampling with optimized representations"). The paper descends; its published code adds the
    gradient, which moves away from the target. A head that averages every map over its pixels gives one pixel a small
    gradient, and useful scales are large (1000 in the published code). The default head ``standardized`` also takes
    maxima, whose gradient meets single pixels undivided, and knows the statistics of clean images only: on noisy maps
    its logits are far out and the images left their range. The rule refuses it: train with ``head="mediffusion"``, or
    guide by :py:class:`ClassifierGuidance`.

    One guided step costs one call of the network and a backward pass of the head alone.

    Source: Deja, Trzcinski, Tomczak, "Learning Data Representations with Joint Diffusion Models",
    https://arxiv.org/abs/2301.13622.

    Args:
        target: class to move toward, one index or one per image (N,). In a multi-label network, the label to change.
        scale: strength, one number or one per image (N,); 0 leaves the prediction as it is, a negative one moves away
            from the target.
        enforce: in a multi-label network, True makes the label present and False absent, one for all images or one
            per image (N,); the other labels are free.
    """

    requires = ("num_classes", "encode", "decode", "head")

    def check_network(self, network: Any) -> None:
        """Compares the network with what the rule needs.

        Args:
            network: the bare network, not inside DistributedDataParallel or ``torch.compile``.

        Raises:
            TypeError: when the network lacks something.
            ValueError: when its head is ``standardized``.
        """
        super().check_network(network)
        head = getattr(network, "classifier", None)
        if isinstance(head, ClassifierHead) and head.with_maximum:
            raise ValueError(
                "RepresentationGuidance: the network's head is 'standardized', which takes maxima of the maps and "
                "knows those of clean images only; this rule needs one that averages. Train with head='mediffusion' "
                "(bundles: --head mediffusion of train.json), or guide by ClassifierGuidance (rule 'classifier')."
            )

    def __call__(self, step: GuidanceStep) -> torch.Tensor:
        """The guided model output (N, C, *spatial), see :py:class:`Guidance`."""

        def descend(features: Any) -> Any:
            return self.descend(features, step.head, step.multi_label)

        return step.predict(step.sample, edit=descend)

    def descend(self, features: Any, head: Callable[[Any], torch.Tensor], multi_label: bool = False) -> Any:
        """One gradient step on the encoder's maps.

        Args:
            features: maps of the encoder, a NamedTuple with ``skips`` and ``middle``.
            head: logits (M, K) from them.
            multi_label: whether the logits are independent labels.

        Returns:
            The moved maps, in the type they came in.
        """
        with torch.enable_grad():
            maps = [m.detach().requires_grad_() for m in (*features.skips, features.middle)]
            loss = self.loss(head(features._replace(skips=maps[:-1], middle=maps[-1])), multi_label)
            gradients = torch.autograd.grad(loss, maps)
        moved = [m.detach() - _for_each(self.scale.to(m.dtype), m) * g for m, g in zip(maps, gradients, strict=True)]
        return features._replace(skips=moved[:-1], middle=moved[-1])
