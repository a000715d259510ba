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

"""Fixed-point inversion of DDIM."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ddim import DDIMGridScheduler


@dataclass(frozen=True)
class InversionResult:
    """Latents of a DDIM inversion and how exactly they were found.

    Attributes:
        latents: the noisy sample from which DDIM comes back to the input, (N, C, *spatial).
        timestep: the grid point at which the latents stand.
        network_calls: number of network calls, each on the whole batch.
        iterations: fixed-point iterations of each sample at each grid point, from the cleanest to ``timestep``,
            (N, points) int64.
        residual: largest change that a last iteration made at any grid point to each sample, relative to its norm,
            (N,) float64. NaN when the iteration broke down.
        tolerance: the residual that was asked for.
    """

    latents: Tensor
    timestep: int
    network_calls: int
    iterations: Tensor
    residual: Tensor
    tolerance: float

    @property
    def converged(self) -> bool:
        """Whether every sample reached the tolerance at every grid point."""
        return bool((self.residual <= self.tolerance).all())


class DDIMInverter:
    """Fixed-point inversion of deterministic DDIM: find the noise from which DDIM returns to a given sample.

    At each grid point t, going up the grid, it solves ``x_t = inverse_step(epsilon(x_t, t), t, x_s)`` by iteration,
    beginning with x_s itself; one iteration alone is the usual ("naive") DDIM inversion. The iteration contracts,
    on trained networks slowly: exactness has its price in network calls, and the result states both. A sample that has
    reached the tolerance stays as it is while others of the batch go on, so that none depends on its neighbours.
    Compare Pan et al., "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion"
    (https://arxiv.org/abs/2309.04907).

    Args:
        scheduler: the sampler to invert, with its grid set; deterministic (``eta = 0``) and without clipping, since a
            clipped step has no inverse.
        tolerance: change of an iteration, relative to the norm of each sample, at which a grid point is done.
        max_iterations: iterations (network calls) at most per grid point.

    Raises:
        TypeError: when the scheduler is not a :class:`DDIMGridScheduler`.
        ValueError: when the scheduler adds noise or clips, or a number is out of range.

    Example:

        .. code-block:: python

            scheduler = DDIMGridScheduler()
            scheduler.set_timesteps(50)
            result = DDIMInverter(scheduler, tolerance=1e-4)(image, network)
            if not result.converged:
                print(f"residuals {result.residual} after {result.network_calls} network calls")
    """

    def __init__(self, scheduler: DDIMGridScheduler, tolerance: float = 1e-4, max_iterations: int = 20) -> None:
        if not isinstance(scheduler, DDIMGridScheduler):
            raise TypeError(f"DDIMInverter: scheduler must be a DDIMGridScheduler, got {type(scheduler).__name__}.")
        if scheduler.eta != 0 or scheduler.clip_sample:
            raise ValueError(
                "DDIMInverter: only a deterministic step without clipping has an inverse; got "
                f"eta={scheduler.eta}, clip_sample={scheduler.clip_sample}, needed are eta=0, clip_sample=False."
            )
        if not tolerance > 0:
            raise ValueError(f"DDIMInverter: tolerance must be positive, got {tolerance}.")
        if max_iterations < 1:
            raise ValueError(f"DDIMInverter: max_iterations must be at least 1, got {max_iterations}.")
        self.scheduler = scheduler
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, network: Callable[[Tensor, Tensor], Tensor], timestep: int | None = None
    ) -> InversionResult:
        """Invert from the clean sample up to a grid point.

        Args:
            inputs: clean samples, (N, C, *spatial).
            network: called as ``network(sample, timesteps)`` with (N,) int64 timesteps; returns the prediction of the
                scheduler's type, same shape as the sample. Conditions are bound by the caller.
            timestep: grid point to stop at; the noisiest if not given.

        Returns:
            The latents, with the calls spent and the residual reached.

        Raises:
            ValueError: when the timestep is not in the grid.
        """
        stop = int(self.scheduler.timesteps[0]) if timestep is None else timestep
        self.scheduler.next_timestep(stop)  # raises if it is not in the grid
        latents, calls = inputs, 0
        iterations, residuals = [], []
        for t in self.scheduler.timesteps.flip(0).tolist():
            if t > stop:
                break
            latents, count, residual = self._solve(latents, network, t)
            calls += int(count.max())
            iterations.append(count)
            residuals.append(residual)
        worst = torch.stack(residuals).amax(dim=0)  # lets NaN through
        return InversionResult(latents, stop, calls, torch.stack(iterations, dim=1), worst, self.tolerance)

    def _solve(
        self, sample: Tensor, network: Callable[[Tensor, Tensor], Tensor], timestep: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One grid point: the solution, and the iterations (N,) and the residual (N,) of each sample."""
        number = len(sample)
        timesteps = torch.full((number,), timestep, dtype=torch.int64, device=sample.device)
        guess, count = sample, torch.zeros(number, dtype=torch.int64)
        residual = torch.full((number,), math.inf, dtype=torch.float64)
        for _ in range(self.max_iterations):
            active = ~(residual <= self.tolerance)  # NaN is not done
            if not bool(active.any()):
                break
            # the whole batch, since the network may be bound to conditions of all its samples
            epsilon = self.scheduler.predict_epsilon(network(guess, timesteps), timestep, guess)
            better = self.scheduler.inverse_step(epsilon, timestep, sample)
            residual = torch.where(active, _relative_change(better, guess), residual)
            going_on = active.to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))
            guess = torch.where(going_on, better, guess)
            count = count + active
        return guess, count, residual


def _relative_change(new: Tensor, old: Tensor) -> Tensor:
    """``||new - old|| / ||new||`` of each sample, (N,) float64 on the CPU."""
    change = (new - old).flatten(1).norm(dim=1)
    scale = new.flatten(1).norm(dim=1).clamp_min(torch.finfo(new.dtype).tiny)
    return (change / scale).double().cpu()
