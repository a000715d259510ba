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
"""What is asked of a joint diffusion network: a training forward, a class, a vote, a sample, a counterfactual."""

from __future__ import annotations

from .autoencoder import AutoencoderInferer, AutoencoderOutput
from .chain import Parametrization, ReverseChain
from .counterfactual import ENCODINGS, RULES, CounterfactualInferer
from .diffusion_classifier import HEAD_ROLES, DiffusionClassifierInferer, DiffusionClassifierResult, replay
from .draws import DRAWS, NoiseDraws, stratified_timesteps
from .explanation import CounterfactualQuestion, CounterfactualRecord, CounterfactualResult
from .guidance import ClassifierGuidance, Guidance, GuidanceStep, RepresentationGuidance
from .joint import JointDiffusionInferer, SampleResult, StepInfo
from .latent import LatentSpace
from .typicality import DenoisingProfile, Typicality
from .voting import AGGREGATIONS, aggregate, count_votes, flip_probability, mean_errors, variance_of_draws

__all__ = [
    "AGGREGATIONS",
    "AutoencoderInferer",
    "AutoencoderOutput",
    "ClassifierGuidance",
    "CounterfactualInferer",
    "CounterfactualQuestion",
    "CounterfactualRecord",
    "CounterfactualResult",
    "DRAWS",
    "DenoisingProfile",
    "DiffusionClassifierInferer",
    "DiffusionClassifierResult",
    "ENCODINGS",
    "Guidance",
    "GuidanceStep",
    "HEAD_ROLES",
    "JointDiffusionInferer",
    "LatentSpace",
    "NoiseDraws",
    "Parametrization",
    "RULES",
    "RepresentationGuidance",
    "ReverseChain",
    "SampleResult",
    "StepInfo",
    "Typicality",
    "aggregate",
    "count_votes",
    "flip_probability",
    "mean_errors",
    "replay",
    "stratified_timesteps",
    "variance_of_draws",
]
