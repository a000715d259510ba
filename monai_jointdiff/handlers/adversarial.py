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

"""When a discriminator joins a training."""

from __future__ import annotations

from ignite.engine import Engine, Events

from monai_jointdiff.losses import AutoencoderLoss

__all__ = ["AdversarialStart"]


class AdversarialStart:
    """Handler of a trainer: the adversarial term counts from an iteration on, a function of the iteration alone.

    A discriminator that starts with the autoencoder sees nothing but blur at first and wins at once.

    Args:
        loss: its `adversarial_weight` is set at the beginning of each iteration.
        weight: >= 0.
        start: number of iterations without the term, >= 0.

    Raises:
        ValueError: for a negative number.
    """

    def __init__(self, loss: AutoencoderLoss, weight: float, start: int = 0) -> None:
        for name, value in (("weight", weight), ("start", start)):
            if not value >= 0:
                raise ValueError(f"AdversarialStart: {name} must be >= 0, got {value}.")
        self.loss = loss
        self.weight = weight
        self.start = start

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the weight of the present iteration, counted from 1."""
        self.loss.adversarial_weight = self.weight if engine.state.iteration > self.start else 0.0
