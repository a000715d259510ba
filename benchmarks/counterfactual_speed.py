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

"""What a counterfactual costs, against the usual recipe: two networks, 200 steps out and 200 guided steps back, one
image at a time.

    JOINTDIFF_DATA=... python -m benchmarks.counterfactual_speed [--quick] [--work DIR]

In one run, with networks of the same size: the recipe; the same calls in one batch (batching alone); and ours, eight
steps with the strength found for each image. All are scored by the oracle of `benchmarks.counterfactual`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, write_result
from benchmarks.counterfactual import MAIN, METHODS, ORACLE_EPOCHS, Court, get_network, probabilities
from benchmarks.joint_vs_single import EPOCHS
from monai_jointdiff.inferers import CounterfactualInferer
from monai_jointdiff.metrics import l1_distance

IMAGES = 5  # of each class
RECIPE: dict[str, Any] = {
    "timestep": 600,
    "num_inference_steps": 200,
    "inversion_iterations": 1,
    "probability": None,
    "scale": 3.0,
}


def measure(
    name: str, network: Any, scheduler: Any, options: dict[str, Any], batch: int, court: Court
) -> dict[str, Any]:
    """Counterfactuals of the images in batches of a size: what they cost and whether they flip."""
    images, labels = court.trial(network)
    inferer = CounterfactualInferer(scheduler, **options)
    started = time.perf_counter()
    results = [
        inferer(some, network, target=1 - label)
        for some, label in zip(images.split(batch), labels.split(batch), strict=True)
    ]
    seconds = time.perf_counter() - started
    changed = torch.cat([result.counterfactual for result in results]).clamp(-1, 1)
    flips = {who: probabilities(judge, changed).argmax(1) != labels for who, judge in judges(network, court).items()}
    return {
        "method": name,
        "batch": batch,
        "steps": options["num_inference_steps"],
        "calls per image": sum(result.network_calls * len(result.image) for result in results) / len(images),
        "seconds per image": seconds / len(images),
        **{f"flips, {who}": float(flipped.double().mean()) for who, flipped in flips.items()},
        "median L1": float(torch.as_tensor(l1_distance(changed, images)).median()),
    }


def judges(network: Any, court: Court) -> dict[str, Any]:
    """Who says whether an image has flipped."""
    return {"model": network, "oracle": court.oracle}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one image of each class, few steps; writes nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    count = 1 if options.quick else IMAGES
    recipe = {**RECIPE, "num_inference_steps": 10} if options.quick else RECIPE
    court = Court(options.work / "counterfactual", count, ORACLE_EPOCHS)
    folder = options.work / "joint_vs_single"
    two, description = get_network("two_networks", 0, folder, EPOCHS)
    joint, _ = get_network(MAIN, 0, folder, EPOCHS)
    scheduler = description.build_scheduler("ddim")
    rows = [
        measure("recipe: two networks, one at a time", two, scheduler, recipe, 1, court),
        measure("the same calls in one batch", two, scheduler, recipe, 2 * count, court),
        measure("ours, strength found for each image", joint, scheduler, METHODS[MAIN], 2 * count, court),
    ]
    for row in rows:
        row["times faster"] = rows[0]["seconds per image"] / row["seconds per image"]
    if options.quick:
        print(rows)
        return
    notes = [
        f"{2 * count} test images of PneumoniaMNIST, seed 0. Guided steps call the network and its encoder, and go "
        "backward through both.",
        "Seconds were taken beside another benchmark on the second core. "
        "Targets: batching alone about 5 times; at equal oracle validity at least 20 times.",
    ]
    write_result("counterfactual_speed", "What a counterfactual costs", rows, notes=notes)


if __name__ == "__main__":
    main()
