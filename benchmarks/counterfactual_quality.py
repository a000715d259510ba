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

The counterfactuals are those that `benchmarks.counterfactual` made with its main method, which has to run before.
Distances are between the counterfactuals toward a class and test images of that class, in the feature spaces of
`benchmarks.joint_vs_single`. Beside them, of as many images each: other test images of that class (the floor), training
images of it (the parts of PneumoniaMNIST differ), and the images from which the counterfactuals were made (nothing
done). Which test images are the reference and which the floor is drawn for each seed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
SOURCE = "images as they were"
FEW = 20  # images of each direction that go round and round, or there and back


def realism(shown: Mapping[str, Tensor], reference: Tensor, own: Tensor, spaces: Mapping[str, Any]) -> dict[str, float]:
    """Distances to real images of the class asked for, and to the class that was left.

    Args:
        shown: images by what they are, as many of each; "counterfactuals" among them.
        reference: other test images of the class asked for.
        own: images from which the counterfactuals were made.
        spaces: extractors of features by name.
    """
    found = {}
    for space, extractor in spaces.items():
        features = {name: extractor.extract(images.numpy()) for name, images in shown.items()}
        real, source = extractor.extract(reference.numpy()), extractor.extract(own.numpy())
        for name, values in features.items():
            found[f"frechet of {name}, {space}"] = float(frechet_distance(values, real))
            found[f"kernel of {name}, {space}"] = kernel_distance(values, real).value
        for name, values in (("counterfactuals", features["counterfactuals"]), (SOURCE, source)):
            found[f"split frechet of {name} to the class left, {space}"] = split_frechet_distance(values, source)
    return found


def proximity(changed: Tensor, images: Tensor) -> dict[str, float]:
    """Means over the images."""
    measures = {"L1": l1_distance, "L2": l2_distance, "SSIM": structural_similarity, "changed pixels": sparsity}
    return {name: float(measure(changed, images).mean()) for name, measure in measures.items()}


@dataclass(frozen=True)
class Made:
    """The counterfactuals of one direction.

    Args:
        label: class of the images; the other one was asked for.
        images: (N, C, H, W).
        reconstruction: factual ones.
        changed: counterfactuals.
    """

    label: int
    images: Tensor
    reconstruction: Tensor
    changed: Tensor


def directions(seed: int, work: Path, quick: bool) -> dict[str, Made]:
    """What `benchmarks.counterfactual` has made, each direction apart."""
    made = torch.load(counterfactual.pictures_of(work, MAIN, seed, quick), weights_only=True)
    names = ("image", "reconstruction", "counterfactual")
    return {d: Made(k, *(made[name][made["label"] == k] for name in names)) for k, d in enumerate(DIRECTIONS)}


def looks(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Realism and proximity of the counterfactuals of one network."""
    network, _ = counterfactual.get_network(MAIN, seed, work, quick)
    parts = counterfactual.read(DATA)
    spaces = feature_spaces(*parts["train"], 2, work / "joint_vs_single" / f"judge_{DATA}.pt")
    generator = torch.Generator().manual_seed(seed)

    def of_direction(made: Made) -> dict[str, Any]:
        of_target = {}
        for part in ("train", "test"):
            images, labels = parts[part]
            images = images[labels == 1 - made.label]
            of_target[part] = images[torch.randperm(len(images), generator=generator)]
        count = len(made.images)
        shown = {
            "counterfactuals": made.changed,
            "other test images (floor)": of_target["test"][:count],
            "training images": of_target["train"][:count],
            SOURCE: made.images,
        }
        scores = cout(
            made.images,
            made.changed,
            lambda x: counterfactual.probabilities(network, x),
            1 - made.label,
            made.label,
        )
        return {
            "images": count,
            **{f"{key} to image": value for key, value in proximity(made.changed, made.images).items()},
            **{f"{key} to reconstruction": v for key, v in proximity(made.changed, made.reconstruction).items()},
            "COUT": float(scores.mean()),
            **realism(shown, of_target["test"][count:], made.images, spaces),
        }

    return {direction: of_direction(made) for direction, made in directions(seed, work, quick).items()}


def axioms(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Composition and reversibility of the way of one network."""
    network, description = counterfactual.get_network(MAIN, seed, work, quick)
    inferer = CounterfactualInferer(description.build_scheduler("ddim"), **METHODS[MAIN])
    # whatever it is asked for is reached already, so that it only goes out and back
    idle = CounterfactualInferer(description.build_scheduler("ddim"), **{**METHODS[MAIN], "probability": 1e-9})

    def of_direction(made: Made) -> dict[str, Any]:
        few, changed = made.images[:FEW], made.changed[:FEW]
        moved = composition(few, lambda x: idle(x, network).reconstruction, CYCLES)
        far = reversibility(
            few,
            lambda _: changed,  # made before
            lambda x: inferer(x, network, target=made.label).counterfactual,
        )
        return {
            **{f"composition, {cycles} cycles": float(moved[cycles].mean()) for cycles in CYCLES},
            "L1 of those asked back": float(l1_distance(changed, few).mean()),
            "reversibility": float(far.mean()),
        }

    return {direction: of_direction(made) for direction, made in directions(seed, work, quick).items()}


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], environment: Mapping[str, Any]) -> None:
    """A line for each figure, a column for each direction.

    Args:
        found: by study, the cells there are.
        environment: of the first cell.
    """
    rows = [
        {
            "figure": name,
            "seeds": len(cells),
            **{d: mean_interval([cell[d][name] for cell in cells]) for d in DIRECTIONS},
        }
        for cells in found.values()
        for name in (cells[0][DIRECTIONS[0]] if cells else ())
        if name != "images"
    ]
    notes = [
        f"{IMAGES} counterfactuals a direction and seed of the method {MAIN} of `benchmarks.counterfactual`; means "
        "over images, then over seeds with 95 % t-interval. Images in [-1, 1].",
        "L1, L2 (root of the mean square), SSIM, share of the pixels that change by more than 0.05. Composition: L1 "
        "after so many factual reconstructions, one of the other. Reversibility: L1 after there and back; both of "
        f"{FEW} images a direction and seed. COUT by the model: from -1 to 1, higher is better.",
        "Distances to test images of the class asked for, of as many images as there are counterfactuals, and so "
        "larger than those of thousands; lower is better. Split frechet: to the class left, half against half.",
    ]
    title = "Counterfactuals on PneumoniaMNIST: realism, proximity and axioms"
    write_result("counterfactual_quality", title, rows, notes=notes, environment=environment)


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="of few images: proves the script")
    parser.add_argument("--cells", nargs="*", help="looks:seed or axioms:seed ...; `none` only writes the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder for networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    root = options.work / "counterfactual" / "quick" if options.quick else RESULTS / "cells"
    settings = {"images": 4 if options.quick else IMAGES, "method": METHODS[MAIN], "few": FEW}
    store = CellStore("counterfactual_quality", settings, root)
    studies = {"looks": looks, "axioms": axioms}
    seeds = SEEDS[:1] if options.quick else SEEDS
    grid = [Cell(DATA, study, seed) for seed in seeds for study in studies]
    wanted = [c for c in grid if options.cells is None or f"{c.method}:{c.seed}" in options.cells]
    store.run_missing(wanted, lambda c: studies[c.method](c.seed, options.work, options.quick))
    found = {study: [v for seed in SEEDS if (v := store.get(Cell(DATA, study, seed)))] for study in studies}
    if store.records() and not options.quick:
        table(found, store.records()[0]["environment"])


if __name__ == "__main__":
    main()
