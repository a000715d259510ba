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

from monai_jointdiff.data import DrawBatchSampler
from monai_jointdiff.handlers import DeterministicDraws


def run(done: int = 0, seed: int = 0, rank: int = 0, global_seed: int = 1) -> dict[int, tuple[list[int], float]]:
    """By iteration: the draws of the batch, and a number of torch's global generator, as dropout would take it."""
    seen = {}
    sampler = DrawBatchSampler(batch_size=2, iterations_per_epoch=3)

    def step(engine: Engine, batch: list[int]) -> None:
        seen[engine.state.iteration] = (batch, float(torch.rand(())))

    engine = Engine(step)
    engine.state.epoch_length = 3

    @engine.on(Events.STARTED)
    def resume(engine: Engine) -> None:
        engine.state.iteration, engine.state.epoch = done, done // 3

    DeterministicDraws(sampler, seed).attach(engine)
    torch.manual_seed(global_seed)
    with (
        mock.patch("monai_jointdiff.handlers.draws.dist.is_initialized", return_value=True),
        mock.patch("monai_jointdiff.handlers.draws.dist.get_rank", return_value=rank),
    ):
        engine.run(sampler, max_epochs=3, epoch_length=3)
    return seen


class TestDeterministicDraws(unittest.TestCase):
    def test_whole_run(self):
        seen = run()
        self.assertEqual([seen[i][0] for i in range(1, 10)], [[2 * i, 2 * i + 1] for i in range(9)])
        self.assertEqual(len({number for _, number in seen.values()}), 9)

    def test_resumed_anywhere(self):
        whole = run()
        for done in range(9):
            self.assertEqual(run(done, global_seed=99), {i: whole[i] for i in range(done + 1, 10)})

    def test_seed_and_rank(self):
        numbers = [[number for _, number in run(seed=s, rank=r).values()] for s, r in ((0, 0), (1, 0), (0, 1))]
        self.assertEqual(len({number for row in numbers for number in row}), 27)


if __name__ == "__main__":
    unittest.main()
