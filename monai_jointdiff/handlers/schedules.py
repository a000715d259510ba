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

"""Learning rate and loss weight as functions of the iteration."""

from __future__ import annotations

import math

from ignite.engine import Engine, Events
from torch.optim import Optimizer

from monai_jointdiff.losses import JointDiffusionLoss

__all__ = ["LearningRateSchedule", "WeightSchedule"]


class LearningRateSchedule:
    """Handler of a trainer: the learning rate as a function of the iteration.

    With T = `total_iterations`, W = `warmup_iterations`, iteration i counted from 1:

    - i <= W: `max_lr * i / W`
    - cosine: `max_lr * (1 + cos(pi * p)) / 2` with p = (i - 1 - W) / (T - W)
    - linear: `max_lr * (1 - p)`
    - constant: `max_lr`

    Beyond T the rate stays that of iteration T. Nothing has to be saved to resume.

    Args:
        optimizer: all its groups get the rate.
        max_lr: > 0.
        total_iterations: T, of the whole run.
        warmup_iterations: W, from 0 to T - 1.
        kind: `cosine`, `linear` or `constant`.
    """

    KINDS = ("cosine", "linear", "constant")

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float,
        total_iterations: int,
        warmup_iterations: int = 0,
        kind: str = "cosine",
    ) -> None:
        if not max_lr > 0:
            raise ValueError(f"LearningRateSchedule: max_lr must be > 0, got {max_lr}.")
        if not 0 <= warmup_iterations < total_iterations:
            raise ValueError(
                "LearningRateSchedule: warmup_iterations must be from 0 to total_iterations - 1, got "
                f"{warmup_iterations} of {total_iterations}."
            )
        if kind not in self.KINDS:
            raise ValueError(f"LearningRateSchedule: kind must be one of {self.KINDS}, got {kind!r}.")
        self.optimizer = optimizer
        self.max_lr = max_lr
        self.total_iterations = total_iterations
        self.warmup_iterations = warmup_iterations
        self.kind = kind

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def learning_rate_at(self, iteration: int) -> float:
        """The rate of an iteration, counted from 1."""
        if iteration <= self.warmup_iterations:
            return self.max_lr * iteration / self.warmup_iterations
        done = min(iteration, self.total_iterations) - 1 - self.warmup_iterations
        progress = done / (self.total_iterations - self.warmup_iterations)
        factors = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return self.max_lr * factors[self.kind]

    def __call__(self, engine: Engine) -> None:
        """Set the rate of the present iteration."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(engine.state.iteration)


class WeightSchedule:
    """Handler of a trainer: the weight of the classification term as a function of the iteration.

    With s = `start`, k = `every`, r = `ramp`, iteration i counted from 1, the weight is 0 for i <= s and in iterations
    that are not s + 1, s + 1 + k, s + 1 + 2 k, ...; else `weight * min(1, (i - s) / r)`, or `weight` if r is 0.
    (`late_classifier_step` of JointDiffusion is s; Mediffusion trains with s and with k = 4.)

    Args:
        loss: its `classification_weight` is set at the beginning of each iteration.
        weight: >= 0.
        start: number of iterations without the term, >= 0.
        every: >= 1.
        ramp: number of iterations over which the weight grows, >= 0.
    """

    def __init__(self, loss: JointDiffusionLoss, weight: float, start: int = 0, every: int = 1, ramp: int = 0) -> None:
        for name, value, least in (("weight", weight, 0), ("start", start, 0), ("every", every, 1), ("ramp", ramp, 0)):
            if not value >= least:
                raise ValueError(f"WeightSchedule: {name} must be >= {least}, got {value}.")
        self.loss = loss
        self.weight = weight
        self.start = start
        self.every = every
        self.ramp = ramp

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def weight_at(self, iteration: int) -> float:
        """The weight in an iteration, counted from 1."""
        since = iteration - self.start
        if since < 1 or (since - 1) % self.every:
            return 0.0
        return self.weight * min(1.0, since / self.ramp) if self.ramp else self.weight

    def __call__(self, engine: Engine) -> None:
        """Set the weight of the present iteration."""
        self.loss.classification_weight = self.weight_at(engine.state.iteration)
