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

import unittest
from unittest import mock

import torch
from ignite.engine import Engine, Events
from parameterized import parameterized

from monai_jointdiff.handlers import TimeLimit


class TestTimeLimit(unittest.TestCase):
    @parameterized.expand([(2.5, 3, 1), (4.5, 5, 1), (5.5, 6, 2), (1e9, 12, 4)])
    def test_minutes(self, minutes, iterations, epochs_completed):
        # every iteration takes a minute, an epoch has 3; a run that ends with an epoch ends after its handlers
        clock = [1000.0]
        completed: list[int] = []

        def step(engine: Engine, batch: int) -> None:
            clock[0] += 60

        trainer = Engine(step)
        trainer.state.device = torch.device("cpu")
        TimeLimit(minutes).attach(trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: completed.append(engine.state.epoch))
        with mock.patch("monai_jointdiff.handlers.stopping.time.monotonic", lambda: clock[0]):
            trainer.run(range(3), max_epochs=4)
        self.assertEqual(trainer.state.iteration, iterations)
        self.assertEqual(len(completed), epochs_completed)

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "max_minutes must be > 0, got 0"):
            TimeLimit(0)


if __name__ == "__main__":
    unittest.main()
