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

from __future__ import annotations

import math
import unittest

import torch
from ignite.engine import Engine, Events
from parameterized import parameterized
from torch import nn

from monai_jointdiff.handlers import LearningRateSchedule, UnlabelledWeightSchedule, WeightSchedule
from monai_jointdiff.losses import JointDiffusionLoss, SemiSupervisedLoss


def two_groups() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}], 1.0)


class TestLearningRateSchedule(unittest.TestCase):
    @parameterized.expand(
        [
            ("cosine", [0.1, 0.2, 0.2, 0.1 * (1 + math.cos(math.pi / 4)), 0.1, 0.1 * (1 - math.cos(math.pi / 4))]),
            ("linear", [0.1, 0.2, 0.2, 0.15, 0.1, 0.05]),
            ("constant", [0.1, 0.2, 0.2, 0.2, 0.2, 0.2]),
        ]
    )
    def test_values_of_a_run(self, kind, expected):
        optimizer, seen = two_groups(), []
        schedule = LearningRateSchedule(optimizer, 0.2, total_iterations=6, warmup_iterations=2, kind=kind)
        engine = Engine(lambda engine, batch: seen.append([group["lr"] for group in optimizer.param_groups]))
        schedule.attach(engine)
        engine.run(range(3), max_epochs=2)
        for rates, rate in zip(seen, expected, strict=True):
            self.assertAlmostEqual(rates[0], rate, places=12)
            self.assertEqual(rates[0], rates[1])
        self.assertEqual(schedule.learning_rate_at(100), seen[-1][0])

    def test_equals_torch(self):
        optimizer = two_groups()
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
        schedule = LearningRateSchedule(two_groups(), 1.0, total_iterations=50)
        for iteration in range(1, 51):
            self.assertAlmostEqual(schedule.learning_rate_at(iteration), reference.get_last_lr()[0], places=9)
            optimizer.step()
            reference.step()

    @parameterized.expand(
        [
            ({"max_lr": 0.0}, "max_lr must be > 0"),
            ({"warmup_iterations": 10}, "warmup_iterations must be from 0 to total_iterations - 1, got 10 of 10"),
            ({"kind": "step"}, "kind must be one of .* got 'step'"),
        ]
    )
    def test_wrong_input(self, options, message):
        with self.assertRaisesRegex(ValueError, message):
            LearningRateSchedule(two_groups(), **{"max_lr": 0.1, "total_iterations": 10, **options})


class TestWeightSchedule(unittest.TestCase):
    @parameterized.expand(
        [
            ({}, [2, 2, 2, 2, 2, 2, 2, 2]),
            ({"start": 3}, [0, 0, 0, 2, 2, 2, 2, 2]),
            ({"every": 3}, [2, 0, 0, 2, 0, 0, 2, 0]),
            ({"ramp": 4}, [0.5, 1, 1.5, 2, 2, 2, 2, 2]),
            ({"start": 2, "every": 2, "ramp": 4}, [0, 0, 0.5, 0, 1.5, 0, 2, 0]),
        ]
    )
    def test_values_of_a_run(self, options, expected):
        loss, seen = JointDiffusionLoss(), []
        engine = Engine(lambda engine, batch: seen.append(loss.classification_weight))
        WeightSchedule(loss, 2.0, **options).attach(engine)
        engine.run(range(4), max_epochs=2)
        self.assertEqual(seen, expected)

    def test_function_of_the_iteration(self):
        # an engine that starts at iteration 4 sees what the uninterrupted one sees
        loss, seen = JointDiffusionLoss(), []
        engine = Engine(lambda engine, batch: seen.append(loss.classification_weight))
        schedule = WeightSchedule(loss, 2.0, start=2, every=2, ramp=4)
        schedule.attach(engine)

        @engine.on(Events.STARTED)
        def resume(engine: Engine) -> None:
            engine.state.iteration, engine.state.epoch = 4, 1

        engine.run(range(4), max_epochs=2)
        self.assertEqual(seen, [schedule.weight_at(i) for i in (5, 6, 7, 8)])

    @parameterized.expand([("weight", -1), ("start", -1), ("every", 0), ("ramp", -2)])
    def test_wrong_input(self, name, value):
        with self.assertRaisesRegex(ValueError, f"WeightSchedule: {name} must be >= "):
            WeightSchedule(JointDiffusionLoss(), **{"weight": 1.0, name: value})

    def test_a_start_beyond_the_run_is_refused(self):
        loss, seen = JointDiffusionLoss(), []

        def run(start: int) -> None:
            engine = Engine(lambda engine, batch: seen.append(loss.classification_weight))
            WeightSchedule(loss, 2.0, start).attach(engine)
            engine.run(range(4), max_epochs=2)

        message = r"WeightSchedule: start is 8, and the training ends after iteration 8: .*--classification_start"
        with self.assertRaisesRegex(ValueError, message):
            run(start=8)
        self.assertEqual(seen, [])
        run(start=7)
        self.assertEqual(seen, [0.0] * 7 + [2.0])


class TestUnlabelledWeightSchedule(unittest.TestCase):
    @parameterized.expand(
        [
            (0, [3.0] * 6),
            (4, [3 * math.exp(-x) for x in (5, 5 * 9 / 16, 5 / 4, 5 / 16, 0, 0)]),
            (10, [3 * math.exp(-5 * (1 - i / 10) ** 2) for i in range(6)]),
        ]
    )
    def test_values_of_a_run(self, ramp, expected):
        loss, seen = SemiSupervisedLoss(), []
        engine = Engine(lambda engine, batch: seen.append(loss.unlabelled_weight))
        UnlabelledWeightSchedule(loss, 3.0, ramp).attach(engine)
        engine.run(range(3), max_epochs=2)
        torch.testing.assert_close(seen, expected, rtol=1e-12, atol=0)

    @parameterized.expand([("weight", -1), ("weight", float("nan")), ("ramp", -2)])
    def test_wrong_input(self, name, value):
        with self.assertRaisesRegex(ValueError, f"UnlabelledWeightSchedule: {name} must be >= 0, got"):
            UnlabelledWeightSchedule(SemiSupervisedLoss(), **{"weight": 1.0, name: value})


if __name__ == "__main__":
    unittest.main()
