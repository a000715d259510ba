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

"""The terms of the loss for MONAI's logging handlers."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from monai_jointdiff.losses import JointDiffusionLoss

__all__ = ["LossTerms"]


class LossTerms:
    """Handler of a trainer: makes the terms of the loss visible to MONAI's logging handlers.

    From `LOSS_COMPLETED` on, `engine.state.output["loss_<term>"]` holds the present value and
    `engine.state.metrics["loss_<term>"]` the mean over the iterations of the epoch so far, for every term of
    :attr:`JointDiffusionLoss.terms`. `StatsHandler` and `TensorBoardStatsHandler` log the metrics per epoch by
    themselves, and the values of an iteration with `output_transform=loss_terms.values`. The values are those of the
    process, not averaged over processes.

    Args:
        loss: whose terms are shown.
        prefix: before the term's name.
    """

    def __init__(self, loss: JointDiffusionLoss, prefix: str = "loss_") -> None:
        self.loss = loss
        self.prefix = prefix
        self._sums: dict[str, float] = {}
        self._count = 0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Take over the terms of the present iteration."""
        state: Any = engine.state
        self._count += 1
        for term, tensor in self.loss.terms.items():
            name = self.prefix + term
            self._sums[name] = self._sums.get(name, 0.0) + float(tensor)
            state.output[name] = tensor
            state.metrics[name] = self._sums[name] / self._count

    def values(self, output: Any) -> dict[str, float]:
        """The present terms by name: an `output_transform` for `StatsHandler` and `TensorBoardStatsHandler`.

        Args:
            output: `engine.state.output`, a dictionary or, decollated, a list of one per image.

        Returns:
            the values.
        """
        first = output[0] if isinstance(output, list) else output
        return {self.prefix + term: float(first[self.prefix + term]) for term in self.loss.terms}

    def _reset(self, engine: Engine) -> None:
        self._sums, self._count = {}, 0
