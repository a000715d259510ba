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

"""Clipping of gradients, and a stop at the first number that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from monai_jointdiff.losses import JointDiffusionLoss

from .utils import is_optimizer_step

__all__ = ["GradientClipping", "NonFiniteGuard"]


class GradientClipping:
    """Handler of a trainer: scales the gradients down to a largest norm before the optimizer's step.

    The norm is the Euclidean one over all parameters together. Under `DistributedDataParallel` it is taken after the
    processes' gradients are averaged, so all processes scale alike.

    Args:
        max_norm: > 0.
        network: whose gradients are clipped.

    Attributes:
        norm: the norm before clipping at the last step; NaN before the first.

    Raises:
        FloatingPointError: in training, when the norm is not finite, naming step and images.
    """

    def __init__(self, max_norm: float, network: nn.Module) -> None:
        if not max_norm > 0:
            raise ValueError(f"GradientClipping: max_norm must be > 0, got {max_norm}.")
        self.max_norm = max_norm
        self.network = network
        self.norm = float("nan")

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip, if the optimizer steps in this iteration."""
        if not is_optimizer_step(engine):
            return
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        self.norm = float(norm)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"GradientClipping: the gradient's norm is {self.norm} at {_where(engine)}, images {_names(engine)}."
            )


class NonFiniteGuard:
    """Handler of a trainer: stops at the first loss that is NaN or infinite, before it reaches the weights.

    Args:
        loss: whose terms are watched.
        name_key: key of the images' names in the batch.

    Raises:
        FloatingPointError: in training, naming the step, the terms and the images: those whose pixels or whose
            outputs are not finite, or else the whole batch.
    """

    def __init__(self, loss: JointDiffusionLoss, name_key: str = "name") -> None:
        self.loss = loss
        self.name_key = name_key

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Look at the terms of the present iteration."""
        broken = {name: float(term) for name, term in self.loss.terms.items() if not bool(term.isfinite().all())}
        if not broken:
            return
        terms = ", ".join(f"{name} = {value}" for name, value in broken.items())
        raise FloatingPointError(f"NonFiniteGuard: {terms} at {_where(engine)}; {self._suspects(engine)}.")

    def _suspects(self, engine: Engine) -> str:
        state: Any = engine.state
        names = _names(engine, self.name_key)
        pixels = [value for value in state.batch.values() if _is_float_batch(value, len(names))]
        outputs = _tensors(state.output.get("pred"))
        for what, tensors in (("pixels", pixels), ("network outputs", outputs)):
            suspects = [name for n, name in enumerate(names) if any(_row_is_broken(tensor, n) for tensor in tensors)]
            if suspects:
                return f"images whose {what} are not finite: {', '.join(suspects)}"
        return f"images of this batch: {', '.join(names)}"


def _where(engine: Engine) -> str:
    return f"step {engine.state.iteration} (epoch {engine.state.epoch})"


def _names(engine: Engine, name_key: str = "name") -> list[str]:
    state: Any = engine.state
    names = state.batch.get(name_key, [])
    return [str(name) for name in ([names] if isinstance(names, str) else names)]


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, Sequence) else [output]
    return [part for part in parts if isinstance(part, Tensor)]


def _is_float_batch(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and len(value) == length


def _row_is_broken(tensor: Tensor, row: int) -> bool:
    return row < len(tensor) and not bool(torch.isfinite(tensor[row]).all())
