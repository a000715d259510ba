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

"""DDIM on any grid, and its inverse step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grid import GridScheduler


class DDIMGridScheduler(GridScheduler):
    """DDIM (Song et al., https://arxiv.org/abs/2010.02502) on any grid.

    Args:
        num_train_timesteps: see :class:`GridScheduler`, also for the arguments up to ``spacing``.
        schedule: noise schedule.
        prediction_type: what the network predicts.
        clip_sample: whether a step clips x_0.
        clip_sample_min: lower bound of x_0.
        clip_sample_max: upper bound of x_0.
        spacing: rule of ``set_timesteps``.
        eta: noise of a step in units of the ancestral sampler's, in [0, 1]: 0 is deterministic, 1 is DDPM.
        **schedule_args: further arguments of the schedule.

    Raises:
        ValueError: when eta is outside [0, 1], and as :class:`GridScheduler` does.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_min: float = -1.0,
        clip_sample_max: float = 1.0,
        spacing: str = "linspace",
        eta: float = 0.0,
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
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"DDIMGridScheduler: eta must lie in [0, 1], got {eta}.")
        self.eta = eta

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step of DDIM (equation 12); see :meth:`GridScheduler.step`. No noise is drawn where none is added."""
        target = self.next_timestep(timestep)
        current = self._scalar(timestep)
        original = self._denoise(model_output, current, sample)
        noise_std = self.eta * self._posterior_std(current, target)
        moved = self._move(sample, original, current, target, noise_std)
        if noise_std == 0.0:
            return moved, original
        return moved + noise_std * self._noise_like(sample, generator), original

    def inverse_step(self, epsilon: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor:
        """The sample from which the deterministic step arrives here, given the noise predicted **there**.

        ``x_t = (alpha_t / alpha_s) x_s + (sigma_t - sigma_s alpha_t / alpha_s) epsilon(x_t, t)``: equation 12 with
        eta = 0 solved for x_t. Since epsilon belongs to x_t, which is not known yet, this is one fixed-point
        iteration; see :class:`DDIMInverter`.

        Args:
            epsilon: predicted noise at (x_t, t), or at the best guess of x_t, (N, C, *spatial).
            timestep: t, the grid point to go back to.
            sample: x_s with s = ``next_timestep(t)``, -1 being the clean sample; same shape.

        Returns:
            x_t, same shape.

        Raises:
            ValueError: when the timestep is not in the grid or shapes differ.
        """
        target = self.next_timestep(timestep)
        self._check_shapes(sample, epsilon, "epsilon")
        noisy, clean = self.level(self._scalar(timestep)), self.level(target)
        ratio = noisy.alpha / clean.alpha
        return ratio * sample + (noisy.sigma - clean.sigma * ratio) * epsilon.to(sample.dtype)

    def _posterior_std(self, timestep: int, target: int) -> float:
        """Noise of the ancestral sampler between two times (equation 16 with eta = 1)."""
        now, then = self.level(timestep), self.level(target)
        return (then.sigma / now.sigma) * math.sqrt(1.0 - (now.alpha / then.alpha) ** 2)
