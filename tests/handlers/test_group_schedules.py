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

import unittest

import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_jointdiff.handlers import GroupLearningRateSchedule, LearningRateSchedule


def rates(schedule: LearningRateSchedule, iterations: int = 6) -> list[list[float]]:
    """Rates of all groups in every iteration of a run."""
    found: list[list[float]] = []
    engine = Engine(lambda engine, batch: None)
    schedule.attach(engine)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: found.append([group["lr"] for group in schedule.optimizer.param_groups])
    )
    engine.run(range(iterations), max_epochs=1)
    return found


class TestGroupLearningRateSchedule(unittest.TestCase):
    def test_every_group_has_its_factor_in_every_iteration(self) -> None:
        layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
        groups = [
            {"params": layer.parameters(), "lr_factor": f} for layer, f in zip(layers, (1.0, 0.2, 3.0), strict=True)
        ]
        del groups[0]["lr_factor"]
        optimizer = torch.optim.AdamW(groups, lr=1.0)
        found = rates(GroupLearningRateSchedule(optimizer, 2e-3, 6, 2, "linear"))
        one = [row[0] for row in rates(LearningRateSchedule(optimizer, 2e-3, 6, 2, "linear"))]
        self.assertEqual(found, [[rate, 0.2 * rate, 3.0 * rate] for rate in one])
        self.assertEqual(len(set(one)), 4)  # warm-up and decay: they really move

    def test_factors_travel_with_the_optimizer(self) -> None:
        layer = nn.Linear(1, 1)
        first = torch.optim.AdamW([{"params": layer.parameters(), "lr_factor": 0.5}])
        second = torch.optim.AdamW([{"params": layer.parameters(), "lr_factor": 1.0}])
        second.load_state_dict(first.state_dict())
        self.assertEqual(rates(GroupLearningRateSchedule(second, 1.0, 6, kind="constant"), 1), [[0.5]])


if __name__ == "__main__":
    unittest.main()
