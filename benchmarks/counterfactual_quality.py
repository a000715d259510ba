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

"""What counterfactuals look like and what the way there leaves alone: realism, proximity, composition, reversibility.

    JOINTDIFF_DATA=... python -m benchmarks.counterfactual_quality [--quick] [--cells SEED ...] [--work DIR]

The counterfactuals are those that `benchmarks.counterfactual` made with its main method.
Distances are between the counterfactuals toward a class and the test images of that class, in the feature spaces of
`benchmarks.joint_vs_single`; beside them the same number of real training images of that class (the floor) and the
images from which the counterfactuals were made (nothing done).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import counterfactual
from benchmarks.common import RESULTS, ROOT, Cell, CellStore, mean_interval, write_result
from benchmarks.counterfactual import DATA, DIRECTIONS, IMAGES, MAIN, METHODS, SEEDS
from benchmarks.judges import feature_spaces
from monai_jointdiff.inferers import CounterfactualInferer
from monai_jointdiff.metrics import (
    composition,
    cout,
    frechet_distance,
    kernel_distance,
    l1_distance,
    l2_distance,
    reversibility,
    sparsity,
    split_frechet_distance,
    structural_similarity,
)

CYCLES = (1, 10)  # factual reconstructions, one of the other
FEW = 20  # images of each direction that go round and round, or there and back


def realism(shown: Mapping[str, Tensor], source: Tensor, real: Tensor, spaces: Mapping[str, Any]) -> dict[str, float]:
    """Distances to real images of the class, in each feature space.

    Args:
        shown: images by what they are; "counterfactuals" among them.
        source: images from which the counterfactuals were made.
        real: test images of the class.
        spaces: extractors of features by name.
    """
    found = {}
    for space, extractor in spaces.items():
        features = {name: extractor.extract(images.numpy()) for name, images in shown.items()}
        reference = extractor.extract(real.numpy())
        for name, values in features.items():
            found[f"frechet of {name}, {space}"] = float(frechet_distance(values, reference))
            found[f"kernel of {name}, {space}"] = kernel_distance(values, reference).value
        own = extractor.extract(source.numpy())
        found[f"split frechet to the source class, {space}"] = split_frechet_distance(features["counterfactuals"], own)
    return found


def proximity(changed: Tensor, images: Tensor) -> dict[str, float]:
    """Means over the images."""
    measures = {"L1": l1_distance, "L2": l2_distance, "SSIM": structural_similarity, "changed pixels": sparsity}
    return {name: float(measure(changed, images).mean()) for name, measure in measures.items()}


def measure(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """All figures of the counterfactuals of one network, each direction apart."""
    made = torch.load(counterfactual.pictures_of(work, MAIN, seed, quick), weights_only=True)
    network, description = counterfactual.get_network(MAIN, seed, work, quick)
    inferer = CounterfactualInferer(description.build_scheduler("ddim"), **METHODS[MAIN])
    # whatever it is asked for is reached already, so that it only goes out and back
    idle = CounterfactualInferer(description.build_scheduler("ddim"), **{**METHODS[MAIN], "probability": 1e-9})
    parts = counterfactual.read(DATA)
    spaces = feature_spaces(*parts["train"], 2, work / "joint_vs_single" / f"judge_{DATA}.pt")

    def of_direction(label: int) -> dict[str, Any]:
        images, reconstruction, changed = (
            made[key][made["label"] == label] for key in ("image", "reconstruction", "counterfactual")
        )
        of_target = {part: parts[part][0][parts[part][1] == 1 - label] for part in ("train", "test")}
        shown = {
            "counterfactuals": changed,
            "real training images": of_target["train"][: len(changed)],
            "images as they were": images,
        }
        few, few_changed = images[:FEW], changed[:FEW]
        moved = composition(few, lambda x: idle(x, network).reconstruction, CYCLES)
        far = reversibility(
            few,
            lambda _: few_changed,  # made before
            lambda x: inferer(x, network, target=label).counterfactual,
        )
        scores = cout(images, changed, lambda x: counterfactual.probabilities(network, x), 1 - label, label)
        return {
            "images": len(images),
            **{f"{key} to image": value for key, value in proximity(changed, images).items()},
            **{f"{key} to reconstruction": value for key, value in proximity(changed, reconstruction).items()},
            **{f"composition, {cycles} cycles": float(moved[cycles].mean()) for cycles in CYCLES},
            "reversibility": float(far.mean()),
            "L1 of those asked back": float(l1_distance(few_changed, few).mean()),
            "COUT": float(scores.mean()),
            **realism(shown, images, of_target["test"], spaces),
        }

    return {direction: of_direction(label) for label, direction in enumerate(DIRECTIONS)}


def table(cells: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> None:
    """A line for each figure, a column for each direction."""
    names = [name for name in cells[0][DIRECTIONS[0]] if name != "images"]
    rows = [{"figure": n, **{d: mean_interval([cell[d][n] for cell in cells]) for d in DIRECTIONS}} for n in names]
    notes = [
        f"{len(cells)} of {len(SEEDS)} seeds, {cells[0][DIRECTIONS[0]]['images']} counterfactuals a direction of the "
        f"method {MAIN} of `benchmarks.counterfactual`; means over images, then over seeds with 95 % t-interval. "
        "Images in [-1, 1].",
        "L1, L2 (root of the mean square), SSIM, share of the pixels that change by more than 0.05. Composition: L1 "
        "after so many factual reconstructions, one of the other. Reversibility: L1 after there and back; both of "
        f"{FEW} images a direction and seed. COUT by the model: from -1 to 1, higher is better.",
        "Distances to test images of the target class, of as many images as there are counterfactuals, and so larger "
        "than those of thousands; lower is better. Split frechet: to the source class, each half against the other.",
    ]
    title = "Counterfactuals on PneumoniaMNIST: realism, proximity and axioms"
    write_result("counterfactual_quality", title, rows, notes=notes, environment=environment)


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="of few images: proves the script")
    parser.add_argument("--cells", nargs="*", help="seed ...; `none` only writes the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder for networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    root = options.work / "counterfactual" / "quick" if options.quick else RESULTS / "cells"
    settings = {"images": 4 if options.quick else IMAGES, "method": METHODS[MAIN], "few": FEW}
    store = CellStore("counterfactual_quality", settings, root)
    seeds = SEEDS[:1] if options.quick else SEEDS
    wanted = [seed for seed in seeds if options.cells is None or str(seed) in options.cells]
    store.run_missing([Cell(DATA, MAIN, s) for s in wanted], lambda c: measure(c.seed, options.work, options.quick))
    cells = [values for seed in SEEDS if (values := store.get(Cell(DATA, MAIN, seed)))]
    if cells and not options.quick:
        table(cells, store.records()[0]["environment"])


if __name__ == "__main__":
    main()
