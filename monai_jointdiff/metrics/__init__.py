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

"""What is measured: classification with intervals, calibration, and the distance of generated to real images."""

from __future__ import annotations

from monai_jointdiff.metrics.bootstrap import Interval, bootstrap_intervals
from monai_jointdiff.metrics.calibration import (
    ReliabilityBins,
    choose_threshold,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from monai_jointdiff.metrics.classification import (
    ClassificationReport,
    area_under_roc,
    classification_report,
    macro_auc,
    roc_curve,
)
from monai_jointdiff.metrics.cumulative import DenoisingErrorMetric, MacroAUCMetric
from monai_jointdiff.metrics.features import EfficientNetFeatures, FeatureExtractor, RandomConvFeatures
from monai_jointdiff.metrics.floors import FloorResult, pca_logistic_floor
from monai_jointdiff.metrics.generation import (
    GaussianReference,
    KernelDistance,
    frechet_distance,
    frechet_distance_of_moments,
    gaussian_moments,
    kernel_distance,
)

__all__ = [
    "ClassificationReport",
    "DenoisingErrorMetric",
    "EfficientNetFeatures",
    "FeatureExtractor",
    "FloorResult",
    "GaussianReference",
    "Interval",
    "KernelDistance",
    "MacroAUCMetric",
    "RandomConvFeatures",
    "ReliabilityBins",
    "area_under_roc",
    "bootstrap_intervals",
    "choose_threshold",
    "classification_report",
    "expected_calibration_error",
    "fit_temperature",
    "frechet_distance",
    "frechet_distance_of_moments",
    "gaussian_moments",
    "kernel_distance",
    "macro_auc",
    "pca_logistic_floor",
    "reliability_bins",
    "roc_curve",
]
