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

"""What happens around a training: averages, checkpoints, stopping, schedules, guards and logging."""

from __future__ import annotations

from .adversarial import AdversarialStart
from .atomic import atomic_save, atomic_write_text, sweep_partial_files
from .best_model import BestModel
from .checkpoint import ResumableCheckpoint, Stateful
from .counterfactual import CounterfactualImages, CounterfactualWriter, read_counterfactual_records
from .diffusion_classification import (
    DiffusionPredictionCollector,
    DiffusionPredictions,
    EvidenceWriter,
    join_results,
)
from .draws import DeterministicDraws
from .ema import ExponentialMovingAverage
from .gradients import GradientClipping, NonFiniteGuard
from .group_schedules import GroupLearningRateSchedule
from .image_writer import ImageWriter
from .loss_terms import LossTerms
from .predictions import PredictionCollector, Predictions, patient_groups
from .pseudo_labels import PseudoLabelRound, PseudoLabelRounds
from .sample_images import FixedNoiseSampler, SampleImages
from .schedules import LearningRateSchedule, UnlabelledWeightSchedule, WeightSchedule
from .stopping import EarlyStop, TimeLimit

__all__ = [
    "AdversarialStart",
    "BestModel",
    "CounterfactualImages",
    "CounterfactualWriter",
    "DeterministicDraws",
    "DiffusionPredictionCollector",
    "DiffusionPredictions",
    "EarlyStop",
    "EvidenceWriter",
    "ExponentialMovingAverage",
    "FixedNoiseSampler",
    "GradientClipping",
    "GroupLearningRateSchedule",
    "ImageWriter",
    "LearningRateSchedule",
    "LossTerms",
    "NonFiniteGuard",
    "PredictionCollector",
    "Predictions",
    "PseudoLabelRound",
    "PseudoLabelRounds",
    "ResumableCheckpoint",
    "SampleImages",
    "Stateful",
    "TimeLimit",
    "UnlabelledWeightSchedule",
    "WeightSchedule",
    "atomic_save",
    "atomic_write_text",
    "join_results",
    "patient_groups",
    "read_counterfactual_records",
    "sweep_partial_files",
]
