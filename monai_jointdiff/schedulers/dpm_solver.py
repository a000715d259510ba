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

"""DPM-Solver++(2M)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import CLEAN, GridScheduler

MAX_STEP_RATIO = 2.0
"""Length in lambda of a second-order step, at most, in units of the step before; 1 / r of the paper."""


class _Arrival(NamedTuple):
    """Where the previous step ended, and what it knew."""

    timestep: int
    sample: Tensor
    half_log_snr: float  # of the point it came from
    original: Tensor  # its prediction of x_0


class DPMSolverScheduler(GridScheduler):
    """DPM-Solver++(2M), the second-order multistep solver of Lu et al. (https://arxiv.org/abs/2211.01095, algorithm 2).

    A step is DDIM's with x_0 extrapolated linearly in ``lambda = log(alpha / sigma)`` from the last two predictions.
    It is of first order where the previous prediction cannot be used: at the first step of a chain, at the step to
    the clean sample, where lambda is infinite, and at a step more than twice as long in lambda as the one before,
    where the line would be drawn further than the two predictions carry it. Grids uniform in log-SNR have no such
    step, rounding apart; grids uniform in t have one at their end (a Gaussian of std .505 comes out of 10 steps with
    .398 so, with .700 without).

    A chain may begin at any grid point at any moment, without a call that announces it (MONAI's inferers make none):
    the previous prediction is used only if the previous step ended at this timestep **with this sample** (the same
    storage, or equal values), and is forgotten otherwise. So a caller who changes the sample between two steps gets
    a first-order step after the change.

    Args:
        num_train_timesteps: see :class:`GridScheduler`, also for the other arguments.
        schedule: noise schedule.
        prediction_type: what the network predicts.
        clip_sample: whether a step clips x_0.
        clip_sample_min: lower bound of x_0.
        clip_sample_max: upper bound of x_0.
        spacing: rule of ``set_timesteps``; ``"logsnr"`` is what the solver's error estimate asks for. On a grid
            uniform in t the last step is far too long in lambda.
        **schedule_args: further arguments of the schedule.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_min: float = -1.0,
        clip_sample_max: float = 1.0,
        spacing: str = "logsnr",
        **schedule_args: float,
    ) -> None:
        super().__init__(
            num_train_timesteps,
            schedule,
            prediction_type,
            clip_sample,
            clip_sample_min,
            clip_sample_max,
            spacing,
            **schedule_args,
        )

    def set_grid(self, timesteps: Sequence[int]) -> None:
        """Set the grid itself and forget the chain so far; see :meth:`GridScheduler.set_grid`."""
        super().set_grid(timesteps)
        self._arrival: _Arrival | None = None

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step of DPM-Solver++(2M); see :meth:`GridScheduler.step`. It draws no noise."""
        target = self.next_timestep(timestep)
        current = self._scalar(timestep)
        original = self._denoise(model_output, current, sample)
        moved = self._move(sample, self._extrapolate(original, current, target, sample), current, target)
        arrival = _Arrival(target, moved, self.level(current).half_log_snr, original)
        self._arrival = arrival if target != CLEAN else None
        return moved, original

    def _extrapolate(self, original: Tensor, timestep: int, target: int, sample: Tensor) -> Tensor:
        """``D = (1 + 1 / 2r) x0_hat - (1 / 2r) x0_hat_previous``, r the ratio of the last step to this one."""
        previous = self._arrival
        if previous is None or not _is_arrival(previous, timestep, sample):
            return original
        here, there = self.level(timestep).half_log_snr, self.level(target).half_log_snr
        ratio = (there - here) / (here - previous.half_log_snr)  # 1 / r, infinite for the clean sample
        if ratio > MAX_STEP_RATIO:
            return original
        return (1.0 + 0.5 * ratio) * original - 0.5 * ratio * previous.original


def _is_arrival(previous: _Arrival, timestep: int, sample: Tensor) -> bool:
    """Whether this step continues the previous one."""
    same_kind = previous.sample.dtype == sample.dtype and previous.sample.device == sample.device
    return previous.timestep == timestep and same_kind and torch.equal(previous.sample, sample)
