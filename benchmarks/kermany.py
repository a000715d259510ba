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

"""The same bundle on kermany_cxr_64 by options alone, within 20 minutes, against a plain CNN of the same wall time.

JOINTDIFF_DATA=... python -m benchmarks.kermany [--quick] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, Cell, CellStore, Target, counted, train_bundle, write_result
from benchmarks.judges import train_cnn
from monai_jointdiff.data import open_source
from monai_jointdiff.metrics import macro_auc

DATA = "kermany_cxr_64"
CONFIG = ("chest_xray/train.json",)
MINUTES = 17.0  # of training; reading, validation and report come on top
AUC, PROGRAM_MINUTES = 0.99, 20  # targets: of the test part, and of the whole program
EPOCHS = 7  # what fits into the minutes on two cores without bf16: the learning rate should reach its end
NETWORK = {  # four levels instead of three: attention at 8 x 8 as for 32 pixels
    "network_def#channels": [16, 32, 64, 128],
    "network_def#num_res_blocks": [1, 1, 1, 1],
    "network_def#attention_levels": [False, False, False, True],
}
PROBE = 1  # epochs of the CNN from which the number that fits into the time is found


def training_options(minutes: float, seed: int = 0) -> dict[str, Any]:
    """Options of the bundle for the joint model."""
    return {
        "dataset_dir": Path(os.environ["JOINTDIFF_DATA"]) / f"{DATA}.npz",
        "seed": seed,
        "epochs": EPOCHS,
        "max_minutes": minutes,
        "num_samples": 100,
        **NETWORK,
    }


def joint(work: Path, minutes: float) -> dict[str, Any]:
    """Train the bundle; the figures of its table."""
    total = train_bundle(CONFIG, work, training_options(minutes))
    metrics = json.loads((work / "output" / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    return {"minutes": total, "auc": metrics["auc"]["value"], "accuracy": metrics["accuracy"]["value"]}


def cnn(minutes: float, seed: int) -> dict[str, Any]:
    """Train the plain CNN for about the same time."""
    source = open_source(Path(os.environ["JOINTDIFF_DATA"]) / f"{DATA}.npz")
    prepare = source.preprocessing()
    items = {part: [prepare(item) for item in source.part(part)] for part in ("train", "test")}
    images = {part: torch.stack([item["image"] for item in found]) for part, found in items.items()}
    labels = {part: torch.stack([item["label"] for item in found]) for part, found in items.items()}
    started = time.perf_counter()
    train_cnn(images["train"], labels["train"], source.num_classes, seed, PROBE)
    epochs = max(PROBE, round(PROBE * minutes * 60 / (time.perf_counter() - started)))
    started = time.perf_counter()
    network = train_cnn(images["train"], labels["train"], source.num_classes, seed, epochs)
    total = (time.perf_counter() - started) / 60
    with torch.no_grad():
        probabilities = torch.cat([network(batch) for batch in images["test"].split(256)]).softmax(1)
    accuracy = float((probabilities.argmax(1) == labels["test"]).double().mean())
    return {"minutes": total, "auc": macro_auc(probabilities, labels["test"]), "accuracy": accuracy}


def targets(values: Mapping[str, Mapping[str, Any]], threads: Mapping[str, int]) -> list[Target]:
    """What was asked of the joint model.

    Args:
        values: `minutes` and `auc` by method; a method may be missing.
        threads: by method.
    """
    ours, plain = values.get("joint"), values.get("cnn")
    if ours is None:
        return [Target(f"joint model on {DATA}", f"test AUC at least {AUC}", "", None)]
    minutes, auc, about = ours["minutes"], ours["auc"], f"one seed, {counted(threads['joint'], 'thread')}"
    program = (f"minutes of the whole program on {DATA}", f"at most {PROGRAM_MINUTES}", f"{minutes:.1f}")
    found = [
        Target(*program, minutes <= PROGRAM_MINUTES, about),
        Target(f"test AUC on {DATA}", f"at least {AUC}", f"{auc:.4f}", auc >= AUC, about),
    ]
    against = (f"test AUC on {DATA}, joint - CNN", "at least 0 in the same wall time")
    if plain is None:
        return [*found, Target(*against, "", None)]
    cnn = f"the CNN had {plain['minutes']:.1f} minutes on {counted(threads['cnn'], 'thread')}"
    return [*found, Target(*against, f"{auc - plain['auc']:+.4f}", auc >= plain["auc"], f"{about}; {cnn}")]


def tables(store: CellStore) -> None:
    """Write the result file from the cells there are."""
    cells = {method: Cell(DATA, method, 0) for method in ("joint", "cnn")}
    found = {method: values for method, cell in cells.items() if (values := store.get(cell)) is not None}
    if not found:
        print("not measured yet: no table")
        return
    environments = {method: store.environment(cells[method]) for method in found}
    threads = {method: environment["threads"] for method, environment in environments.items()}
    rows = [{"method": method, "threads": threads[method], **values} for method, values in found.items()]
    write_result(
        "kermany",
        f"{DATA} by options alone",
        rows,
        targets=targets(found, threads),
        notes="One seed.",
        digits={"auc": 4},
        environment=next(iter(environments.values())),
    )


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds of training: proves the script, writes nothing")
    parser.add_argument("--methods", nargs="*", default=["joint", "cnn"])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "kermany", help="folder for the run")
    options = parser.parse_args()
    minutes = 0.2 if options.quick else MINUTES
    root = {"root": options.work / "quick"} if options.quick else {}
    store = CellStore("kermany", {"minutes": minutes, "epochs": EPOCHS, "network": NETWORK}, **root)
    cells = [Cell(DATA, method, 0) for method in options.methods]
    run = {"joint": lambda: joint(options.work, minutes), "cnn": lambda: cnn(minutes, 0)}
    store.run_missing(cells, lambda cell: run[cell.method]())
    if not options.quick:
        tables(store)


if __name__ == "__main__":
    main()
