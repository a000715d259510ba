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

"""A data distribution whose denoiser, and therefore whose samples, are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monai_jointdiff.schedulers import GridScheduler


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, std^2) in every pixel, so x_t ~ N(alpha mean, alpha^2 std^2 + sigma^2)."""

    mean: float = 0.3
    std: float = 0.505

    def marginal(self, alpha_bar: float) -> tuple[float, float]:
        """Mean and standard deviation of x_t."""
        return alpha_bar**0.5 * self.mean, (alpha_bar * self.std**2 + 1.0 - alpha_bar) ** 0.5

    def denoise(self, x, alpha_bar: float):
        """E[x_0 | x_t]."""
        center, spread = self.marginal(alpha_bar)
        return self.mean + alpha_bar**0.5 * self.std**2 / spread**2 * (x - center)

    def network(self, scheduler: GridScheduler) -> Callable[[Tensor, Tensor], Tensor]:
        """The perfect network for the scheduler's table and prediction type."""

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            alpha_bar = float(scheduler.alphas_cumprod[int(timesteps[0])])
            alpha, sigma = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
            x_0 = self.denoise(x, alpha_bar)
            epsilon = (x - alpha * x_0) / sigma
            return {"sample": x_0, "epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x_0}[
                scheduler.prediction_type
            ]

        return predict


def run_chain(
    scheduler: GridScheduler,
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Walk the whole grid, as every inferer does."""
    for t in scheduler.timesteps:
        x, _ = scheduler.step(network(x, t.repeat(len(x))), t, x, generator=generator)
    return x


def alpha_bars(scheduler: GridScheduler) -> np.ndarray:
    """alpha_bar along the grid, and 1 for the clean sample after it; recomputed from the betas."""
    table = np.cumprod(1.0 - scheduler.betas.numpy())
    return np.append(table[scheduler.timesteps.numpy()], 1.0)


def start_quantiles(scheduler: GridScheduler, data: GaussianData) -> Tensor:
    """(2, 1, 1, 1): the mean of the first marginal, and one standard deviation above it.

    A deterministic sampler is affine on Gaussian data, so where these two arrive says where all arrive.
    """
    center, spread = data.marginal(float(scheduler.alphas_cumprod[scheduler.timesteps[0]]))
    return torch.tensor([center, center + spread], dtype=torch.float64).reshape(2, 1, 1, 1)
