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

"""Samplers by name."""

from __future__ import annotations

from typing import Any

from .ddim import DDIMGridScheduler
from .ddpm import AncestralScheduler
from .dpm_solver import DPMSolverScheduler
from .grid import GridScheduler

SAMPLERS: dict[str, type[GridScheduler]] = {
    "ddpm": AncestralScheduler,
    "ddim": DDIMGridScheduler,
    "dpm_solver": DPMSolverScheduler,
}


def make_scheduler(name: str, num_inference_steps: int | None = None, **kwargs: Any) -> GridScheduler:
    """Make a sampler by its short name, as options and configuration files give it.

    Args:
        name: ``"ddpm"`` (:class:`AncestralScheduler`), ``"ddim"`` (:class:`DDIMGridScheduler`) or ``"dpm_solver"``
            (:class:`DPMSolverScheduler`).
        num_inference_steps: length of its grid; None: all training timesteps.
        **kwargs: arguments of the class.

    Returns:
        The scheduler with its grid.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"make_scheduler: name must be one of {tuple(SAMPLERS)}, got {name!r}.")
    scheduler = SAMPLERS[name](**kwargs)
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps)
    return scheduler
