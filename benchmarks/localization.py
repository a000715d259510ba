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

    JOINTDIFF_DATA=... python -m benchmarks.localization [--quick] [--cells DATA:NUMBER ...] [--work DIR]

Abnormal images are asked for the normal class; the absolute difference is compared with the mask. Controls: Grad-CAM
and occlusion sensitivity (MONAI's) of the same network, and a map without any model: for phantoms the distance to the
mean normal training image, for brain slices the FLAIR intensity, for ultrasound its inverse. Every method gets one
threshold, chosen on the validation part (for brain slices on the training patients), and is reported on the test part.
All maps are reported twice: as they are, and relative, averaged over 5 x 5 pixels and divided by the root mean square
of the image: the smallest change that turns an answer is large in one image and faint in another, and one threshold for
both cuts the one too wide and the other away.
NUMBER is the seed; brain slices are of six patients, and there it is the patient who is left out: the next one chooses
the epoch, the other four train.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.visualize import GradCAM, OcclusionSensitivity
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    ROOT,
    Cell,
    CellStore,
    Target,
    ensure_trained,
    mean_interval,
    write_result,
)
from benchmarks.joint_vs_single import load
from benchmarks.render import format_value
from monai_jointdiff.data import open_source
from monai_jointdiff.inferers import CounterfactualInferer
from monai_jointdiff.metrics import best_threshold, localization_auprc, localization_report

SEEDS = (0, 1, 2)
NORMAL = 0
INFERER: dict[str, Any] = {"num_inference_steps": 8, "precision": 2.0, "max_trials": 6, "probability": 0.9}
RULES: dict[str, dict[str, Any]] = {
    "counterfactual": INFERER,
    "counterfactual in a region": {**INFERER, "region_fraction": 0.15},
}
HALF = (32, 32)  # a few hundred slices ask for many epochs: of 64 px they would take hours on a thread


@dataclass(frozen=True)
class Study:
    """What a data set is trained with, and how often.

    Args:
        bundle: whose configurations.
        numbers: the seeds, or the patients who are left out one after the other.
        options: of the training.
        image_size: to which images and masks are brought; None: as they are.
        timesteps: T' of the counterfactuals; of several the one whose maps lie best in the masks of the part that
            chooses, as Grad-CAM has its best layer.
        choose: part on which thresholds are chosen.
        count: most images of a part, evenly spread over it.
    """

    bundle: str
    numbers: Sequence[int]
    options: Mapping[str, Any]
    image_size: Sequence[int] | None = None
    timesteps: Sequence[int] = (500,)
    choose: str = "val"
    count: int = 24


BRAIN = "brats2013_slices_64"
PHANTOMS = ("phantoms", "phantoms_3_epochs")  # the latter by the defaults of the bundle
STUDIES = {
    PHANTOMS[0]: Study("chest_xray", SEEDS, {"epochs": 10}, count=60),
    PHANTOMS[1]: Study("chest_xray", SEEDS[:2], {}, count=60),
    BRAIN: Study("brain_mri", range(6), {"epochs": 40, "val_interval": 10}, HALF, (200, 300, 500), "train"),
    "busi_64": Study("chest_xray", SEEDS, {"epochs": 40, "val_interval": 10}, HALF, (200, 300, 500)),
}
POINTING, IOU, RATIO = 0.95, 0.6, 0.1  # targets on phantoms, where the truth is known
DEEPEST = "Grad-CAM of the deepest layer"
TUNED = "occlusion of the best patch"
PATCHES = (4, 8, 16)  # pixels
CONTROLS = ("Grad-CAM", "occlusion", TUNED)  # that the change was to exceed elsewhere
KINDS = ("maps", "occlusion")  # of cells: all maps, and of real data the control that was tuned later
RELATIVE = "relative"
SMOOTHING = 5  # pixels along each axis, over which a relative map is averaged
ASKED = "relative, called abnormal"
OF_RELATIVE = ("auprc", "iou", "iou_best", "dice", "pointing")
OF_ASKED = ("auprc", "iou", "pointing")
FIGURES = ("auprc", "iou", "iou_best", "dice", "pointing", "inside", "outside", "ratio")


def without_patient(file: Path, number: int, folder: Path) -> Path:
    """Write the slices of a data set with one patient as the test part, the next as validation, the others to train.

    Args:
        file: `.npz` with arrays `<part>_images`, `<part>_patients` and so on.
        number: which patient, in the order of their names.
        folder: where to write.

    Returns:
        the new file.
    """
    with np.load(file) as arrays:
        names = [key.removeprefix("test_") for key in arrays if key.startswith("test_")]
        whole = {name: np.concatenate([arrays[f"{p}_{name}"] for p in ("train", "val", "test")]) for name in names}
        class_names = arrays["class_names"]
    patients = np.unique(whole["patients"])
    test, val = patients[number], patients[(number + 1) % len(patients)]
    chosen = {"test": whole["patients"] == test, "val": whole["patients"] == val}
    chosen["train"] = ~(chosen["test"] | chosen["val"])
    parts = {f"{part}_{name}": whole[name][rows] for part, rows in chosen.items() for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data.npz", class_names=class_names, **parts)
    return folder / "data.npz"


def place_of(cell: Cell, folder: Path) -> Path | None:
    """The data of a cell; None: phantoms."""
    if cell.data in PHANTOMS:
        return None
    file = Path(os.environ["JOINTDIFF_DATA"]) / f"{cell.data}.npz"
    return without_patient(file, cell.seed, folder) if cell.data == BRAIN else file


def train(cell: Cell, place: Path | None, folder: Path, quick: bool) -> None:
    """Run the bundle by options alone, unless it has run with them."""
    study = STUDIES[cell.data]
    options = {"seed": cell.seed, "num_samples": 0, "counterfactual_pictures": 0, **study.options}
    if place is not None:
        options["dataset_dir"] = place
    if study.image_size is not None:
        options["image_size"] = list(study.image_size)
    if quick:
        options |= {"epochs": 1, "train#epoch_length": 5}
    ensure_trained([f"{study.bundle}/train.json"], folder, options)


@dataclass(frozen=True)
class Cases:
    """Images (N, C, *spatial), labels (N,) and masks (N, 1, *spatial)."""

    images: Tensor
    labels: Tensor
    masks: Tensor


def prepared(
    place: Path | None,
    seed: int,
    part: str,
    count: int,
    wanted: Callable[[int], bool],
    image_size: Sequence[int] | None = None,
) -> Cases:
    """Prepared images of a part whose label is wanted, evenly spread over the part."""
    if place:
        source = open_source(place, seed=seed, image_size=image_size)
    else:
        source = open_source(None, seed=seed, phantom_counts=(6000, 300, 600))
    items = [item for item in map(source.preprocessing(), source.part(part)) if wanted(int(item["label"]))]
    items = [items[n] for n in torch.linspace(0, len(items) - 1, min(count, len(items))).round().long().tolist()]
    images, masks = (torch.stack([torch.as_tensor(item[key]).float() for item in items]) for key in ("image", "mask"))
    return Cases(images, torch.tensor([int(item["label"]) for item in items]), masks > 0)


def change_maps(network: nn.Module, scheduler: Any, images: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """|counterfactual - reconstruction| toward the normal class, and what it took.

    An image that the network calls normal before has nothing to reach (None where none has).
    """
    inferer = CounterfactualInferer(scheduler, **options)
    results = [inferer(batch, network, target=NORMAL) for batch in images.split(50)]
    already, reached = (torch.cat([getattr(result, name) for result in results]) for name in ("already", "reached"))
    return {
        "maps": torch.cat([result.difference for result in results]).abs(),
        "already": float(already.double().mean()),
        "reached": None if bool(already.all()) else float(reached[~already].double().mean()),
        "calls": sum(result.network_calls * len(result.image) for result in results) / len(images),
        "seconds": sum(result.seconds for result in results) / len(images),
    }


def best_timestep(network: nn.Module, scheduler: Any, cases: Cases, timesteps: Sequence[int]) -> int:
    """The T' whose changes lie best in the masks of these images."""

    def auprc(timestep: int) -> float:
        maps = change_maps(network, scheduler, cases.images, {**INFERER, "timestep": timestep})["maps"]
        return float(np.nanmean(localization_auprc(maps, cases.masks)))

    return timesteps[0] if len(timesteps) == 1 else max(timesteps, key=auprc)


def cam_layers(network: nn.Module) -> list[str]:
    """The last residual block of every level, and the middle: the head reads the maps of all."""
    names = [name for name, _ in network.named_modules()]
    levels = sum(name.startswith("down_blocks.") and name.count(".") == 1 for name in names)
    blocks = [[name for name in names if re.fullmatch(rf"down_blocks\.{n}\.resnets\.\d+", name)] for n in range(levels)]
    return [found[-1] for found in blocks if found] + ["middle_block"]


def cam_maps(network: nn.Module, images: Tensor, labels: Tensor, layer: str) -> Tensor:
    """Grad-CAM of the true class on a layer, 1 where it is strongest."""
    cam = GradCAM(nn_module=network, target_layers=layer)
    maps = [cam(x=image[None], class_idx=int(c)) for image, c in zip(images, labels, strict=True)]
    return 1 - torch.cat(maps)  # MONAI's normalization puts 0 where the activation is strongest


def best_layer(network: nn.Module, cases: Cases) -> str:
    """The layer whose Grad-CAM lies best in the masks of these images."""

    def auprc(layer: str) -> float:
        maps = cam_maps(network, cases.images, cases.labels, layer)
        return float(np.nanmean(localization_auprc(maps, cases.masks)))

    return max(cam_layers(network), key=auprc)


def occlusion_maps(network: nn.Module, images: Tensor, labels: Tensor, patch: int) -> Tensor:
    """Fall of the true class's probability when a patch of so many pixels is covered."""
    found = []
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            occlusion = OcclusionSensitivity(network, mask_size=patch, n_batch=128, overlap=0.5, verbose=False)
            sensitivity, _ = occlusion(image[None])  # probabilities
            before = network(image[None]).softmax(1)[0, label]
            found.append((before - sensitivity[:, label]).clamp(min=0)[None])
    return torch.cat(found)


def best_patch(network: nn.Module, cases: Cases) -> int:
    """The patch whose occlusion lies best in the masks of these images."""

    def auprc(patch: int) -> float:
        maps = occlusion_maps(network, cases.images, cases.labels, patch)
        return float(np.nanmean(localization_auprc(maps, cases.masks)))

    return max(PATCHES, key=auprc)


def no_model(data: str, images: Tensor, seed: int) -> Tensor:
    """A map from the image alone."""
    if data in PHANTOMS:
        normal = prepared(None, seed, "train", 400, lambda label: label == NORMAL).images
        return (images - normal.mean(0)).abs()
    intensity = (images[:, :1] + 1) / 2  # of the first channel: FLAIR, or ultrasound, where lesions are dark
    return intensity if data == BRAIN else 1 - intensity


def relative(maps: Tensor) -> Tensor:
    """Maps (N, 1, H, W) averaged over pixels around each, divided by their root mean square; zeros stay zeros."""
    smooth = F.avg_pool2d(maps, SMOOTHING, stride=1, padding=SMOOTHING // 2, count_include_pad=False)
    return smooth / smooth.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(torch.finfo(smooth.dtype).tiny)


def measure(cell: Cell, work: Path, quick: bool) -> dict[str, Any]:
    """Train one network; all maps of it, on the part that chooses and on the test part."""
    folder = work / f"{cell.data}_{cell.seed}"
    place = place_of(cell, folder)
    train(cell, place, folder, quick)
    network, description = load(folder)
    study = STUDIES[cell.data]
    choose, count = study.choose, 4 if quick else study.count
    size = study.image_size
    parts = {p: prepared(place, cell.seed, p, count, lambda label: label != NORMAL, size) for p in (choose, "test")}
    scheduler = description.build_scheduler("ddim")
    makers: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]]

    def of_rule(options: Mapping[str, Any]) -> Callable[[Tensor, Tensor], dict[str, Any]]:
        used = {**options, "timestep": timestep}
        return lambda x, _: {**change_maps(network, scheduler, x, used), "timestep": timestep}

    test = parts["test"]
    with torch.no_grad():
        asked = network(test.images).argmax(1) != NORMAL
    if cell.method == "maps":
        layer = best_layer(network, parts[choose])
        timestep = best_timestep(network, scheduler, parts[choose], study.timesteps)
        usual = max(PATCHES[0], test.images.shape[-1] // 8)
        makers = {
            **{name: of_rule(rule) for name, rule in RULES.items()},
            "Grad-CAM": lambda x, c: {"maps": cam_maps(network, x, c, layer), "layer": layer},
            DEEPEST: lambda x, c: {"maps": cam_maps(network, x, c, "middle_block")},
            "occlusion": lambda x, c: {"maps": occlusion_maps(network, x, c, usual)},
            "no model": lambda x, _: {"maps": no_model(cell.data, x, cell.seed)},
        }
    else:
        patch = best_patch(network, parts[choose])
        makers = {TUNED: lambda x, c: {"maps": occlusion_maps(network, x, c, patch), "patch": patch}}
    values: dict[str, Any] = {}
    for name, make in makers.items():
        found = {part: make(cases.images, cases.labels) for part, cases in parts.items()}
        maps = {part: result.pop("maps").float() for part, result in found.items()}
        reports = {}
        for way, change in (("as it is", lambda m: m), (RELATIVE, relative)):
            threshold = best_threshold(change(maps[choose]), parts[choose].masks)
            reports[way] = localization_report(change(maps["test"]), test.masks, threshold).as_dict()
        if bool(asked.any()):  # by the threshold of the relative maps
            of_asked = localization_report(relative(maps["test"])[asked], test.masks[asked], threshold)
            reports[ASKED] = of_asked.as_dict()
        values[name] = {**reports.pop("as it is"), **reports, **found["test"]}
    metrics = json.loads((folder / "output" / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    for name in values.keys() & RULES.keys():
        values[name]["test AUC"] = metrics["auc"]["value"]
    return values


def stores_in(root: Path) -> dict[str, CellStore]:
    """Where the cells of each data set are kept, with what decides them."""
    common = {"inferer": INFERER, "relative": f"{SMOOTHING} x {SMOOTHING}, root mean square", "asked": ASKED}

    def settings(study: Study) -> dict[str, Any]:
        brought = {} if study.image_size is None else {"image_size": study.image_size}
        several = {"timesteps": study.timesteps} if len(study.timesteps) > 1 else {}
        return {**common, "options": study.options, "choose": study.choose, **brought, **several}

    return {data: CellStore("localization", settings(study), root) for data, study in STUDIES.items()}


def targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """What was asked of the first rule: on phantoms by bounds, elsewhere against the controls.

    Args:
        rows: of the table, one for each data set and method that was run.
    """
    of = {(row["data"], row["method"]): row for row in rows}
    first, region = RULES
    found = []
    for figure, name, bound, larger in (
        ("pointing", "counterfactuals whose largest change lies in the finding", POINTING, True),
        ("iou", "IoU of change and finding", IOU, True),
        ("ratio", "change outside of the finding over that inside", RATIO, False),
    ):
        words = (f"{name}, phantoms", f"at least {bound}" if larger else f"below {bound}")
        ours = of.get(("phantoms", first))
        if ours is None:
            found.append(Target(*words, "", None))
            continue
        figure = f"{figure}, {RELATIVE}" if figure in OF_RELATIVE else figure
        value = ours[figure]["mean"]
        met = value >= bound - 1e-9 if larger else value < bound
        beside = f"{region} {format_value(of['phantoms', region][figure], 3)}"
        found.append(Target(*words, format_value(ours[figure], 3), met, f"{of_all(ours)}; {beside}"))
    return [*found, *(above_controls(of, data) for data in STUDIES if data not in PHANTOMS)]


def above_controls(of: Mapping[tuple[str, str], Mapping[str, Any]], data: str) -> Target:
    """Whether AUPRC and IoU of the change exceed those of every control."""
    words = (f"AUPRC and IoU of the change, {data}", f"above those of {' and '.join(CONTROLS)}")
    ours = of.get((data, next(iter(RULES))))
    if ours is None:
        return Target(*words, "", None)
    names = {name: f"{name}, {RELATIVE}" for name in ("auprc", "iou")}
    controls = [of[data, control] for control in CONTROLS if (data, control) in of]
    best = {  # the better of both ways
        name: max((row[key] for row in controls for key in (name, names[name])), key=_mean) for name in names
    }
    means = [f"{format_value(ours[key], 3)} against {format_value(best[name], 3)}" for name, key in names.items()]
    beside = [
        f"{name}: " + ", ".join(f"{of[data, name][key]['mean']:.3f}" for key in names.values())
        for name in ("no model", DEEPEST)
        if (data, name) in of
    ]
    met = all(_mean(ours[key]) > _mean(best[name]) for name, key in names.items())
    return Target(*words, ", ".join(means), met, "; ".join([f"by the means, {of_all(ours)}", *beside]))


def _mean(interval: Mapping[str, Any]) -> float:
    return float(interval["mean"])


def of_all(row: Mapping[str, Any]) -> str:
    """How many of the runs of a data set, in words."""
    return f"{row['runs']} of {len(STUDIES[row['data']].numbers)} {'patients' if row['data'] == BRAIN else 'seeds'}"


def tables(stores: Mapping[str, CellStore]) -> None:
    """Write the table from the cells there are."""
    rows, missing, patches = [], [], []
    for data, store in stores.items():
        numbers = STUDIES[data].numbers
        cells = {number: store.get(Cell(data, "maps", number)) for number in numbers}
        tuned = {number: store.get(Cell(data, "occlusion", number)) for number in numbers}
        if all(tuned.values()):
            patches.append(f"{data}: {', '.join(str(values[TUNED]['patch']) for values in tuned.values() if values)}")
            cells = {number: values and {**values, **(tuned[number] or {})} for number, values in cells.items()}
        found = [values for values in cells.values() if values]
        left = [str(number) for number, values in cells.items() if not values]
        missing += [f"{data} ({'patient' if data == BRAIN else 'seed'} {', '.join(left)})"] if left else []
        for name in found[0] if found else ():
            figures = {f: mean_interval([_value(values[name][f]) for values in found]) for f in FIGURES}
            extra = {
                key: mean_interval(known)
                for key in ("test AUC", "already", "reached", "calls")
                if (known := [v[name][key] for v in found if v[name].get(key) is not None])
            }
            again = {
                f"{f}, {way}": mean_interval([_value(values[name][way][f]) for values in found if way in values[name]])
                for way, those in ((RELATIVE, OF_RELATIVE), (ASKED, OF_ASKED))
                for f in those
                if any(way in values[name] for values in found)
            }
            rows.append({"data": data, "runs": len(found), "method": name, **figures, **again, **extra})
    notes = [
        "Runs are seeds; of the brain slices, patients left out one after the other. Mean with 95 % t-interval. iou "
        "and dice at the threshold chosen on other images (for brain slices on the training patients); iou_best at "
        "the threshold that is best on the test images: a ceiling. Relative: of maps averaged over 5 x 5 pixels and "
        "divided by the root mean square of each, chosen on validation phantoms of another network before any cell was "
        "measured with it. The verdicts are by these, of the controls by their better way.",
        "already: share of the images that the network calls normal; these have no counterfactual, and the change is "
        "empty where it is sure enough. They count in all figures but those of images called abnormal (at the same "
        f"threshold) and reached. {each_of(stores[BRAIN])}",
        f"Not run: {'; '.join(missing)}." if missing else "All cells were run.",
        "Grad-CAM: of all levels and the middle the layer whose maps lie best in the masks of the images that choose "
        "the threshold, which nobody without masks knows; the deepest layer is what is usual. T' of the "
        "counterfactuals of real data is chosen so, too, of 200, 300 and 500; of phantoms it is 500. Occlusion covers "
        f"MONAI's Gaussian patches of {PATCHES[0]} pixels (phantoms: 8); `{TUNED}`, on real data, those of "
        f"{', '.join(map(str, PATCHES))} pixels that lie best in the masks, chosen like Grad-CAM's layer "
        f"({'; '.join(patches) or 'not run'}). One thread. "
        "Networks by the defaults of the bundle, but trained for 10 epochs (phantoms; the 3 of the default were "
        "measured first, and left the change of seed 1 scattered on validation images, too) or 40 (real data, images "
        "and masks brought to 32 x 32; of 40 and 80 chosen by the validation slices of one patient). 15 epochs at "
        "64 x 64 came first, and their cells were not kept; an earlier table held one such network by mistake as that "
        "of patient 1.",
        "All cells were measured a second time, with the networks of the first time but for that of patient 1 and "
        "those of phantoms_3_epochs: regions had been kept off the border, and images that are called normal had not "
        "been counted.",
        "Counterfactuals: "
        + ", ".join(f"{key} {value}" for key, value in INFERER.items())
        + ". At most "
        + ", ".join(f"{study.count} images of a part ({data})" for data, study in STUDIES.items())
        + ".",
    ]
    if rows:
        measured = next(iter(stores.values())).records()[0]["environment"]  # not that of a later rendering
        title, asked = "Where the change lies", targets(rows)
        write_result("localization", title, rows, targets=asked, notes=notes, environment=measured)


def each_of(store: CellStore) -> str:
    """What became of each brain patient, in words."""
    first = next(iter(RULES))
    told = []
    for number in STUDIES[BRAIN].numbers:
        if values := store.get(Cell(BRAIN, "maps", number)):
            ours = values[first]
            auprc = {name: _value(values[name][RELATIVE]["auprc"]) for name in (first, "Grad-CAM")}
            told.append(
                f"{number}: {ours['test AUC']:.2f}, {ours['already']:.2f}, {auprc[first]:.2f} and "
                f"{auprc['Grad-CAM']:.2f}"
            )
    figures = "test AUC, already, AUPRC (relative) of the change and of Grad-CAM"
    return f"Brain patients, each with {figures}: {'; '.join(told)}."


def _value(figure: Any) -> float:
    return float(figure["value"]) if isinstance(figure, Mapping) else float(figure)


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, tiny trainings: proves the script")
    parser.add_argument("--cells", nargs="*", help="data:number of the cells to measure; `none` only writes the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "localization", help="folder for networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    grid = [
        Cell(data, kind, number)
        for data, study in STUDIES.items()
        for number in study.numbers
        for kind in (KINDS[:1] if data in PHANTOMS else KINDS)
    ]
    if options.quick and options.cells is None:
        grid = [grid[0], grid[-1]]
    if options.cells is not None:
        grid = [cell for cell in grid if f"{cell.data}:{cell.seed}" in options.cells]
    work = options.work / "quick" if options.quick else options.work
    stores = stores_in(work if options.quick else RESULTS / "cells")
    for cell in grid:
        stores[cell.data].run_missing([cell], lambda c: measure(c, work, options.quick))
    if not options.quick:
        tables(stores)


if __name__ == "__main__":
    main()
