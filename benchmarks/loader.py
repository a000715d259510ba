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

"""Whether the loader keeps up with the network: seconds of a training spent on batches and on steps.

The semi-supervised training of a bundle (joint + FixMatch: weak and strong views), as configured, in the smaller
network of the benchmarks, so that the network is fast. Without workers, both happen in one process in turn, which gives
the images per second of each; with one worker the loader runs beside the network, and what is left is waiting.

    JOINTDIFF_DATA=... python -m benchmarks.loader [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle import create_workflow

from benchmarks.common import ROOT, Cell, CellStore, Target, counted, write_result
from benchmarks.few_labels import NETWORK

DATA = {"pneumoniamnist_28": "chest_xray", "ham10000_28": "skin_lesion", "ham10000_64": "skin_lesion"}
BATCHES = 40
WARM_UP = 5  # batches not counted
BATCH = 32


class Stopwatch:
    """Seconds between two events of an engine, one number per iteration."""

    def __init__(self, engine: Engine, start: Any, end: Any) -> None:
        self.seconds: list[float] = []
        self._started = 0.0
        engine.add_event_handler(start, self._start)
        engine.add_event_handler(end, self._end)

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _end(self, engine: Engine) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def median(self) -> float:
        """Median without the warm-up."""
        return statistics.median(self.seconds[WARM_UP:])


def measure(data: str, workers: int, batches: int) -> dict[str, float]:
    """Train for some batches; medians of the seconds for a batch and for a step."""
    configs = ROOT / "bundles" / DATA[data] / "configs"
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "dataset_dir": str(Path(os.environ["JOINTDIFF_DATA"]) / f"{data}.npz"),
            "num_labels": 100,
            "batch_size": BATCH,
            "epochs": 1,
            "train#epoch_length": batches,
            "val_interval": 2,  # never
            "picture_interval": 2,
            "num_workers": workers,
            "preflight": False,
            "progress": False,
            "ckpt_dir": f"{folder}/models",
            "output_dir": f"{folder}/output",
            **NETWORK,
        }
        files = [str(configs / "train.json"), str(configs / "train_semi.json")]
        workflow = create_workflow(config_file=files, workflow_type="train", **options)
        trainer = workflow.parser.get_parsed_content("train#trainer")
        loading = Stopwatch(trainer, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED)
        step = Stopwatch(trainer, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
        trainer.run()
    return {"loading": loading.median(), "step": step.median()}


def compare(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A row for each data set.

    Args:
        found: seconds for a batch and for a step by data set, without and with one worker.
    """
    return [
        {
            "data": data,
            "loader, images/s": BATCH / alone["loading"],
            "network, images/s": BATCH / alone["step"],
            "loader over network": alone["step"] / alone["loading"],
            "waiting with one worker": beside["loading"] / (beside["loading"] + beside["step"]),
        }
        for data, (alone, beside) in found.items()
    ]


def target(rows: Sequence[Mapping[str, Any]], threads: int) -> Target:
    """Whether the loader is faster than the network, on every data set.

    Args:
        rows: of the table.
        threads: of the network.
    """
    slowest = min(rows, key=lambda row: row["loader over network"])
    times = slowest["loader over network"]
    return Target(
        "images/s of the loader over those of the network, joint + FixMatch",
        "above 1 on all data sets",
        f"{times:.1f} on {slowest['data']}, the least of {len(rows)}",
        times > 1,
        f"{counted(threads, 'thread')} for the network, none of them for the loader",
    )


def tables(store: CellStore) -> None:
    """Write the result file."""
    cells = {data: [Cell(data, f"workers{n}", 0) for n in (0, 1)] for data in DATA}
    rows = compare({data: [store.get(cell) or {} for cell in both] for data, both in cells.items()})
    environment = store.environment(next(iter(cells.values()))[0])
    notes = [
        f"Joint + FixMatch, weak and strong views, batch {BATCH}, network {list(NETWORK.values())[0]}, "
        f"{counted(environment['threads'], 'thread')} for the network, none of them for the loader; medians of "
        f"{BATCHES - WARM_UP} batches. The last column is the share of an iteration spent waiting for its batch."
    ]
    write_result(
        "loader",
        "The loader against the network",
        rows,
        targets=[target(rows, environment["threads"])],
        notes=notes,
        digits={"waiting with one worker": 4},
        environment=environment,
    )


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few batches of one data set: writes nothing")
    options = parser.parse_args()
    batches = WARM_UP + 3 if options.quick else BATCHES
    root = {"root": ROOT / "build" / "loader"} if options.quick else {}
    store = CellStore("loader", {"batches": batches, "batch_size": BATCH, **NETWORK}, **root)
    cells = [Cell(data, f"workers{n}", 0) for data in list(DATA)[: 1 if options.quick else None] for n in (0, 1)]
    store.run_missing(cells, lambda cell: measure(cell.data, int(cell.method[-1]), batches))
    if not options.quick:
        tables(store)


if __name__ == "__main__":
    main()
