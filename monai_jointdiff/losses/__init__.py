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

"""What is minimized: the joint objective of noise prediction and classification, and its weights."""

from __future__ import annotations

from .autoencoder import AutoencoderLoss, kl_to_standard_normal
from .fixmatch import FixMatchLoss
from .joint_diffusion import JointDiffusionLoss
from .pi_model import PiModelLoss
from .pseudo_label import PseudoLabelLoss
from .semi_supervised import SemiSupervisedLoss, UnlabelledSums, UnlabelledTerm
from .weights import favero_weight, min_snr_weight

__all__ = [
    "AutoencoderLoss",
    "FixMatchLoss",
    "JointDiffusionLoss",
    "PiModelLoss",
    "PseudoLabelLoss",
    "SemiSupervisedLoss",
    "UnlabelledSums",
    "UnlabelledTerm",
    "favero_weight",
    "kl_to_standard_normal",
    "min_snr_weight",
]
