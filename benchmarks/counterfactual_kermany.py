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

"""The counterfactuals of `benchmarks.counterfactual` once more, on another chest x-ray set of 64 pixels.

    JOINTDIFF_DATA=... python -m benchmarks.counterfactual_kermany [--quick] [--cells METHOD:SEED ...]

Nothing was chosen on these data: the options are those of PneumoniaMNIST, the timestep of the class condition is the
one that is as noisy at this size. The joint network of seed 0 is that of `benchmarks.kermany`; the others are trained
where they are missing. The class-conditional networks are asked by both rules, since their training is longer and of
other noise levels than that of the joint ones. `--cells none` only writes the table.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import counterfactual, kermany
from benchmarks.common import RESULTS, ROOT, Cell, CellStore, ensure_trained, write_result
from benchmarks.counterfactual import CONDITION, CONTROLS, DIRECTIONS, HALF_DISTANCE, INTERVALS, MAIN, PGD, SEEDS
from benchmarks.joint_vs_single import load
from monai_jointdiff.engines import ModelDescription

DATA = kermany.DATA
IMAGES = 50  # of each class, asked for the other one
ORACLE_EPOCHS, ROBUST_EPOCHS = 12, 6
NOISY = 780  # of the shifted noise levels: alpha_bar .114 at 64 pixels, as 900 at 28, or 500 of the default ones
SAME_NETWORK = "searched_20_steps_conditional"  # MAIN on the network of CONDITION: what the rule alone does
METHODS: dict[str, dict[str, Any]] = {
    MAIN: counterfactual.METHODS[MAIN],
    CONDITION: {**counterfactual.METHODS[CONDITION], "timestep": NOISY},
    SAME_NETWORK: {**counterfactual.METHODS[MAIN], "timestep": NOISY},
}


def get_network(method: str, seed: int, work: Path, quick: bool = False) -> tuple[nn.Module, ModelDescription]:
    """The trained network of a method, trained where it is missing.

    Args:
        method: one of `METHODS`.
        seed: of the training.
        work: folder of the networks of all benchmarks.
        quick: a tiny training.
    """
    folder = work / "kermany" / ("quick" if quick else "")
    if method in (CONDITION, SAME_NETWORK):
        place = folder / f"conditional_{seed}"
        options: dict[str, Any] = {
            "dataset_dir": Path(os.environ["JOINTDIFF_DATA"]) / f"{DATA}.npz",
            "seed": seed,
            "epochs": kermany.EPOCHS,
            "num_samples": 0,
            "counterfactual_pictures": 0,
            "picture_interval": kermany.EPOCHS,
            **kermany.NETWORK,
        }
        tiny = {"epochs": 1, "train#epoch_length": 5} if quick else {}
        ensure_trained([*kermany.CONFIG, "chest_xray/train_conditional.json"], place, {**options, **tiny})
        return load(place)
    place = folder / f"seed_{seed}" if seed else folder
    ensure_trained(kermany.CONFIG, place, kermany.training_options(0.2 if quick else kermany.MINUTES, seed))
    return load(place)


def store_in(root: Path, count: int = IMAGES, epochs: Sequence[int] = (ORACLE_EPOCHS, ROBUST_EPOCHS)) -> CellStore:
    """Where the cells are kept, with what decides them.

    Args:
        root: folder that holds the benchmarks' folders.
        count: images of each class.
        epochs: of the two oracles.
    """
    settings = {"images": count, "epochs": kermany.EPOCHS, "oracle epochs": epochs}
    return CellStore("counterfactual_kermany", settings, root)


def tables(store: CellStore) -> None:
    """Write the result file from the cells there are."""
    of_method = {m: [v for n in SEEDS if (v := counterfactual.cell_of(store, m, n, DATA, METHODS))] for m in METHODS}
    about = store.get(Cell(DATA, "oracles", 0))
    if about is None or not any(of_method.values()):
        print("not measured yet: no table")
        return
    half_distance = next(row["value"] for row in about["rows"] if row["figure"] == HALF_DISTANCE)
    rows = [counterfactual.row(m, d, cells, worst=True) for m, cells in of_method.items() for d in DIRECTIONS if cells]
    aucs = {row["oracle"]: row["value"] for row in about["rows"] if row["figure"] == "test AUC"}
    asked = [
        *counterfactual.targets(of_method[MAIN], half_distance, data=DATA),
        *counterfactual.targets(of_method[CONDITION], half_distance, " (led by the class condition)", DATA),
        *counterfactual.oracle_targets(about["rows"], f" ({DATA})"),
    ]
    notes = [
        f"Seeds measured: {', '.join(f'{m} {len(cells)} of {len(SEEDS)}' for m, cells in of_method.items())}; {IMAGES} "
        "test images a direction and seed that model and oracles classify rightly. Nothing was chosen on these data: "
        "options, judges and controls are those of PneumoniaMNIST, which was made of the same source; the robust "
        f"oracle had {ROBUST_EPOCHS} epochs for want of time ({counterfactual.ROBUST_EPOCHS} there). {INTERVALS}",
        f"Test AUC of the judges: {', '.join(f'{name} {auc:.3f}' for name, auc in aucs.items())}. On how many of the "
        f"images that they classify rightly a change of {half_distance:.3f}, {HALF_DISTANCE}, flips them (normal, "
        f"pneumonia): {_flipped(about['rows'], half_distance)}.",
        f"{CONTROLS} {PGD}",
        f"Whether other settings of `{MAIN}` would do was looked at by hand afterwards, on 12 validation images of "
        "each class: T' = 700 moved pneumonia by 0.14 for 9 of 12 flips of the oracle, p .999 by 0.26 for 10: never "
        "both.",
        f"The networks of `{MAIN}` are trained for {kermany.MINUTES:g} minutes at most, as in the benchmark `kermany`, "
        f"which ended each of the three in epoch 6 of {kermany.EPOCHS}; those of `{CONDITION}` for all "
        f"{kermany.EPOCHS} epochs with the overlay train_conditional.json, whose noise levels are shifted: T' = "
        f"{NOISY} is as noisy as 900 at 28 pixels. `{SAME_NETWORK}` is the rule and the probability of `{MAIN}` on "
        f"these networks: against `{CONDITION}` it tells what the rule does, against `{MAIN}` what the training does.",
    ]
    environment = store.records()[0]["environment"]  # not that of a later rendering
    title = f"Counterfactuals on {DATA}"
    write_result("counterfactual_kermany", title, rows, targets=asked, notes=notes, environment=environment)


def _flipped(rows: Sequence[Mapping[str, Any]], half_distance: float) -> str:
    """What changes that mean nothing do to the judges, in words."""
    end = f" at L1 {half_distance:.3f}"
    return "; ".join(
        f"{row['oracle']}, {row['figure'].removeprefix('flipped by ').removesuffix(end)} "
        f"{row['normal']['mean']:.2f}, {row['pneumonia']['mean']:.2f}"
        for row in rows
        if row["figure"].endswith(end)
    )


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, tiny trainings: proves the script")
    parser.add_argument("--cells", nargs="*", help="method:seed ..., or oracles:0; `none` only writes the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder for networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    count, epochs, robust_epochs = (4, 1, 1) if options.quick else (IMAGES, ORACLE_EPOCHS, ROBUST_EPOCHS)
    grid = [("oracles", 0)] + [(name, seed) for seed in (SEEDS[:1] if options.quick else SEEDS) for name in METHODS]
    if options.cells is not None:
        grid = [(name, seed) for name, seed in grid if f"{name}:{seed}" in options.cells]
    folder = options.work / "counterfactual" / ("quick" if options.quick else "")
    store = store_in(folder if options.quick else RESULTS / "cells", count, (epochs, robust_epochs))
    if grid:
        court = counterfactual.Court(folder, count, epochs, robust_epochs, DATA)

        def measure(cell: Cell) -> dict[str, Any]:
            if cell.method == "oracles":
                return {"rows": court.about_oracles()}
            network, description = get_network(cell.method, cell.seed, options.work, options.quick)
            pictures = folder / f"pictures_{DATA}_{cell.method}_{cell.seed}.pt"
            explain = counterfactual.by_inferer(network, description, METHODS[cell.method])
            return counterfactual.examine(network, explain, METHODS[cell.method], court, pictures)

        store.run_missing([Cell(DATA, name, seed) for name, seed in grid], measure)
    if not options.quick:
        tables(store)


if __name__ == "__main__":
    main()
