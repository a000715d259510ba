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

from .autoencoder import (
    AutoencoderPrepareBatch,
    AutoencoderReport,
    ReconstructionPictures,
    evaluate_reconstruction,
    make_perceptual,
    reconstruction_metrics,
    start_autoencoder,
)
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
from .diffusion_classifying import (
    AbstentionRule,
    DiffusionClassificationReporter,
    DiffusionClassifierPrepareBatch,
    ImagesToDecide,
    answers_of_first_draws,
    classify_by_diffusion,
    conditional_description,
    doubt,
    images_to_decide,
    write_diffusion_csv,
)
from .explaining import (
    CounterfactualPrepareBatch,
    class_of_target,
    class_to_generate,
    images_to_explain,
    question_in_words,
    spread,
)
from .first_stage import (
    AutoencoderDescription,
    FirstStage,
    autoencoder_arguments,
    build_autoencoder,
    describe_autoencoder,
    latent_scale_factor,
    load_autoencoder_weights,
    open_first_stage,
    weights_fingerprint,
)
from .generation import (
    GenerationRow,
    SamplingInferer,
    compare_generation,
    draw_samples,
    noise_of_draws,
    write_generation,
)
from .label_efficiency import LabelEfficiencyStudy, LabelRun, LabelRunResult, summarize_label_runs
from .precision import refuse_bf16_at_depth_two, resolve_autocast, set_tf32
from .prepare_batch import JointPrepareBatch, ValidationPrepareBatch
from .reporting import ClassificationReporter, choose_decision, write_predictions_csv
from .semi_supervised import (
    PRESETS,
    SemiSupervisedPrepareBatch,
    SemiSupervisedSettings,
    check_task,
    make_unlabelled_term,
    parameter_groups,
    semi_supervised_settings,
    task_of,
    view_transforms,
)
from .serving import (
    announce_model,
    images_to_classify,
    load_trained,
    noise_items,
    preprocessing_of_model,
    require_trained,
    source_of_model,
    space_of_model,
    start_model,
)
from .training_report import TrainingReport, predict

__all__ = [
    "AbstentionRule",
    "AutoencoderDescription",
    "AutoencoderPrepareBatch",
    "AutoencoderReport",
    "ClassificationReporter",
    "CounterfactualPrepareBatch",
    "Decision",
    "DiffusionClassificationReporter",
    "DiffusionClassifierPrepareBatch",
    "FirstStage",
    "GenerationRow",
    "ImagesToDecide",
    "JointPrepareBatch",
    "LabelEfficiencyStudy",
    "LabelRun",
    "LabelRunResult",
    "ModelDescription",
    "PRESETS",
    "PretrainedReport",
    "ReconstructionPictures",
    "SamplingInferer",
    "SemiSupervisedPrepareBatch",
    "SemiSupervisedSettings",
    "TrainingReport",
    "ValidationPrepareBatch",
    "announce",
    "announce_model",
    "answers_of_first_draws",
    "autoencoder_arguments",
    "build_autoencoder",
    "check_options",
    "check_task",
    "choose_decision",
    "class_of_target",
    "class_to_generate",
    "class_weights",
    "classify_by_diffusion",
    "compare_generation",
    "conditional_description",
    "describe_autoencoder",
    "doubt",
    "draw_order",
    "draw_samples",
    "epoch_length",
    "evaluate_reconstruction",
    "find_bundle_root",
    "freeze_encoder",
    "images_to_classify",
    "images_to_decide",
    "images_to_explain",
    "json_word",
    "latent_scale_factor",
    "load_autoencoder_weights",
    "load_pretrained",
    "load_trained",
    "load_weights",
    "make_perceptual",
    "make_unlabelled_term",
    "noise_items",
    "noise_of_draws",
    "open_first_stage",
    "parameter_groups",
    "predict",
    "preprocessing_of_model",
    "question_in_words",
    "reconstruction_metrics",
    "refuse_bf16_at_depth_two",
    "require_trained",
    "resolve_autocast",
    "semi_supervised_settings",
    "set_tf32",
    "source_of_model",
    "space_of_model",
    "spread",
    "start_autoencoder",
    "start_model",
    "summarize_label_runs",
    "task_of",
    "view_transforms",
    "weights_fingerprint",
    "write_diffusion_csv",
    "write_generation",
    "write_predictions_csv",
]
