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

"""Random numbers as a function of the seed and the place in the run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from monai_jointdiff.data import DrawBatchSampler, draw_seed

__all__ = ["DeterministicDraws"]


class DeterministicDraws:
    """Handler of a trainer: makes every random number of the run a function of the seed and the place in the run.

    At the start of an epoch the sampler learns from which iteration to deliver (ignite makes the loader's iterator
    after that event), and at the start of each iteration torch is seeded from (seed, rank, iteration), which makes
    dropout replayable. Transforms, noise and timesteps do not depend on it: they are functions of (seed, draw).

    Args:
        sampler: the batch sampler of the training's data loader.
        seed: of the run.
    """

    def __init__(self, sampler: DrawBatchSampler, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)

    def _epoch_started(self, engine: Engine) -> None:
        self.sampler.iteration = engine.state.iteration

    def _iteration_started(self, engine: Engine) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        torch.manual_seed(draw_seed(self.seed, engine.state.iteration, f"iteration/rank{rank}"))
