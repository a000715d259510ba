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

    JOINTDIFF_DATA=... python -m benchmarks.sampler_steps [--quick] [--work DIR]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks.common import ROOT, Cell, CellStore, write_result
from benchmarks.joint_vs_single import DATA, Judge, load, sample
from monai_jointdiff.metrics import frechet_distance

CASES = {"20 steps": (20, 0), "20 steps, other noise": (20, 1), "100 steps": (100, 0)}  # steps, seed of the noise


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
    judge = Judge(DATA, options.work, count)
    network, description = load(options.work / f"{DATA}_joint_{options.seed}")
    training = {name: space.extract(judge.images["train"].numpy()) for name, space in judge.spaces.items()}

    def measure(cell: Cell) -> dict[str, float]:
        steps, noise = CASES[cell.method.replace("_", " ").replace("-", ", ")]
        samples = sample(network, description, count, steps, noise)
        return {name: frechet_distance(space.extract(samples), training[name]) for name, space in judge.spaces.items()}

    root = {"root": options.work / "quick"} if options.quick else {}
    store = CellStore("sampler_steps", {"samples": count}, **root)
    cells = {name: Cell(DATA, name.replace(", ", "-").replace(" ", "_"), options.seed) for name in CASES}
    found = store.run_missing(cells.values(), measure)
    if options.quick:
        return
    rows = []
    for name in judge.spaces:
        values = {case: found[cell][name] for case, cell in cells.items()}
        relative = abs(values["20 steps"] / values["100 steps"] - 1)
        between = abs(values["20 steps"] / values["20 steps, other noise"] - 1)
        within = "yes" if relative <= max(0.10, between) else "NO"
        verdict = {"20 against 100": relative, "between noises": between, "within": within}
        rows.append({"features": name, **values, **verdict})
    notes = "Frechet distance of 2,000 samples to the training images; target: within 10 %, or within that of noises."
    write_result("sampler_steps", "DPM-Solver++, 20 steps against 100", rows, notes=notes)


if __name__ == "__main__":
    main()
