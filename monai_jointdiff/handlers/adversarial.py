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

    The term trades absolute error for sharpness: where the epoch with the lowest error on validation images is kept
    (`val_l1`), those before the start are at an advantage, and the kept weights may be from before the term.

    Args:
        loss: its `adversarial_weight` is set at the beginning of each iteration.
        weight: >= 0.
        start: number of iterations without the term, >= 0.

    Raises:
        ValueError: for a negative number; when the run starts, for one that ends before the term begins.
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
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the weight of the present iteration, counted from 1."""
        self.loss.adversarial_weight = self.weight if engine.state.iteration > self.start else 0.0

    def _check(self, engine: Engine) -> None:
        epochs, length = engine.state.max_epochs, engine.state.epoch_length
        if self.weight > 0 and epochs is not None and length is not None and self.start >= epochs * length:
            raise ValueError(
                f"{type(self).__name__}: start is {self.start}, and the training ends after iteration "
                f"{epochs * length}: the adversarial term would never count. Start earlier (--adversarial_start), "
                "train for more epochs, or leave the term out (--adversarial_weight 0)."
            )
