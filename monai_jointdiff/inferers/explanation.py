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
"""What is asked of a counterfactual, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from monai_jointdiff.schedulers import InversionResult

__all__ = ["CounterfactualQuestion", "CounterfactualRecord", "CounterfactualResult"]

_FAR_OUTSIDE = 0.5  # beyond [-1, 1]; on trained networks the rule `classifier` stayed below .35


@dataclass(frozen=True)
class CounterfactualQuestion:
    """What the network should say of each image instead.

    Args:
        target: class to move to, or in a multi-label network the label to change, (N,) int64.
        enforce: multi-label: True makes the label present, False absent; (N,) bool. All True in a multi-class network.
        multi_label: whether the classes are independent labels.
    """

    target: torch.Tensor
    enforce: torch.Tensor
    multi_label: bool

    @classmethod
    def of(
        cls,
        probabilities: torch.Tensor,
        target: int | Sequence[int] | torch.Tensor | None,
        enforce: bool | Sequence[bool] | torch.Tensor | None,
        multi_label: bool,
    ) -> CounterfactualQuestion:
        """The question in full, from what the network says now.

        ====================== ======================================= ==========================================
        request                multi-class                             multi-label
        ====================== ======================================= ==========================================
        target None            most probable class but the predicted   refused: name the label
        target c, enforce True class c                                 label c present
        enforce False          most probable class but c               label c absent
        enforce None           as True                                 label c absent if it is present now
                                                                       (probability of at least .5), else present
        ====================== ======================================= ==========================================

        Args:
            probabilities: of the images now, (N, K).
            target: class or label, one for all images or one per image; None for another class.
            enforce: whether the target is to be present; one for all images or one per image; None: see above.
            multi_label: whether the classes are independent labels.

        Returns:
            The question, one target per image, on the device of the probabilities.

        Raises:
            ValueError: when a target is unknown, the number of targets wrong, or a label is not named.
        """
        number, num_classes = probabilities.shape
        device = probabilities.device
        wanted = None if enforce is None else _spread(torch.as_tensor(enforce, dtype=torch.bool), number, device)
        if target is None:
            if multi_label or (wanted is not None and not bool(wanted.all())):
                raise ValueError(
                    "CounterfactualInferer: name the target: without one, a multi-class image goes to another class."
                )
            return cls(_best_but(probabilities, probabilities.argmax(1)), _all(number, device), False)
        chosen = torch.as_tensor(target)
        if chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise ValueError(f"CounterfactualInferer: target must be a class index or indices, got {chosen.dtype}.")
        chosen = _spread(chosen.long(), number, device)
        if bool(((chosen < 0) | (chosen >= num_classes)).any()):
            raise ValueError(
                f"CounterfactualInferer: target must lie in [0, {num_classes - 1}], the network has {num_classes} "
                f"classes, got {chosen.tolist()}."
            )
        if multi_label:
            present = probabilities.gather(1, chosen[:, None])[:, 0] >= 0.5
            return cls(chosen, ~present if wanted is None else wanted, True)
        if wanted is not None:
            chosen = torch.where(wanted, chosen, _best_but(probabilities, chosen))
        return cls(chosen, _all(number, device), False)

    @classmethod
    def every(
        cls, probabilities: torch.Tensor, enforce: bool | None, multi_label: bool
    ) -> tuple[CounterfactualQuestion, ...]:
        """All questions that can be asked of each image.

        Args:
            probabilities: of the images now, (N, K).
            enforce: multi-label: as for :py:meth:`of`. Multi-class: anything but False.
            multi_label: whether the classes are independent labels.

        Returns:
            Multi-class: K - 1, for each image the classes other than the predicted one, the most probable first.
            Multi-label: K, the labels in turn.

        Raises:
            ValueError: when classes that exclude each other are to be absent in turn.
        """
        if multi_label:
            return tuple(cls.of(probabilities, k, enforce, True) for k in range(probabilities.shape[1]))
        if enforce is False:
            raise ValueError("CounterfactualInferer: every other class is asked for; enforce=False needs one target.")
        predicted = probabilities.argmax(1, keepdim=True)
        order = probabilities.scatter(1, predicted, 2.0).argsort(dim=1, descending=True, stable=True)
        return tuple(cls.of(probabilities, target, True, False) for target in order[:, 1:].unbind(1))

    def probability(self, probabilities: torch.Tensor) -> torch.Tensor:
        """How probable the wanted answer is.

        Args:
            probabilities: (N, K).

        Returns:
            (N,): that of the target, or one minus it where the target is to be absent.
        """
        chosen = probabilities.gather(1, self.target[:, None])[:, 0]
        return torch.where(self.enforce, chosen, 1 - chosen)

    def answered(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Where the network gives the wanted answer.

        Args:
            probabilities: (N, K).

        Returns:
            (N,) bool: the target is the most probable class; multi-label: it is present (probability of at least .5)
            or absent as wanted.
        """
        if not self.multi_label:
            return probabilities.argmax(1) == self.target
        return (probabilities.gather(1, self.target[:, None])[:, 0] >= 0.5) == self.enforce

    def select(self, index: torch.Tensor) -> CounterfactualQuestion:
        """The question for some of the images.

        Args:
            index: indices or mask.

        Returns:
            The same question for those.
        """
        return CounterfactualQuestion(self.target[index], self.enforce[index], self.multi_label)

    def class_labels(self, num_classes: int) -> torch.Tensor:
        """The answer as the condition of a class-conditional network.

        Args:
            num_classes: K.

        Returns:
            (N,) classes; multi-label (N, K), the target 0 or 1 and all other labels -1, unknown.
        """
        if not self.multi_label:
            return self.target
        labels = torch.full((len(self.target), num_classes), -1, device=self.target.device)
        return labels.scatter(1, self.target[:, None], self.enforce.long()[:, None])


def _best_but(probabilities: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Most probable class (N,) other than the one left out (N,)."""
    return probabilities.scatter(1, left_out[:, None], -1.0).argmax(1)


def _spread(values: torch.Tensor, number: int, device: torch.device) -> torch.Tensor:
    """One value per image, (N,)."""
    if values.ndim > 1 or (values.ndim == 1 and len(values) != number):
        raise ValueError(
            f"CounterfactualInferer: one target for all images or one for each of {number} expected, "
            f"got shape {tuple(values.shape)}."
        )
    return values.to(device).expand(number)


def _all(number: int, device: torch.device) -> torch.Tensor:
    return torch.ones(number, dtype=torch.bool, device=device)


# of a record: the same for all images of a batch, and those of which each image has its own
_OF_BATCH = (
    "rule",
    "encoding",
    "inversion_iterations",
    "timesteps",
    "alphas_cumprod",
    "prediction_type",
    "probability",
    "autocast_dtype",
    "scale_factor",
    "model_id",
    "autoencoder_id",
)
_OF_IMAGE = {"target": "target", "enforce": "enforce", "scale": "scale", "seed": "seeds"}


@dataclass(frozen=True)
class CounterfactualRecord:
    """Everything that is needed to make the counterfactuals of a batch again, from the same inputs and weights.

    The same batch in the same order gives the same images bit for bit on the same machine. An image alone, or in
    another batch, is the same to within rounding: networks add up in another order for another batch size.

    Args:
        target: class or label of each image.
        enforce: whether it was to be present, for each image.
        scale: strength of the rule for each image; 0 where the factual reconstruction was enough.
        rule: the guidance rule.
        encoding: how the images were encoded.
        inversion_iterations: network calls per step of the inversion.
        seeds: of the noise of each image.
        timesteps: grid, from the noisiest timestep to 0.
        alphas_cumprod: alpha_bar at these timesteps, in (0, 1).
        prediction_type: what the network predicts.
        probability: how probable the target had to become, in (0, 1); None: the strength was given.
        autocast_dtype: type in which the network ran under autocast, as ``"bfloat16"``; None: its own precision.
        scale_factor: of the latents; 1 in pixel space.
        model_id: identity of the network's weights; None: not known.
        autoencoder_id: identity of the autoencoder's weights; None: not known, or none.
        region: where change was allowed, bool (N, 1, *spatial) of the space that is diffused; None: everywhere.
    """

    target: tuple[int, ...]
    enforce: tuple[bool, ...]
    scale: tuple[float, ...]
    rule: str
    encoding: str
    inversion_iterations: int
    seeds: tuple[int, ...]
    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    prediction_type: str
    probability: float | None
    autocast_dtype: str | None
    scale_factor: float
    model_id: str | None
    autoencoder_id: str | None
    region: torch.Tensor | None

    def of_image(self, index: int) -> dict[str, Any]:
        """The record of one image, ready for JSON; of the region only whether there was one.

        Args:
            index: of the image in the batch.

        Returns:
            plain numbers, texts and lists, with the place of the image in its batch.
        """
        own = {name: getattr(self, field)[index] for name, field in _OF_IMAGE.items()}
        shared = {name: getattr(self, name) for name in _OF_BATCH}
        return {
            **own,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in shared.items()},
            "confined": self.region is not None,
            "index": index,
            "batch_size": len(self.target),
        }

    @classmethod
    def of_images(
        cls, contents: Sequence[Mapping[str, Any]], region: torch.Tensor | None = None
    ) -> CounterfactualRecord:
        """The record of a batch from those of its images.

        Args:
            contents: of :py:meth:`of_image`, one an image, in the order of the batch; other entries are left out.
            region: where change was allowed, bool (N, 1, *spatial), where it was confined.

        Returns:
            The record.

        Raises:
            ValueError: when there are none, one lacks an entry, their settings differ, or the region does not fit.
        """
        needed = (*_OF_IMAGE, *_OF_BATCH, "confined")
        lacking = [name for name in needed if any(name not in content for content in contents)]
        if not contents or lacking:
            raise ValueError(
                f"CounterfactualRecord: the records of at least one image expected, with {', '.join(needed)}; got "
                f"{len(contents)} that lack {', '.join(lacking) or 'nothing'}."
            )
        first = contents[0]
        different = [name for name in (*_OF_BATCH, "confined") if any(c[name] != first[name] for c in contents)]
        if different:
            raise ValueError(
                "CounterfactualRecord: the images of a batch were made with the same settings, got records that differ "
                f"in {', '.join(different)}."
            )
        given = None if region is None else len(region)
        if given != (len(contents) if first["confined"] else None):
            raise ValueError(
                f"CounterfactualRecord: regions for {len(contents) if first['confined'] else 'none'} of the images "
                f"expected, got {given}."
            )
        fields: dict[str, Any] = {field: tuple(c[name] for c in contents) for name, field in _OF_IMAGE.items()}
        for name in _OF_BATCH:
            fields[name] = tuple(first[name]) if isinstance(first[name], list) else first[name]
        return cls(**fields, region=region)


@dataclass(frozen=True)
class CounterfactualResult:
    """Images, what would have to change in them for another answer, and what it took.

    Images are MetaTensors where the input was one. What was made is cut to [-1, 1]: what a file or a screen can show
    is what the probabilities are of.

    Args:
        image: the input (N, C, *spatial).
        counterfactual: what the image would look like (N, C, *spatial) in [-1, 1].
        reconstruction: the factual reconstruction (N, C, *spatial) in [-1, 1]: the same chain without guidance.
        difference: counterfactual minus factual reconstruction, signed (N, C, *spatial) in [-2, 2]. What encoding and
            decoding alone do to an image is thus not taken for a change.
        region: where change was allowed, bool (N, 1, *spatial); None: everywhere.
        probabilities: of the input, by the network's head (N, K).
        probabilities_reconstruction: of the factual reconstruction (N, K).
        probabilities_counterfactual: of the counterfactual (N, K).
        reached: whether the wanted answer is as probable as was asked for, bool (N,).
        already: whether the network gives the wanted answer to the input itself, bool (N,). These are no successes.
        overshoot: how far the counterfactual went outside [-1, 1] before it was cut, >= 0 (N,).
        inversion: latents, calls and residuals of the encoding; None where it added noise.
        network_calls: evaluations of the network or of its encoder per image, mean over the batch; those of an
            autoencoder are not counted. Results of one encoding share its calls and its time in equal parts.
        seconds: wall time of the batch.
        record: to make them again.
    """

    image: torch.Tensor
    counterfactual: torch.Tensor
    reconstruction: torch.Tensor
    difference: torch.Tensor
    region: torch.Tensor | None
    probabilities: torch.Tensor
    probabilities_reconstruction: torch.Tensor
    probabilities_counterfactual: torch.Tensor
    reached: torch.Tensor
    already: torch.Tensor
    overshoot: torch.Tensor
    inversion: InversionResult | None
    network_calls: float
    seconds: float
    record: CounterfactualRecord

    def cautions(self, index: int) -> list[str]:
        """What speaks against the counterfactual of an image, as far as the chain knows.

        Args:
            index: of the image in the batch.

        Returns:
            Sentences; empty when nothing does.
        """
        found = []
        unchanged = self.record.scale[index] == 0
        if bool(self.already[index]):
            end = "nothing was changed." if unchanged else "the change makes it only more probable."
            found.append(f"The network already gives this answer: {end}")
        elif unchanged and bool(self.reached[index]):
            found.append("The factual reconstruction has the requested probability: no change was searched for.")
        elif unchanged:
            found.append("No strength that was tried came closer to the answer than the factual reconstruction.")
        overshoot = float(self.overshoot[index])
        if overshoot > _FAR_OUTSIDE:
            found.append(
                f"Before it was cut the counterfactual left the range of images, [-1, 1], by {overshoot:.1f}: the rule "
                "or its strength does not suit this network."
            )
        return found
