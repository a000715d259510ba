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

from monai_jointdiff.losses import JointDiffusionLoss, SemiSupervisedLoss

__all__ = ["LearningRateSchedule", "UnlabelledWeightSchedule", "WeightSchedule"]


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

    Raises:
        ValueError: for a number out of its range; when the run starts, for one that ends before the term begins.
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
        engine.add_event_handler(Events.STARTED, self._check)
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

    def _check(self, engine: Engine) -> None:
        epochs, length = engine.state.max_epochs, engine.state.epoch_length
        if epochs is not None and length is not None and self.start >= epochs * length:
            raise ValueError(
                f"{type(self).__name__}: start is {self.start}, and the training ends after iteration "
                f"{epochs * length}: the classifier would never learn. Start earlier (--classification_start), or "
                "train for more epochs."
            )


class UnlabelledWeightSchedule:
    r"""Handler of a trainer: the weight of the unlabelled term grows along a Gaussian.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", arXiv 1610.02242, section 2.1 and appendix A:
    a network that has not learned anything from labels yet must not be held to its first answers. In iteration i of T,
    counted from 1,

    .. math::
        \lambda_u(i) = \lambda_u \exp(-5 (1 - t)^2), \qquad t = \min(1, (i - 1) / T)

    which begins at 0.7 % of the weight. Theirs takes 80 of 300 epochs, and steps from one epoch to the next; ours grows
    in every iteration. Mean Teacher (Tarvainen and Valpola, arXiv 1703.01780) takes the same curve. FixMatch needs
    none: few answers are above its threshold at first.

    Args:
        loss: its `unlabelled_weight` is set at the beginning of each iteration.
        weight: lambda_u >= 0.
        ramp: T >= 0; 0: the weight is the same throughout.

    Raises:
        ValueError: for a negative number.
    """

    def __init__(self, loss: SemiSupervisedLoss, weight: float, ramp: int = 0) -> None:
        for name, value in (("weight", weight), ("ramp", ramp)):
            if not value >= 0:
                raise ValueError(f"UnlabelledWeightSchedule: {name} must be >= 0, got {value}.")
        self.loss = loss
        self.weight = weight
        self.ramp = ramp

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def weight_at(self, iteration: int) -> float:
        """The weight in an iteration, counted from 1."""
        t = min(1.0, (iteration - 1) / self.ramp) if self.ramp else 1.0
        return self.weight * math.exp(-5 * (1 - t) ** 2)

    def __call__(self, engine: Engine) -> None:
        """Set the weight of the present iteration."""
        self.loss.unlabelled_weight = self.weight_at(engine.state.iteration)
