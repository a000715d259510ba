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

"""Two gloo processes on the CPU equal one process with the double batch."""

from __future__ import annotations

import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Engine
from parameterized import parameterized

from monai_jointdiff.handlers import BestModel, TimeLimit
from monai_jointdiff.handlers.utils import all_processes_agree, is_writing_process, unwrap_network
from tests.engines.small_run import distributed_run, small_network, use_one_thread

WORLD_SIZE = 2
# draws 0, 1 | 2, 3 of an iteration go to ranks 0 | 1: unequal labels first, then none on rank 1, on both, on rank 0
LABELS = [0, 2, -1, 1, 1, 2, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1]
ITERATIONS = len(LABELS) // 4
CASES = [("float64", torch.float64, ITERATIONS), ("float32", torch.float32, 1)]


def setUpModule() -> None:
    use_one_thread()


def process(rank: int, folder: str) -> None:
    """What each of the processes does; they meet at a file, so no port has to be free."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD_SIZE)
    result: dict[str, object] = {"is_writing_process": is_writing_process()}
    for name, dtype, iterations in CASES:
        step = distributed_run(rank, WORLD_SIZE, dtype, LABELS, iterations, Path(folder) / f"{name}_rank{rank}")
        result[name] = {"gradients": step.gradients, "weights": step.weights, "labels": step.labels}
    result["agreed"] = [all_processes_agree(rank == leader, torch.device("cpu")) for leader in range(WORLD_SIZE)]
    result["stopped_at"] = stopped_at(rank)
    best = BestModel(small_network(), Path(folder) / f"best_rank{rank}", "val")
    best.load_state_dict({"value": 1.0, "epoch": 1, "iteration": 1, "weights": {"w": torch.ones(1)}})
    result["wrapped"] = list(unwrap_network(torch.nn.parallel.DistributedDataParallel(small_network())).state_dict())
    torch.save(result, f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


def stopped_at(rank: int) -> int:
    """The iteration at which a time limit ends the run: only the clock of rank 0 runs, a minute per iteration."""
    clock = [time.monotonic()]

    def step(engine: Engine, batch: int) -> None:
        clock[0] += 60 * (rank == 0)

    engine = Engine(step)
    engine.state.device = torch.device("cpu")  # type: ignore[attr-defined]
    TimeLimit(1.5).attach(engine)
    with mock.patch("monai_jointdiff.handlers.stopping.time.monotonic", lambda: clock[0]):
        engine.run(range(5), max_epochs=1)
    return engine.state.iteration


class TestTwoProcesses(unittest.TestCase):
    folder: Path
    results: list[dict]

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        # a parameter without gradient would end this with DistributedDataParallel's error about unused parameters
        mp.spawn(process, args=(folder.name,), nprocs=WORLD_SIZE)
        cls.results = [torch.load(cls.folder / f"result{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]

    def test_labels_are_shared_unequally(self):
        counts = [[sum(label >= 0 for label in batch) for batch in r["float64"]["labels"]] for r in self.results]
        self.assertEqual(counts, [[2, 2, 0, 0], [1, 0, 0, 1]])

    @parameterized.expand(CASES)
    def test_equals_one_process_with_the_double_batch(self, name, dtype, iterations):
        alone = distributed_run(0, 1, dtype, LABELS, iterations, self.folder / f"{name}_alone")
        for result in self.results:
            got = result[name]
            self.assertEqual(set(got["gradients"]), set(alone.gradients))
            for key, gradient in alone.gradients.items():
                torch.testing.assert_close(got["gradients"][key], gradient, rtol=0, atol=1e-5, msg=key)
            if dtype == torch.float64:
                for key, weight in alone.weights.items():
                    torch.testing.assert_close(got["weights"][key], weight, rtol=0, atol=1e-5, msg=key)
        largest = max(float(gradient.abs().max()) for gradient in alone.gradients.values())
        self.assertGreater(largest, 1e-2)  # the tolerance says something

    def test_every_parameter_has_a_gradient(self):
        names = {name for name, _ in small_network().named_parameters()}
        for result in self.results:
            self.assertEqual(set(result["float64"]["gradients"]), names)

    def test_only_rank_0_writes(self):
        self.assertEqual([result["is_writing_process"] for result in self.results], [True, False])
        for name, _, iterations in CASES:
            written = sorted(p.name for p in (self.folder / f"{name}_rank0" / "checkpoints2").iterdir())
            self.assertEqual(len(written), min(iterations, 2))
            self.assertFalse((self.folder / f"{name}_rank1").exists())
        self.assertTrue((self.folder / "best_rank0" / "model.pt").exists())
        self.assertFalse((self.folder / "best_rank1").exists())

    def test_files_have_no_prefix(self):
        names = list(small_network().state_dict())
        file = max((self.folder / "float64_rank0" / "checkpoints2").iterdir())
        content = torch.load(file, weights_only=True)
        for keys in (content["network"], content["ema"], self.results[0]["wrapped"]):
            self.assertEqual(list(keys), names)

    def test_processes_agree(self):
        for result in self.results:
            self.assertEqual(result["agreed"], [True, False])  # rank 0's opinion counts
            self.assertEqual(result["stopped_at"], 2)


if __name__ == "__main__":
    unittest.main()
