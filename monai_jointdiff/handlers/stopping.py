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

"""When a run ends before its last epoch."""

from __future__ import annotations

import time
from typing import Any

from ignite.engine import Engine, Events

from .best_model import BestModel
from .utils import all_processes_agree, iteration_in_epoch

__all__ = ["EarlyStop", "TimeLimit"]


class EarlyStop:
    """Handler of a trainer: ends the run at a validation that is the last of some epochs without a better one.

    Epochs count when they are validated: between two validations a run does not end. Its only state is that of `best`,
    so a resumed run stops where the uninterrupted one does. It stands behind the `ValidationHandler` in the list of
    handlers.

    Args:
        best: which remembers when the metric was best.
        patience: number of epochs, >= 1.

    Raises:
        ValueError: for less patience, or when not the best weights are kept but the last.
    """

    def __init__(self, best: BestModel, patience: int) -> None:
        if not patience >= 1:
            raise ValueError(f"EarlyStop: patience must be >= 1, got {patience}.")
        if best.keep != "best":
            raise ValueError(
                "EarlyStop: where the last weights are kept, there is no best epoch to count from. Give no patience, "
                "or keep the best weights (--keep best)."
            )
        self.best = best
        self.patience = patience

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)  # a resumed run may have been at its end already
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Stop if the epochs since the best were in vain."""
        epoch, validated = self.best.epoch, self.best.validated
        if epoch is not None and validated is not None and validated - epoch >= self.patience:
            engine.logger.info(
                f"EarlyStop: {self.best.metric_name} was best in epoch {epoch}, the last validation was in {validated}."
            )
            engine.terminate()


class TimeLimit:
    """Handler of a trainer: ends the run after some minutes, counted from its start or resumption.

    It stops between two iterations, or between two epochs with the end of the epoch (validation, checkpoint) done.
    :class:`ResumableCheckpoint` writes the state it stopped in. Of several processes the clock of rank 0 counts.

    Args:
        max_minutes: > 0.
    """

    def __init__(self, max_minutes: float) -> None:
        if not max_minutes > 0:
            raise ValueError(f"TimeLimit: max_minutes must be > 0, got {max_minutes}.")
        self.max_minutes = max_minutes
        self._started = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Stop if the time is over."""
        state: Any = engine.state
        over = time.monotonic() - self._started > 60 * self.max_minutes
        if all_processes_agree(over, state.device):
            engine.logger.info(f"TimeLimit: {self.max_minutes} minutes are over, stop after step {state.iteration}.")
            engine.terminate()

    def _start(self, engine: Engine) -> None:
        self._started = time.monotonic()

    def _iteration_completed(self, engine: Engine) -> None:
        # ignite would end before EPOCH_COMPLETED: the validation of this epoch would be lost for a resumed run
        if iteration_in_epoch(engine) != engine.state.epoch_length:
            self(engine)
