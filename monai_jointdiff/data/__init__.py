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

"""Where data come from: phantoms, MedMNIST files, folders of images; and which image each draw of a run shows."""

from __future__ import annotations

from .anti_curriculum import (
    AntiCurriculumPseudoLabeller,
    Neighbours,
    informative_mixup,
    informative_samples,
    mutual_neighbours,
    nearest_neighbours,
    neighbour_labels,
    purified_anchors,
)
from .brain_phantoms import BRAIN_CLASSES, BrainPhantoms
from .draws import BalancedOrder, DrawBatchSampler, DrawDataset, DrawOrder, ShuffledOrder, draw_seed
from .folder import find_images, list_images, read_folder
from .intensity import IntensityRule
from .label_lists import (
    choose_labelled,
    keep_few_labels,
    labelled_names,
    labels_fingerprint,
    open_with_few_labels,
    write_label_list,
)
from .labels import EncodedLabels, encode_labels
from .medmnist import download_medmnist
from .npz import read_npz
from .phantoms import CHEST_CLASSES, ChestPhantoms, Phantom, Phantoms
from .pseudo_labels import LabelledFeatures, PseudoLabeller, PseudoLabels, PseudoLabelTable, UnlabelledFeatures
from .reading import Correction, ImagePreprocessing, read_image
from .records import Found, Record
from .skin_phantoms import SKIN_CLASSES, SkinPhantoms
from .source import ImageSource, PrepareItem, make_phantoms, open_source
from .splits import canonical_part, complete_parts
from .streams import TwoStreamOrder
from .volumes import ImageFiles, SliceRule

__all__ = [
    "AntiCurriculumPseudoLabeller",
    "BRAIN_CLASSES",
    "BalancedOrder",
    "BrainPhantoms",
    "CHEST_CLASSES",
    "ChestPhantoms",
    "Correction",
    "DrawBatchSampler",
    "DrawDataset",
    "DrawOrder",
    "EncodedLabels",
    "Found",
    "ImageFiles",
    "ImagePreprocessing",
    "ImageSource",
    "IntensityRule",
    "LabelledFeatures",
    "Neighbours",
    "Phantom",
    "Phantoms",
    "PrepareItem",
    "PseudoLabelTable",
    "PseudoLabeller",
    "PseudoLabels",
    "Record",
    "SKIN_CLASSES",
    "ShuffledOrder",
    "SkinPhantoms",
    "SliceRule",
    "TwoStreamOrder",
    "UnlabelledFeatures",
    "canonical_part",
    "choose_labelled",
    "complete_parts",
    "download_medmnist",
    "draw_seed",
    "encode_labels",
    "find_images",
    "informative_mixup",
    "informative_samples",
    "keep_few_labels",
    "labelled_names",
    "labels_fingerprint",
    "list_images",
    "make_phantoms",
    "mutual_neighbours",
    "nearest_neighbours",
    "neighbour_labels",
    "open_source",
    "open_with_few_labels",
    "purified_anchors",
    "read_folder",
    "read_image",
    "read_npz",
    "write_label_list",
]
