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

"""Ancestral sampling (DDPM) on any grid."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import GridScheduler


class AncestralScheduler(GridScheduler):
    """Ancestral sampler of DDPM on any grid, however far its points lie apart.

    Each step draws from the posterior ``q(x_s | x_t, x_0 = x0_hat)`` between the two grid points t > s, which is
    equation 7 of Ho et al. (https://arxiv.org/abs/2006.11239) with ``beta_t`` replaced by the variance of the whole
    stride, ``1 - alpha_bar_t / alpha_bar_s``. Its variance is the one MONAI calls ``"fixed_small"``.

    The arguments are those of :class:`GridScheduler`.
    """

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """One draw from the posterior; see :meth:`GridScheduler.step`. The step to the clean sample adds no noise."""
        target = self.next_timestep(timestep)
        current = self._scalar(timestep)
        original = self._denoise(model_output, current, sample)
        now, then = self.level(current), self.level(target)

        ratio = now.alpha / then.alpha  # x_t | x_s  ~  N(ratio x_s, stride)
        stride = 1.0 - ratio**2
        mean_original = then.alpha * stride / now.sigma**2
        mean_sample = ratio * then.sigma**2 / now.sigma**2
        mean = mean_original * original + mean_sample * sample
        if then.sigma == 0.0:
            return mean, original
        std = (then.sigma / now.sigma) * stride**0.5
        return mean + std * self._noise_like(sample, generator), original
