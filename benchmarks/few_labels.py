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

"""Few labels: what denoising and FixMatch bring where most training images have none.

Each cell is one training by the bundle's own command (`label_efficiency.json` makes the same ones): the same small
network, number of optimizer steps, weak views and dropout for all methods. The weights of the last epoch are kept;
temperature and threshold are chosen on validation images no more than the labelled ones. The seed decides which images
keep their label and all else. `all` trains once with every label, as the reference, and keeps its best epoch.

    JOINTDIFF_DATA=... python -m benchmarks.few_labels [--quick] [--cells ham10000_28:86:fixmatch:0 ...] [--work DIR]

A rerun measures only the missing cells; several processes may share the work by --cells. Cells not run are left out
of the table and named below it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    ROOT,
    Cell,
    CellStore,
    Target,
    mean_interval,
    paired_difference,
    train_bundle,
    write_result,
)
from benchmarks.render import format_value
from monai_jointdiff.engines import LabelEfficiencyStudy
from monai_jointdiff.visualize import label_efficiency_figure, save_figure

METHODS = {
    "supervised": "labels alone",
    "fixmatch_alone": "FixMatch, no denoising",
    "joint": "denoising, no FixMatch",
    "fixmatch": "denoising + FixMatch",
}
SEEDS = (0, 1, 2)
FIGURES = {"auc": "macro AUC", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
ALL = "all"
Key = tuple[str, int | str, str, int]  # data, labels, method, seed


@dataclass(frozen=True)
class Study:
    """What a data set is trained with.

    Args:
        bundle: whose configurations.
        counts: numbers of labels.
        epochs: passes through as many images as the training part has.
    """

    bundle: str
    counts: tuple[int, ...]
    epochs: int


BY_AUC = {"best#metric_name": "val_auc", "best#larger_is_better": True}  # with all labels, on the whole validation part
KEEP = {"keep": "last"}  # with few
STUDIES = {
    "ham10000_28": Study("skin_lesion", (86, 418), epochs=8),  # 2 and 10 % of 4,184
    "pneumoniamnist_28": Study("chest_xray", (50,), epochs=6),
}
NETWORK = {"network_def#channels": [16, 32, 64], "network_def#num_head_channels": 16}
TARGETS = {"ham10000_28": 0.05, "pneumoniamnist_28": 0.97}  # points of balanced accuracy; share of the all-label AUC


def options_of(data: str, seed: int, epochs: int) -> dict[str, Any]:
    """Options that all trainings on a data set have in common."""
    dataset = Path(os.environ["JOINTDIFF_DATA"]) / f"{data}.npz"
    return {"dataset_dir": str(dataset), "epochs": epochs, "seed": seed, "preflight": False, **NETWORK}


def few(data: str, count: int, algorithm: str, seed: int, work: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train with `count` labels; the figures of the test part."""
    configs = ROOT / "bundles" / STUDIES[data].bundle / "configs"
    files = [configs / "train.json", configs / "train_semi.json"]
    study = LabelEfficiencyStudy(files, work / data, [count], [algorithm], [seed], True, {**options, **KEEP})
    row = study.run()[0].as_row()
    return {name: row[name] for name in ("labelled", "minutes", *FIGURES)}


def with_all(data: str, algorithm: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train with all labels and the whole validation part."""
    given = {
        **options,
        **BY_AUC,
        "num_samples": 0,
        "counterfactual_pictures": 0,
        "task": "classify" if algorithm == "supervised" else "joint",
    }
    minutes = train_bundle([f"{STUDIES[data].bundle}/train.json"], folder, given)
    metrics = json.loads((folder / "output" / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    f1 = [figures["f1"]["value"] for figures in metrics["per_class"].values()]
    figures = {"macro_f1": sum(f1) / len(f1), **{name: metrics[name]["value"] for name in ("auc", "balanced_accuracy")}}
    return {"labelled": ALL, "minutes": minutes, **figures}


def name_of(count: int | str, algorithm: str) -> str:
    """Name of a cell's method."""
    return f"{algorithm}_{count}"


def all_cells() -> list[Key]:
    """The grid: what decides first, seed by seed."""
    grid: list[Key] = []
    for number in range(max(len(study.counts) for study in STUDIES.values())):
        for seed in SEEDS:
            for data, study in STUDIES.items():
                for count in study.counts[number : number + 1]:
                    grid += [(data, count, algorithm, seed) for algorithm in METHODS]
    return grid + [(data, ALL, algorithm, 0) for data in STUDIES for algorithm in ("joint", "supervised")]


def parse(text: str) -> Key:
    """A cell from `data:labels:method:seed`."""
    data, count, algorithm, seed = text.split(":")
    return data, count if count == ALL else int(count), algorithm, int(seed)


def tabulate(found: Mapping[Key, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set, number of labels and method, with the paired difference to labels alone."""
    rows = []
    for data, study in STUDIES.items():
        counts: list[int | str] = [*study.counts, ALL]
        for count in counts:
            for algorithm, label in METHODS.items():
                of_seed = {seed: found[key] for seed in SEEDS if (key := (data, count, algorithm, seed)) in found}
                if not of_seed:
                    continue
                row: dict[str, Any] = {"data": data, "labels": count, "trained with": label, "seeds": len(of_seed)}
                row |= {title: mean_interval([v[name] for v in of_seed.values()]) for name, title in FIGURES.items()}
                control = {s: found[key] for s in of_seed if (key := (data, count, "supervised", s)) in found}
                if algorithm != "supervised" and len(control) == len(of_seed):
                    for name in ("auc", "balanced_accuracy"):
                        both = [{s: v[name] for s, v in one.items()} for one in (of_seed, control)]
                        row[f"{FIGURES[name]} against labels alone"] = paired_difference(both[0], both[1])
                row["minutes"] = sum(v["minutes"] for v in of_seed.values()) / len(of_seed)
                rows.append(row)
    return rows


def targets(rows: Sequence[Mapping[str, Any]], grid: Sequence[Key], found: Mapping[Key, Any]) -> list[Target]:
    """What was asked: the gain on few labels, the share of what all labels give, and the whole grid.

    Args:
        rows: of the table.
        grid: all cells.
        found: values of the cells that were run.
    """

    def row(data: str, labels: int | str, algorithm: str) -> Mapping[str, Any]:
        wanted = (data, labels, METHODS[algorithm])
        return next((r for r in rows if (r["data"], r["labels"], r["trained with"]) == wanted), {})

    return [
        gain_target(row("ham10000_28", 86, "fixmatch")),
        share_target(row("pneumoniamnist_28", 50, "fixmatch"), row("pneumoniamnist_28", ALL, "joint")),
        grid_target(grid, found),
    ]


def gain_target(row: Mapping[str, Any]) -> Target:
    """What denoising and FixMatch add to labels alone; the row is empty when they were not run."""
    figure = "balanced accuracy of denoising + FixMatch above that of labels alone, ham10000_28 with 86 labels"
    bound, gain = TARGETS["ham10000_28"], row.get("balanced accuracy against labels alone")
    if gain is None:
        return Target(figure, f"at least {bound:+.3f}", "", None)
    return Target(figure, f"at least {bound:+.3f}", format_value(gain, 3), gain["mean"] >= bound, of_all(row))


def share_target(row: Mapping[str, Any], reference: Mapping[str, Any]) -> Target:
    """What 50 labels give of what all labels give; the rows are empty when they were not run."""
    figure = "AUC of denoising + FixMatch over that with all labels, pneumoniamnist_28 with 50 labels"
    bound = TARGETS["pneumoniamnist_28"]
    if not row:
        return Target(figure, f"at least {100 * bound:.0f} %", "", None)
    full, which = (reference["macro AUC"]["mean"], "this network") if reference else main_table()
    share = row["macro AUC"]["mean"] / full
    about = f"of {full:.3f}, that of {which}; {of_all(row)}"
    return Target(figure, f"at least {100 * bound:.0f} %", f"{100 * share:.1f} %", share >= bound, about)


def grid_target(grid: Sequence[Key], found: Mapping[Key, Any]) -> Target:
    """Whether everything was run."""
    words = ("few labels: the whole grid of data, labels, methods and seeds", f"{len(grid)} trainings")
    left = [key for key in grid if key not in found]
    if not left:
        return Target(*words, f"{len(grid)} trainings", True)
    groups = ", ".join(dict.fromkeys(f"{data} with {count} labels" for data, count, _, _ in left))
    return Target(*words, "", None, f"{len(left)} of them are missing: of {groups}")


def of_all(row: Mapping[str, Any]) -> str:
    """How many of the seeds a row has, in words."""
    return f"{row['seeds']} of {len(SEEDS)} seeds"


def main_table() -> tuple[float, str]:
    """AUC with all labels in the main table of this data set, and whose it is."""
    rows = json.loads((RESULTS / "pneumonia.json").read_text(encoding="utf-8"))["rows"]
    return next(row["auc"]["mean"] for row in rows if row["method"] == "joint"), "the larger network of the main table"


def missing_cells(grid: Sequence[Key], found: Mapping[Key, Any]) -> list[str]:
    """What was not run, seeds together."""
    seeds: dict[str, list[int]] = {}
    for data, count, algorithm, seed in grid:
        if (data, count, algorithm, seed) not in found:
            seeds.setdefault(f"{data}, {count} labels, {METHODS[algorithm]}", []).append(seed)
    return [f"{name} (seed {', '.join(map(str, which))})" for name, which in seeds.items()]


def tables(found: Mapping[Key, Mapping[str, Any]], environment: Mapping[str, Any]) -> None:
    """Write the result file.

    Args:
        found: values of the cells that were run.
        environment: in which they were.
    """
    grid = all_cells()
    rows = tabulate(found)
    missing = missing_cells(grid, found)
    notes = [
        "Mean over seeds (which decide the labels, too) with 95 % t-interval; the difference is paired by seed. The "
        "weights of the last epoch, whatever the method (all labels: of the epoch with the best validation AUC); "
        "balanced accuracy and F1 of the most probable class, of two classes at the threshold chosen on validation "
        "images no more than the labelled ones. Minutes are those of a thread of a machine shared with other work.",
    ]
    notes += [f"Not run: {'; '.join(missing)}."] if missing else []
    title, asked = "Few labels: denoising and FixMatch", targets(rows, grid, found)
    write_result("few_labels", title, rows, targets=asked, notes=notes, environment=environment)


def draw(found: Mapping[Key, Mapping[str, Any]], data: str, file: Path) -> None:
    """The label efficiency plot of a data set."""
    metrics: dict[str, dict[str, dict[int, list[float]]]] = {}
    for (cell_data, count, algorithm, _), values in found.items():
        if cell_data == data and isinstance(count, int):
            for name, title in FIGURES.items():
                curve = metrics.setdefault(title, {}).setdefault(METHODS[algorithm], {})
                curve.setdefault(count, []).append(values[name])
    if metrics:
        save_figure(label_efficiency_figure(metrics), file)


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short training per kind: proves the script")
    parser.add_argument("--cells", nargs="*", help="data:labels:method:seed ...; `none` only writes the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "few_labels", help="folder for the trainings")
    parser.add_argument("--figure", type=Path, help="draw the label efficiency plot of ham10000_28 into this file")
    options = parser.parse_args()
    work = options.work / "quick" if options.quick else options.work
    settings = {data: {"epochs": study.epochs, **NETWORK, **KEEP} for data, study in STUDIES.items()}
    stores = {
        data: CellStore(
            "few_labels", {**setting, "quick": options.quick}, RESULTS / "cells" if not options.quick else work
        )
        for data, setting in settings.items()
    }
    grid = all_cells()
    wanted = grid if options.cells is None else [parse(text) for text in options.cells if text != "none"]
    if options.quick and options.cells is None:
        wanted = [(data, study.counts[0], "fixmatch", 0) for data, study in STUDIES.items()]
        wanted += [(data, ALL, "supervised", 0) for data in STUDIES]

    def measure(data: str, count: int | str, algorithm: str, seed: int) -> dict[str, Any]:
        epochs = 1 if options.quick else STUDIES[data].epochs
        given = options_of(data, seed, epochs) | ({"train#epoch_length": 10} if options.quick else {})
        if isinstance(count, int):
            return few(data, count, algorithm, seed, work, given)
        return with_all(data, algorithm, work / data / f"{algorithm}_all", given)

    found: dict[Key, Mapping[str, Any]] = {}
    for data, count, algorithm, seed in wanted:
        cell = Cell(data, name_of(count, algorithm), seed)
        stores[data].run_missing([cell], lambda _: measure(data, count, algorithm, seed))  # noqa: B023
    for data, count, algorithm, seed in grid:
        values = stores[data].get(Cell(data, name_of(count, algorithm), seed))
        if values is not None:
            found[data, count, algorithm, seed] = values
    if options.figure:
        draw(found, "ham10000_28", options.figure)
    if options.quick or not found:
        return
    measured = next(iter(stores.values())).records()[0]["environment"]  # not that of a later rendering
    tables(found, measured)


if __name__ == "__main__":
    main()
