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

"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import compress

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .utils import is_optimizer_step, unwrap_network

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage:
    """Handler of a trainer: a copy of the network whose weights are the exponential moving average of the training's.

    After iteration i (counted from 1) the average becomes `d * average + (1 - d) * weights` with
    `d = min(decay, (1 + i) / (warmup + i))`. The warm-up forgets the initial weights: with `warmup=10` their share
    after 1,000 iterations is below 1e-20 (a constant .999 leaves 37 %), and the average reaches back over about
    i / (warmup - 1) iterations. The decay is a function of the iteration alone, so nothing but the weights has to be
    saved to resume exactly. Floating buffers are averaged, too: running statistics of features then fit the averaged
    weights to first order, those of the last iteration do not. Other buffers are copied.

    A run that starts at iteration 0 begins with the network's weights as they are then.

    Args:
        model: the network in training; inside `DistributedDataParallel` or not.
        decay: upper bound of d, in [0, 1).
        warmup: >= 1; 1 means none.

    Attributes:
        ema_model: the average, a network in eval mode without gradients.
        iteration: the iteration of the last update.

    Example:
        >>> from ignite.engine import Engine
        >>> network = nn.Linear(1, 1)
        >>> average = ExponentialMovingAverage(network, decay=0.999)
        >>> average.decay_at(1), average.decay_at(100_000)
        (0.18181818181818182, 0.999)
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: float = 10.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ExponentialMovingAverage: decay must be in [0, 1), got {decay}.")
        if not warmup >= 1:
            raise ValueError(f"ExponentialMovingAverage: warmup must be >= 1, got {warmup}.")
        self.model = unwrap_network(model)
        self.decay = decay
        self.warmup = warmup
        self.ema_model = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.iteration = 0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def decay_at(self, iteration: int) -> float:
        """The decay d of an iteration, counted from 1."""
        return min(self.decay, (1 + iteration) / (self.warmup + iteration))

    def __call__(self, engine: Engine) -> None:
        """Update the average after a step of the optimizer."""
        if is_optimizer_step(engine):
            self.update(engine.state.iteration)

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take the present weights into the average.

        Args:
            iteration: of the training, counted from 1.
        """
        average, present = _tensors(self.ema_model), _tensors(self.model)
        floating = [tensor.is_floating_point() for tensor in average]
        if any(floating):
            sides = (list(compress(side, floating)) for side in (average, present))
            get_ema_multi_avg_fn(self.decay_at(iteration))(*sides, None)
        for ours, theirs, is_floating in zip(average, present, floating, strict=True):
            if not is_floating:
                ours.copy_(theirs)
        self.iteration = iteration

    def state_dict(self) -> dict[str, Tensor]:
        """The average as a plain state dict of the network."""
        return self.ema_model.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], iteration: int) -> None:
        """Go on with a saved average.

        Args:
            state_dict: as of :meth:`state_dict`.
            iteration: after which it was saved.
        """
        self.ema_model.load_state_dict(state_dict)
        self.iteration = iteration

    def _start(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self.load_state_dict(self.model.state_dict(), iteration=0)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in the order of the network."""
    return [*network.parameters(), *network.buffers()]
