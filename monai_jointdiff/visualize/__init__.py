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

"""What people look at: panels of images, plots of metrics, tables."""

from __future__ import annotations

from monai_jointdiff.visualize.counterfactual import (
    CounterfactualCase,
    CounterfactualTiles,
    counterfactual_panel,
    counterfactual_strip,
    difference_overlay,
)
from monai_jointdiff.visualize.curves import accuracy_against_calls_figure, risk_coverage_figure
from monai_jointdiff.visualize.evidence import evidence_panel
from monai_jointdiff.visualize.label_efficiency import label_efficiency_figure
from monai_jointdiff.visualize.panels import denoising_strip, image_grid, save_png, to_tile
from monai_jointdiff.visualize.plots import (
    confusion_matrix_figure,
    reliability_figure,
    roc_curve_figure,
    save_figure,
)
from monai_jointdiff.visualize.report import counterfactual_report, png_bytes
from monai_jointdiff.visualize.tables import format_table

__all__ = [
    "CounterfactualCase",
    "CounterfactualTiles",
    "accuracy_against_calls_figure",
    "confusion_matrix_figure",
    "counterfactual_panel",
    "counterfactual_report",
    "counterfactual_strip",
    "denoising_strip",
    "difference_overlay",
    "evidence_panel",
    "format_table",
    "image_grid",
    "label_efficiency_figure",
    "png_bytes",
    "reliability_figure",
    "risk_coverage_figure",
    "roc_curve_figure",
    "save_figure",
    "save_png",
    "to_tile",
]
