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

"""20 steps of DPM-Solver++ against 100, from the same 2,000 starting noises.

Uses the joint networks that `benchmarks.joint_vs_single` trained and kept. The distance is taken to the training
images. The yardstick beside 10 % is the difference between two sets of starting noises at 20 steps.

    JOINTDIFF_DATA=... python -m benchmarks.sampler_steps [--quick] [--seed N] [--work DIR]

A rerun measures only the missing cells.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, Cell, CellStore, Target, write_result
from benchmarks.joint_vs_single import DATA, Judge, load, sample
from monai_jointdiff.metrics import frechet_distance

CASES = {"20 steps": (20, 0), "20 steps, other noise": (20, 1), "100 steps": (100, 0)}  # steps, seed of the noise
WITHIN = 0.10  # target: the relative difference to 100 steps


def compare(found: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row for each feature space.

    Args:
        found: distances by feature space, for each of `CASES`.
    """
    rows = []
    for name in next(iter(found.values())):
        values = {case: distances[name] for case, distances in found.items()}
        relative = abs(values["20 steps"] / values["100 steps"] - 1)
        between = abs(values["20 steps"] / values["20 steps, other noise"] - 1)
        within = "yes" if relative <= max(WITHIN, between) else "NO"
        rows.append(
            {"features": name, **values, "20 against 100": relative, "between noises": between, "within": within}
        )
    return rows


def targets(rows: list[dict[str, Any]], seed: int) -> list[Target]:
    """What was asked, in each feature space.

    Args:
        rows: of :func:`compare`.
        seed: of the network.
    """
    return [
        Target(
            f"Frechet distance with 20 steps against 100, {row['features']}",
            f"differs by at most {100 * WITHIN:.0f} %, or by no more than between two sets of noises",
            f"{100 * row['20 against 100']:.1f} %, between noises {100 * row['between noises']:.1f} %",
            row["within"] == "yes",
            f"one network, seed {seed}",
        )
        for row in rows
    ]


def tables(store: CellStore, cells: Mapping[str, Cell]) -> None:
    """Write the result file.

    Args:
        store: where the cells are.
        cells: one for each of `CASES`.
    """
    rows = compare({case: store.get(cell) or {} for case, cell in cells.items()})
    first = next(iter(cells.values()))
    write_result(
        "sampler_steps",
        "DPM-Solver++, 20 steps against 100",
        rows,
        targets=targets(rows, first.seed),
        notes="Frechet distance of 2,000 samples to the training images.",
        environment=store.environment(first),
    )


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 samples: proves the script, writes nothing")
    parser.add_argument("--seed", type=int, default=0, help="which of the joint networks")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "joint_vs_single", help="folder of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    count = 32 if options.quick else 2000

    @functools.cache
    def training() -> dict[str, tuple[Any, Any]]:
        """Each feature space with the features of the training images."""
        judge = Judge(DATA, options.work, count)
        images = judge.images["train"].numpy()
        return {name: (space, space.extract(images)) for name, space in judge.spaces.items()}

    def measure(cell: Cell) -> dict[str, float]:
        network, description = load(options.work / f"{DATA}_joint_{options.seed}")
        steps, noise = CASES[cell.method.replace("_", " ").replace("-", ", ")]
        samples = sample(network, description, count, steps, noise)
        return {name: frechet_distance(space.extract(samples), known) for name, (space, known) in training().items()}

    root = {"root": options.work / "quick"} if options.quick else {}
    store = CellStore("sampler_steps", {"samples": count}, **root)
    cells = {name: Cell(DATA, name.replace(", ", "-").replace(" ", "_"), options.seed) for name in CASES}
    store.run_missing(cells.values(), measure)
    if not options.quick:
        tables(store, cells)


if __name__ == "__main__":
    main()
