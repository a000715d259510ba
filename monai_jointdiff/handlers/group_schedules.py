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

"""Learning rates of the groups of an optimizer."""

from __future__ import annotations

from ignite.engine import Engine

from .schedules import LearningRateSchedule

__all__ = ["GroupLearningRateSchedule"]


class GroupLearningRateSchedule(LearningRateSchedule):
    """Handler of a trainer: one schedule for all groups of an optimizer, times a factor of each.

    The arguments are those of :class:`LearningRateSchedule`. A group of the optimizer may hold `lr_factor`
    (:func:`~monai_jointdiff.engines.parameter_groups`); without it the factor is 1. A smaller rate of the head is an
    option of Mediffusion (Kaleta et al., arXiv 2411.09434).
    """

    def __call__(self, engine: Engine) -> None:
        """Set the rates of the present iteration."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("lr_factor", 1.0) * self.learning_rate_at(engine.state.iteration)
