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

"""How exactly the inversion finds its way back on trained networks, and what that costs.

Images are encoded up to T' and decoded without guidance, as for the factual reconstruction of a counterfactual, before
anything is cut to the range of images. One iteration is the usual, "naive" inversion of DDIM.

    JOINTDIFF_DATA=... python -m benchmarks.inversion [--quick] [--work DIR]

Uses the joint networks that `benchmarks.joint_vs_single` trained, and trains those that are missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import counterfactual
from benchmarks.common import RESULTS, ROOT, Cell, CellStore, mean_interval, write_result
from benchmarks.counterfactual import DATA, MAIN, NAME, SEEDS
from monai_jointdiff.inferers import CounterfactualInferer

STEPS = 20
TIMESTEPS = (300, 500)
ITERATIONS = (1, 2, 5, 10)
IMAGES = 30  # the first of the test part


def round_trip(images: Tensor, network: nn.Module, inferer: CounterfactualInferer) -> tuple[Tensor, int]:
    """What becomes of images on the way up and back.

    Args:
        images: (N, C, *spatial) in [-1, 1].
        network: called as (x_t, t), the prediction of the inferer's scheduler.
        inferer: its grid and its inversion are taken.

    Returns:
        decoded images, not cut, and the calls of the network.
    """
    scheduler = inferer.scheduler
    with torch.no_grad():
        inversion = inferer.inverter(images, network)
        sample = inversion.latents
        for t in scheduler.timesteps.tolist():
            sample, _ = scheduler.step(network(sample, torch.full((len(sample),), t)), t, sample)
    return sample, inversion.network_calls + len(scheduler.timesteps)


def measure(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One network: errors of the round trip by timestep and iterations."""
    network, description = counterfactual.get_network(MAIN, seed, work, quick)
    images = counterfactual.read(DATA)["test"][0][: 4 if quick else IMAGES]
    rows = []
    for timestep in TIMESTEPS:
        for iterations in ITERATIONS:
            inferer = CounterfactualInferer(
                description.build_scheduler("ddim"),
                timestep=timestep,
                num_inference_steps=STEPS,
                inversion_iterations=iterations,
            )
            decoded, calls = round_trip(images, network, inferer)
            errors = (decoded - images).square().flatten(1).mean(1).sqrt()
            found = {"rmse": float(errors.square().mean().sqrt()), "worst image": float(errors.max())}
            rows.append({"timestep": timestep, "iterations": iterations, "calls": calls, **found})
    return {"rows": rows}


def tables(cells: Sequence[Mapping[str, Any]], environment: Mapping[str, Any] | None) -> None:
    """Write the result file.

    Args:
        cells: of `measure`, one per seed.
        environment: of the measurement.
    """
    rows = []
    for same in zip(*(cell["rows"] for cell in cells), strict=True):
        first = same[0]
        rows.append(
            {
                "T'": first["timestep"],
                "iterations": first["iterations"],
                "calls": mean_interval([one["calls"] for one in same]),
                "RMSE": mean_interval([one["rmse"] for one in same]),
                "RMSE, worst image of all seeds": max(one["worst image"] for one in same),
            }
        )
    notes = (
        f"{IMAGES} test images of {NAME} in [-1, 1], joint networks of {len(cells)} of {len(SEEDS)} seeds, {STEPS} "
        "steps up and back. Calls: of the whole network, those of both ways. An iteration is a call a step at most: "
        "images that have reached the tolerance wait for the others. RMSE is over pixels and images, before values are "
        "cut; 95 % t-interval over seeds. One iteration is the naive inversion."
    )
    write_result("inversion", "Round trip of the inversion", rows, notes=notes, environment=environment)


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four images, a tiny training; writes nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.quick:
        print(measure(0, options.work, quick=True))
        return
    settings = {"images": IMAGES, "steps": STEPS, "timesteps": list(TIMESTEPS), "iterations": list(ITERATIONS)}
    store = CellStore("inversion", settings, RESULTS / "cells")
    cells = [Cell(DATA, "joint", seed) for seed in SEEDS]
    store.run_missing(cells, lambda cell: measure(cell.seed, options.work, quick=False))
    found = [values for cell in cells if (values := store.get(cell)) is not None]
    tables(found, store.records()[0]["environment"])


if __name__ == "__main__":
    main()
