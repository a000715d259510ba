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

"""The best validation so far, and the file with its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor, nn

from .atomic import atomic_save, sweep_partial_files
from .ema import ExponentialMovingAverage
from .utils import is_writing_process, unwrap_network

__all__ = ["BestModel"]

KEEP = ("best", "last")


class BestModel:
    """Handler of an evaluator: keeps the weights with the best validation metric, or the last ones, in a file.

    The file holds the plain state dict on the CPU, readable with `torch.load(..., weights_only=True)`, and is replaced
    in one step. A metric that is NaN is never kept; of equally good values the first is. Under several processes the
    metric must be the same in all (MONAI's metric handlers gather), and rank 0 writes.

    The last weights are the better choice where the validation part is so small that which epoch is best is chance.

    Until this run has weights to keep, a file of an earlier run stays as it is: a run that fails loses nothing.

    The weights are part of the state, so a run resumed in another folder, or from a checkpoint older than the file,
    ends with the right file, too.

    Args:
        model: the weights to keep: a handler of their average, or a network.
        directory: of the file, made when it is missing.
        metric_name: key in the evaluator's `state.metrics`.
        larger_is_better: which direction is better.
        filename: of the file.
        keep: ``best`` by the metric, or ``last``.
        before_first: called once, before this run writes the file for the first time: makes room, and writes what says
            how to use the weights.

    Raises:
        ValueError: for another `keep`.

    Attributes:
        value: the metric of the weights kept, None before the first.
        epoch: of the training when it was reached.
        iteration: of the training when it was reached; None if `model` is a network, which does not know it.
        validated: epoch of the last validation, None before the first.
    """

    def __init__(
        self,
        model: ExponentialMovingAverage | nn.Module,
        directory: str | Path,
        metric_name: str,
        larger_is_better: bool = True,
        filename: str = "model.pt",
        keep: str = "best",
        before_first: Callable[[], object] | None = None,
    ) -> None:
        if keep not in KEEP:
            raise ValueError(f"BestModel: keep must be one of {', '.join(KEEP)}, got {keep!r}.")
        self.model = model
        self.keep = keep
        self.metric_name = metric_name
        self.larger_is_better = larger_is_better
        self.path = Path(directory) / filename
        self.value: float | None = None
        self.epoch: int | None = None
        self.iteration: int | None = None
        self.validated: int | None = None
        self._weights: dict[str, Tensor] | None = None
        self._before_first = before_first

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator that validates."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compare the metric of the finished validation with the best.

        Args:
            engine: the evaluator.

        Raises:
            ValueError: if the evaluator has no such metric.
        """
        if self.metric_name not in engine.state.metrics:
            raise ValueError(
                f"BestModel: the evaluator has no metric '{self.metric_name}', it has {sorted(engine.state.metrics)}."
            )
        value = float(engine.state.metrics[self.metric_name])
        self.validated = engine.state.epoch
        if not self.is_better(value):
            return
        self.value, self.epoch, self.iteration = value, engine.state.epoch, self._iteration()
        self._weights = {key: weight.detach().cpu().clone() for key, weight in self._network().state_dict().items()}
        self._write()

    def is_better(self, value: float) -> bool:
        """Whether the weights of this value would be kept in place of those before."""
        if math.isnan(value) or self.value is None or self.keep == "last":
            return not math.isnan(value)
        return value > self.value if self.larger_is_better else value < self.value

    def state_dict(self) -> dict[str, Any]:
        """Best value, its place in the training and its weights, and when the last validation was."""
        return {
            "value": self.value,
            "epoch": self.epoch,
            "iteration": self.iteration,
            "validated": self.validated,
            "weights": self._weights,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, and write the file it belongs to.

        Args:
            state_dict: as of :meth:`state_dict`.
        """
        self.value, self.epoch, self.iteration = (state_dict[key] for key in ("value", "epoch", "iteration"))
        self.validated = state_dict.get("validated", self.epoch)  # files written before it was remembered
        self._weights = state_dict["weights"]
        if self._weights is not None:
            self._write()

    def _network(self) -> nn.Module:
        return self.model.ema_model if isinstance(self.model, ExponentialMovingAverage) else unwrap_network(self.model)

    def _iteration(self) -> int | None:
        return self.model.iteration if isinstance(self.model, ExponentialMovingAverage) else None

    def _start(self, engine: Engine) -> None:
        if is_writing_process():
            sweep_partial_files(self.path.parent)

    def _write(self) -> None:
        if not is_writing_process():
            return
        if self._before_first is not None:
            self._before_first()
            self._before_first = None
        atomic_save(self._weights, self.path)
