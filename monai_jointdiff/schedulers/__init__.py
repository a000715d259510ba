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

"""Noise over time: schedules, and samplers whose steps land on the next point of their grid."""

from __future__ import annotations

from .ddim import DDIMGridScheduler
from .ddpm import AncestralScheduler
from .dpm_solver import DPMSolverScheduler
from .factory import make_scheduler
from .grid import GridScheduler, NoiseLevel
from .inversion import DDIMInverter, InversionResult
from .logsnr import logsnr_timesteps, shifted_logsnr

__all__ = [
    "AncestralScheduler",
    "DDIMGridScheduler",
    "DDIMInverter",
    "DPMSolverScheduler",
    "GridScheduler",
    "InversionResult",
    "NoiseLevel",
    "logsnr_timesteps",
    "make_scheduler",
    "shifted_logsnr",
]
