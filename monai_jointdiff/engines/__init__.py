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

"""How a joint model is trained, evaluated and described: what stock MONAI engines need beside their own parts."""

from __future__ import annotations

from .bundle import (
    PretrainedReport,
    announce,
    check_options,
    class_weights,
    draw_order,
    epoch_length,
    find_bundle_root,
    freeze_encoder,
    json_word,
    load_pretrained,
    load_weights,
)
from .description import Decision, ModelDescription
from .explaining import (
    CounterfactualPrepareBatch,
    class_of_target,
    images_to_explain,
    question_in_words,
)
from .generation import (
    GenerationRow,
    SamplingInferer,
    compare_generation,
    draw_samples,
    noise_of_draws,
    write_generation,
)
from .precision import refuse_bf16_at_depth_two, resolve_autocast, set_tf32
from .prepare_batch import JointPrepareBatch, ValidationPrepareBatch
from .reporting import ClassificationReporter, choose_decision, write_predictions_csv
from .serving import (
    announce_model,
    images_to_classify,
    load_trained,
    noise_items,
    preprocessing_of_model,
    require_trained,
    source_of_model,
    start_model,
)
from .training_report import TrainingReport, predict

__all__ = [
    "ClassificationReporter",
    "CounterfactualPrepareBatch",
    "Decision",
    "GenerationRow",
    "JointPrepareBatch",
    "ModelDescription",
    "PretrainedReport",
    "SamplingInferer",
    "TrainingReport",
    "ValidationPrepareBatch",
    "announce",
    "announce_model",
    "check_options",
    "choose_decision",
    "class_of_target",
    "class_weights",
    "compare_generation",
    "draw_order",
    "draw_samples",
    "epoch_length",
    "find_bundle_root",
    "freeze_encoder",
    "images_to_classify",
    "images_to_explain",
    "json_word",
    "load_pretrained",
    "load_trained",
    "load_weights",
    "noise_items",
    "noise_of_draws",
    "predict",
    "preprocessing_of_model",
    "question_in_words",
    "refuse_bf16_at_depth_two",
    "require_trained",
    "resolve_autocast",
    "set_tf32",
    "source_of_model",
    "start_model",
    "write_generation",
    "write_predictions_csv",
]
