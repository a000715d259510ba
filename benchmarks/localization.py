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

"""Where the change of a counterfactual lies, against the masks of the findings, beside maps that need no generation.

    JOINTDIFF_DATA=... python -m benchmarks.localization [--quick] [--cells DATA:SEED ...] [--work DIR]

Abnormal images are asked for the normal class; the absolute difference is compared with the mask. Controls: Grad-CAM
and occlusion sensitivity (MONAI's) of the same network, and a map without any model: for phantoms the distance to the
mean normal training image, for brain slices the FLAIR intensity, for ultrasound its inverse. Every method gets one
threshold, chosen on the validation part (for brain slices on the training patients), and is reported on the test part.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.visualize import GradCAM, OcclusionSensitivity
from torch import Tensor, nn

from benchmarks.common import RESULTS, ROOT, Cell, CellStore, mean_interval, train_bundle, write_result
from benchmarks.joint_vs_single import load
from monai_jointdiff.data import open_source
from monai_jointdiff.inferers import CounterfactualInferer
from monai_jointdiff.metrics import best_threshold, localization_report

SEEDS = (0, 1, 2)
NORMAL = 0
INFERER: dict[str, Any] = {"num_inference_steps": 8, "precision": 2.0, "max_trials": 6, "probability": 0.9}
RULES: dict[str, dict[str, Any]] = {
    "counterfactual": {**INFERER, "timestep": 500},
    "counterfactual in a region": {**INFERER, "timestep": 500, "region_fraction": 0.15},
}
# data set: bundle, file, options of the training, part on which thresholds are chosen, most images of a part
DATA: dict[str, dict[str, Any]] = {
    "phantoms": {"bundle": "chest_xray", "options": {}, "choose": "val", "count": 60},
    "brats2013_slices_64": {"bundle": "brain_mri", "options": {"epochs": 40}, "choose": "train", "count": 60},
    "busi_64": {"bundle": "chest_xray", "options": {"epochs": 30}, "choose": "val", "count": 60},
}
FIGURES = ("auprc", "iou", "iou_best", "dice", "pointing", "inside", "outside", "ratio")


def train(data: str, seed: int, folder: Path, quick: bool) -> None:
    """Run the bundle by options alone, unless it has run."""
    if (folder / "output" / "summary.json").is_file():
        return
    about = DATA[data]
    options = {"seed": seed, "num_samples": 0, "counterfactual_pictures": 0, **about["options"]}
    if data != "phantoms":
        options["dataset_dir"] = Path(os.environ["JOINTDIFF_DATA"]) / f"{data}.npz"
    if quick:
        options |= {"epochs": 1, "train#epoch_length": 5}
    train_bundle([f"{about['bundle']}/train.json"], folder, options)


def abnormal(data: str, seed: int, part: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, C, *spatial), labels and masks of abnormal images, and nothing else."""
    images, labels, masks = prepared(data, seed, part, count, lambda label: label != NORMAL)
    return images, labels, masks


def prepared(
    data: str, seed: int, part: str, count: int, wanted: Callable[[int], bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Prepared images of a part whose label is wanted, evenly spread over the part."""
    place = None if data == "phantoms" else Path(os.environ["JOINTDIFF_DATA"]) / f"{data}.npz"
    source = open_source(place, seed=seed) if place else open_source(None, seed=seed, phantom_counts=(6000, 300, 600))
    items = [item for item in map(source.preprocessing(), source.part(part)) if wanted(int(item["label"]))]
    items = [items[n] for n in torch.linspace(0, len(items) - 1, min(count, len(items))).round().long().tolist()]
    images, masks = (torch.stack([torch.as_tensor(item[key]).float() for item in items]) for key in ("image", "mask"))
    return images, torch.tensor([int(item["label"]) for item in items]), masks > 0


def change_maps(network: nn.Module, scheduler: Any, images: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """|counterfactual - reconstruction| toward the normal class, and what it took."""
    inferer = CounterfactualInferer(scheduler, **options)
    results = [inferer(batch, network, target=NORMAL) for batch in images.split(50)]
    return {
        "maps": torch.cat([result.difference for result in results]).abs(),
        "reached": float(torch.cat([result.reached for result in results]).double().mean()),
        "calls": sum(result.network_calls * len(result.image) for result in results) / len(images),
        "seconds": sum(result.seconds for result in results) / len(images),
    }


def cam_maps(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Grad-CAM of the true class on the middle block, 1 where it is strongest."""
    cam = GradCAM(nn_module=network, target_layers="middle_block")
    maps = [cam(x=image[None], class_idx=int(c)) for image, c in zip(images, labels, strict=True)]
    return 1 - torch.cat(maps)  # MONAI's normalization puts 0 where the activation is strongest


def occlusion_maps(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Fall of the true class's probability when a patch is covered."""
    patch = max(4, images.shape[-1] // 8)
    found = []
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            occlusion = OcclusionSensitivity(network, mask_size=patch, n_batch=128, overlap=0.5, verbose=False)
            sensitivity, _ = occlusion(image[None])  # probabilities
            before = network(image[None]).softmax(1)[0, label]
            found.append((before - sensitivity[:, label]).clamp(min=0)[None])
    return torch.cat(found)


def no_model(data: str, images: Tensor, seed: int) -> Tensor:
    """A map from the image alone."""
    if data == "phantoms":
        normal, _, _ = prepared(data, seed, "train", 400, lambda label: label == NORMAL)
        return (images - normal.mean(0)).abs()
    intensity = (images[:, :1] + 1) / 2  # of the first channel: FLAIR, or ultrasound, where lesions are dark
    return intensity if data.startswith("brats") else 1 - intensity


def measure(cell: Cell, work: Path, quick: bool) -> dict[str, Any]:
    """Train one network; all maps of it, on the part that chooses and on the test part."""
    folder = work / f"{cell.data}_{cell.seed}"
    train(cell.data, cell.seed, folder, quick)
    network, description = load(folder)
    about = DATA[cell.data]
    count = 4 if quick else about["count"]
    parts = {part: abnormal(cell.data, cell.seed, part, count) for part in (about["choose"], "test")}
    scheduler = description.build_scheduler("ddim")
    values: dict[str, Any] = {}
    makers: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
        **{n: lambda x, _, o=o: change_maps(network, scheduler, x, o) for n, o in RULES.items()},  # type: ignore[misc]
        "Grad-CAM": lambda x, c: {"maps": cam_maps(network, x, c)},
        "occlusion": lambda x, c: {"maps": occlusion_maps(network, x, c)},
        "no model": lambda x, _: {"maps": no_model(cell.data, x, cell.seed)},
    }
    for name, make in makers.items():
        found = {part: make(images, labels) for part, (images, labels, _) in parts.items()}
        threshold = best_threshold(found[about["choose"]]["maps"], parts[about["choose"]][2])
        report = localization_report(found["test"].pop("maps"), parts["test"][2], threshold).as_dict()
        values[name] = {**report, **found["test"]}
    return values


def tables(store: CellStore, settings: Mapping[str, Any]) -> None:
    """Write the table from the cells there are."""
    rows, missing = [], []
    for data in DATA:
        cells = {seed: store.get(Cell(data, "maps", seed)) for seed in SEEDS}
        found = [values for values in cells.values() if values]
        missing += [f"{data} seed {seed}" for seed, values in cells.items() if not values]
        for name in found[0] if found else ():
            figures = {f: mean_interval([_value(values[name][f]) for values in found]) for f in FIGURES}
            extra = {k: mean_interval([v[name][k] for v in found]) for k in ("reached", "calls") if k in found[0][name]}
            rows.append({"data": data, "method": name, **figures, **extra})
    notes = [
        f"Not run: {', '.join(missing) or 'nothing'}. iou and dice at the threshold chosen on other images (for brain "
        "slices on the training patients); iou_best at the threshold that is best on the test images: a ceiling.",
        "Targets: phantoms pointing at least 0.95, IoU at least 0.6, ratio of change outside to inside below 0.1.",
        "Phantoms, seed 0: Grad-CAM and occlusion were measured again after a correction of how MONAI's maps are read; "
        "the other rows were kept. Threads were 1 for these, whatever the line below says of the rendering.",
        "Counterfactuals: " + ", ".join(f"{key} {value}" for key, value in settings["inferer"].items()) + ".",
    ]
    if rows:
        write_result("localization", "Where the change lies", rows, notes=notes)


def _value(figure: Any) -> float:
    return float(figure["value"]) if isinstance(figure, Mapping) else float(figure)


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, tiny trainings: proves the script")
    parser.add_argument("--cells", nargs="*", help="data:seed of the cells to measure; none: all")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "localization", help="folder for networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    grid = [("phantoms", 0)] if options.quick else [(data, seed) for seed in SEEDS for data in DATA]
    if options.cells is not None:
        grid = [(data, seed) for data, seed in grid if f"{data}:{seed}" in options.cells]
    work = options.work / "quick" if options.quick else options.work
    settings = {"inferer": INFERER, "options": {data: about["options"] for data, about in DATA.items()}}
    store = CellStore("localization", settings, work if options.quick else RESULTS / "cells")
    store.run_missing([Cell(data, "maps", seed) for data, seed in grid], lambda c: measure(c, work, options.quick))
    if not options.quick:
        tables(store, settings)


if __name__ == "__main__":
    main()
