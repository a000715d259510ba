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
"""The time grid and the steps of a reverse chain, the same for this package's, MONAI's and diffusers' schedulers."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.schedulers import Scheduler

__all__ = ["Parametrization", "ReverseChain"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Parametrization:
    """What the prediction of a network means at one time of ``x_t = alpha x_0 + sigma epsilon``.

    The formulas of :py:class:`monai_jointdiff.schedulers.GridScheduler`, for any scheduler.

    Args:
        alpha: factor of the image, in (0, 1].
        sigma: factor of the noise, in [0, 1), ``alpha^2 + sigma^2 = 1``.
        prediction_type: ``epsilon``, ``sample`` (x_0) or ``v_prediction`` (``alpha epsilon - sigma x_0``).

    Raises:
        ValueError: when the prediction type is another one.
    """

    alpha: float
    sigma: float
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"Parametrization: prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}."
            )

    def predict_original(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The estimate of the clean image, never clipped (a clipped one has no gradient).

        Args:
            model_output: what the network predicted (N, C, *spatial).
            sample: x_t (N, C, *spatial).

        Returns:
            x0_hat (N, C, *spatial).
        """
        if self.prediction_type == "epsilon":
            return (sample - self.sigma * model_output) / self.alpha
        if self.prediction_type == "sample":
            return model_output
        return self.alpha * sample - self.sigma * model_output

    def shift_epsilon(self, model_output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The model output whose noise differs by ``change``, at the same x_t.

        With ``x_0 = (x_t - sigma epsilon) / alpha`` and ``v = (epsilon - sigma x_t) / alpha``, a change d of epsilon
        changes x_0 by ``-sigma / alpha d`` and v by ``d / alpha``.

        Args:
            model_output: what the network predicted (N, C, *spatial).
            change: difference of the noise (N, C, *spatial).

        Returns:
            Model output (N, C, *spatial) of the same prediction type.
        """
        if self.prediction_type == "epsilon":
            return model_output + change
        if self.prediction_type == "sample":
            return model_output - self.sigma / self.alpha * change
        return model_output + change / self.alpha


class ReverseChain:
    """A walk along the time grid of a scheduler.

    It works on a copy of the scheduler: multistep schedulers of MONAI and diffusers keep the history of a chain and
    would start the next one with it, and MONAI 1.6.1's cast their tables to the type of the last sample. The grid is
    read once, as Python numbers, wherever the scheduler keeps it.

    Args:
        scheduler: this package's, MONAI's (``step`` returns a tuple) or diffusers' (``step`` returns an object with
            ``prev_sample``), with its time grid set.
        generator: source of the noise of a stochastic step, on the device that the scheduler draws on. None: torch's
            global one.

    Raises:
        TypeError: when the scheduler has no ``step``.
        ValueError: when it has no time grid.
    """

    def __init__(self, scheduler: Any, generator: torch.Generator | None = None) -> None:
        name = type(scheduler).__name__
        if not callable(getattr(scheduler, "step", None)):
            raise TypeError(f"ReverseChain: the scheduler must have a method step, got {name}.")
        grid = getattr(scheduler, "timesteps", None)
        if grid is None or len(grid) == 0:
            raise ValueError(f"ReverseChain: {name} has no time grid, call its set_timesteps first.")
        self.scheduler = copy.deepcopy(scheduler)
        self.name = name
        self.timesteps: list[int | float] = [_as_number(t) for t in torch.as_tensor(grid).tolist()]
        self._arguments: dict[str, Any] = {}
        self._accepted = inspect.signature(scheduler.step).parameters
        if "generator" in self._accepted:
            self._arguments["generator"] = generator

    def __len__(self) -> int:
        return len(self.timesteps)

    def next_timestep(self, index: int) -> int | float:
        """Where step ``index`` ends: the next point of the grid, -1 (the clean image) after the last."""
        return self.timesteps[index + 1] if index + 1 < len(self) else -1

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """The first sample from standard normal noise (diffusers' sigma-scaled schedulers want it scaled)."""
        scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return noise if scale == 1.0 else noise * scale

    def model_input(self, index: int, sample: torch.Tensor) -> torch.Tensor:
        """What the network sees of the sample at step ``index``: x_t with ``alpha^2 + sigma^2 = 1``."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        if scale is None:
            return sample
        scaled: torch.Tensor = scale(sample, self._own_timestep(index))
        return scaled

    def parametrization(self, index: int) -> Parametrization:
        """What the prediction of the network means at a step.

        Args:
            index: which step, counted from 0.

        Returns:
            Noise level and prediction type.

        Raises:
            ValueError: when the scheduler has no ``alphas_cumprod`` (flow matching), or the step lies between two of
                its entries.
        """
        table = getattr(self.scheduler, "alphas_cumprod", None)
        timestep = self.timesteps[index]
        if table is None or not isinstance(timestep, int):
            raise ValueError(
                "ReverseChain: guidance needs a scheduler with alphas_cumprod and integer timesteps, "
                f"got {self.name} at timestep {timestep}."
            )
        alpha_bar = float(table[timestep])
        holder = getattr(self.scheduler, "config", self.scheduler)  # diffusers: config
        prediction_type = getattr(holder, "prediction_type", None)
        return Parametrization(alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5, str(prediction_type))

    def step(
        self, index: int, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Goes from one point of the grid to the next.

        Args:
            index: which step, counted from 0.
            model_output: prediction (N, C, *spatial) of the network.
            sample: sample (N, C, *spatial) before the step.

        Returns:
            The sample after the step, and the estimate of the clean image if the scheduler gives one.
        """
        arguments = dict(self._arguments)
        if "next_timestep" in self._accepted:  # MONAI's RFlowScheduler
            arguments["next_timestep"] = max(self.next_timestep(index), 0)
        result = self.scheduler.step(model_output, self._own_timestep(index), sample, **arguments)
        if isinstance(result, tuple):
            return result[0], result[1] if len(result) > 1 else None
        return result.prev_sample, getattr(result, "pred_original_sample", None)

    def _own_timestep(self, index: int) -> Any:
        """The timestep as the scheduler wants it: MONAI's index with a number, diffusers' search their own entry."""
        return self.timesteps[index] if isinstance(self.scheduler, Scheduler) else self.scheduler.timesteps[index]


def _as_number(value: float) -> int | float:
    """A whole number as int (diffusers keeps whole timesteps as floats, too)."""
    return int(value) if float(value).is_integer() else float(value)
