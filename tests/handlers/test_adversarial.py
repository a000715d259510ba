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

from ignite.engine import Engine, Events
from torch import nn

from monai_jointdiff.handlers import AdversarialStart
from monai_jointdiff.losses import AutoencoderLoss


class TestAdversarialStart(unittest.TestCase):
    def test_weight_is_a_function_of_the_iteration(self) -> None:
        loss = AutoencoderLoss(discriminator=nn.Identity(), adversarial_weight=0.5)
        weights: list[float] = []
        engine = Engine(lambda engine, batch: weights.append(loss.adversarial_weight))
        AdversarialStart(loss, 0.5, start=3).attach(engine)
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "iteration", 1))  # resumed
        engine.run([0] * 5, max_epochs=1)
        self.assertEqual(weights[:4], [0.0, 0.0, 0.5, 0.5])

    def test_run_that_ends_before_the_term_begins(self) -> None:
        loss = AutoencoderLoss(discriminator=nn.Identity(), adversarial_weight=0.5)
        for weight, start, refused in ((0.5, 10, True), (0.5, 9, False), (0.0, 10, False)):
            engine = Engine(lambda engine, batch: None)
            AdversarialStart(loss, weight, start).attach(engine)
            if not refused:
                engine.run([0] * 5, max_epochs=2)
                continue
            with self.assertRaisesRegex(ValueError, "AdversarialStart: start is 10, .* ends after iteration 10: "):
                engine.run([0] * 5, max_epochs=2)
            self.assertEqual(engine.state.iteration, 0)

    def test_wrong_input(self) -> None:
        for options in ({"weight": -1.0}, {"weight": 1.0, "start": -1}):
            with self.assertRaisesRegex(ValueError, "AdversarialStart: .* must be >= 0, got -1"):
                AdversarialStart(AutoencoderLoss(), **options)


if __name__ == "__main__":
    unittest.main()
