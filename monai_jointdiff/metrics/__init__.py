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

"""What is measured: classification, calibration, generated images, counterfactuals and where they change an image."""

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
from monai_jointdiff.metrics.counterfactual import (
    CompositionMetric,
    CounterfactualTransitionMetric,
    CounterfactualValidityMetric,
    FlipFigures,
    FlipReport,
    ProximityMetric,
    RealismMetric,
    ReversibilityMetric,
    composition,
    cout,
    flip_rate,
    grouped_wilson_interval,
    l1_distance,
    l2_distance,
    reached_target,
    reversibility,
    sparsity,
    split_frechet_distance,
    structural_similarity,
    target_probability,
    wilson_interval,
)
from monai_jointdiff.metrics.counterfactual_figures import (
    CounterfactualFigures,
    Judgement,
    ProximityFigures,
    counterfactual_figures,
)
from monai_jointdiff.metrics.cumulative import DenoisingErrorMetric, MacroAUCMetric
from monai_jointdiff.metrics.detection import (
    DetectionReport,
    MomentsDetector,
    PrincipalComponentDetector,
    detection_report,
    max_softmax_score,
)
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
from monai_jointdiff.metrics.localization import (
    BestThresholdMetric,
    LocalizationMetric,
    LocalizationReport,
    Preservation,
    PreservationMetric,
    best_threshold,
    change_map,
    localization_auprc,
    localization_dice,
    localization_iou,
    localization_report,
    pointing_game,
    pooled_localization_auprc,
    preservation,
)
from monai_jointdiff.metrics.repeats import mean_of_repeats
from monai_jointdiff.metrics.selective import (
    BrierScoreMetric,
    RiskCoverageCurve,
    SelectiveReport,
    abstention_threshold,
    accuracy_at_coverage,
    area_under_risk_coverage,
    brier_score,
    excess_area_under_risk_coverage,
    predictive_entropy,
    risk_coverage_curve,
    selective_report,
)

__all__ = [
    "BestThresholdMetric",
    "BrierScoreMetric",
    "ClassificationReport",
    "CompositionMetric",
    "CounterfactualFigures",
    "CounterfactualTransitionMetric",
    "CounterfactualValidityMetric",
    "DenoisingErrorMetric",
    "DetectionReport",
    "EfficientNetFeatures",
    "FeatureExtractor",
    "FlipFigures",
    "FlipReport",
    "FloorResult",
    "GaussianReference",
    "Interval",
    "Judgement",
    "KernelDistance",
    "LocalizationMetric",
    "LocalizationReport",
    "MacroAUCMetric",
    "MomentsDetector",
    "Preservation",
    "PreservationMetric",
    "PrincipalComponentDetector",
    "ProximityFigures",
    "ProximityMetric",
    "RealismMetric",
    "RandomConvFeatures",
    "ReliabilityBins",
    "ReversibilityMetric",
    "RiskCoverageCurve",
    "SelectiveReport",
    "abstention_threshold",
    "accuracy_at_coverage",
    "area_under_risk_coverage",
    "area_under_roc",
    "best_threshold",
    "bootstrap_intervals",
    "brier_score",
    "change_map",
    "choose_threshold",
    "classification_report",
    "composition",
    "counterfactual_figures",
    "cout",
    "detection_report",
    "excess_area_under_risk_coverage",
    "expected_calibration_error",
    "fit_temperature",
    "flip_rate",
    "frechet_distance",
    "frechet_distance_of_moments",
    "gaussian_moments",
    "grouped_wilson_interval",
    "kernel_distance",
    "l1_distance",
    "l2_distance",
    "localization_auprc",
    "localization_dice",
    "localization_iou",
    "localization_report",
    "macro_auc",
    "max_softmax_score",
    "mean_of_repeats",
    "pca_logistic_floor",
    "pointing_game",
    "pooled_localization_auprc",
    "predictive_entropy",
    "preservation",
    "reached_target",
    "reliability_bins",
    "reversibility",
    "risk_coverage_curve",
    "roc_curve",
    "selective_report",
    "sparsity",
    "split_frechet_distance",
    "structural_similarity",
    "target_probability",
    "wilson_interval",
]
