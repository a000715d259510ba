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

"""A stopped and resumed training ends bit for bit like the uninterrupted one (on the CPU, equal number of threads)."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ignite.engine import Engine, Events
from parameterized import parameterized

from monai_jointdiff.handlers import DeterministicDraws, TimeLimit
from tests.engines.small_run import EPOCH_LENGTH, EPOCHS, SmallRun, small_run, use_one_thread

TOTAL = EPOCHS * EPOCH_LENGTH


def setUpModule() -> None:
    use_one_thread()


class At:
    """A handler that does something once."""

    def __init__(self, event: Any, action: Any) -> None:
        self.event, self.action = event, action

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.event, self.action)


class Killed(Exception):
    """Stands for a process that ends without a chance to do anything."""


def kill(engine: Engine) -> None:
    raise Killed


def terminate(engine: Engine) -> None:
    engine.terminate()


def final_state(run: SmallRun) -> dict[str, Any]:
    state = run.trainer.state
    return {
        "iteration": state.iteration,
        "epoch": state.epoch,
        "network": run.network.state_dict(),
        "ema": run.ema.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "best": run.best.state_dict(),
    }


class TestResume(unittest.TestCase):
    folder: Path
    reference: SmallRun

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cls.reference = small_run(cls.folder / "reference")
        cls.reference.trainer.run()

    def assert_equal_end(self, run: SmallRun) -> None:
        self.assert_same(final_state(self.reference), final_state(run), "state")
        self.assertEqual(self.reference.best.path.read_bytes(), run.best.path.read_bytes())
        files = [one.checkpoint.path(TOTAL) for one in (self.reference, run)]
        expected, got = (torch.load(file, weights_only=True) for file in files)
        self.assert_same({**expected, "files": None}, {**got, "files": None}, "checkpoint")

    def assert_same(self, expected: Any, got: Any, where: str) -> None:
        self.assertIs(type(expected), type(got), where)
        if isinstance(expected, torch.Tensor):
            self.assertTrue(torch.equal(expected, got), where)
        elif isinstance(expected, dict):
            self.assertEqual(set(expected), set(got), where)
            for key in expected:
                self.assert_same(expected[key], got[key], f"{where}.{key}")
        elif isinstance(expected, (list, tuple)):
            self.assertEqual(len(expected), len(got), where)
            for n, (one, other) in enumerate(zip(expected, got, strict=True)):
                self.assert_same(one, other, f"{where}[{n}]")
        else:
            self.assertEqual(expected, got, where)

    def test_run_has_what_it_needs(self):
        # power of the tests below: dropout, learning rate, average and best metric really move
        self.assertNotEqual(self.reference.best.value, None)
        self.assertGreater(self.reference.best.iteration, 0)
        with mock.patch.object(DeterministicDraws, "_iteration_started", lambda self, engine: None):
            torch.manual_seed(99)
            run = small_run(self.folder / "unseeded")
            run.trainer.run()
        weights, others = run.network.state_dict(), self.reference.network.state_dict()
        self.assertFalse(all(torch.equal(weights[key], others[key]) for key in weights))

    def test_number_of_workers(self):
        run = small_run(self.folder / "workers", num_workers=2)
        run.trainer.run()
        self.assert_equal_end(run)

    @parameterized.expand(
        [
            ("middle", Events.ITERATION_COMPLETED(once=5), 0, 5),
            ("middle", Events.ITERATION_COMPLETED(once=5), 2, 5),
            ("end", Events.EPOCH_COMPLETED(once=2), 0, 6),
            ("end", Events.EPOCH_COMPLETED(once=2), 2, 6),
            ("first", Events.ITERATION_COMPLETED(once=1), 0, 1),
        ]
    )
    def test_terminated(self, name, event, num_workers, iteration):
        folder = self.folder / f"{name}{num_workers}"
        stopped = small_run(folder, num_workers=num_workers, more_handlers=[At(event, terminate)])
        stopped.trainer.run()
        self.assertEqual(stopped.trainer.state.iteration, iteration)
        torch.manual_seed(1234)  # another process, with other random numbers
        resumed = small_run(folder, resume=stopped.checkpoint.path(iteration), num_workers=num_workers)
        resumed.trainer.run()
        self.assert_equal_end(resumed)

    @parameterized.expand(
        [
            ("within", Events.ITERATION_STARTED(once=6), 4),  # one iteration is lost
            ("between_best_and_checkpoint", Events.EPOCH_COMPLETED(once=2), 4),  # model.pt is newer than the checkpoint
        ]
    )
    def test_killed(self, name, event, iteration):
        folder = self.folder / name
        killed = small_run(folder, interval=2, more_handlers=[At(event, kill)])
        with self.assertRaises(Killed):
            killed.trainer.run()
        resumed = small_run(folder, interval=2, resume=killed.checkpoint.path(iteration))
        resumed.trainer.run()
        self.assert_equal_end(resumed)

    def test_time_limit_and_another_folder(self):
        clock = iter([0.0, *[1.0] * 3, *[1000.0] * 99])  # start, two iterations, the end of an epoch is not asked alone
        stopped = small_run(self.folder / "limited", more_handlers=[TimeLimit(1.0)])
        with mock.patch("monai_jointdiff.handlers.stopping.time.monotonic", lambda: next(clock)):
            stopped.trainer.run()
        iteration = stopped.trainer.state.iteration
        self.assertEqual(iteration, 4)
        resumed = small_run(self.folder / "elsewhere", resume=stopped.checkpoint.path(iteration))
        resumed.trainer.run()
        self.assert_equal_end(resumed)

    def test_twice(self):
        folder = self.folder / "twice"
        for stop, resume in ((2, None), (7, 2), (99, 7)):
            file = None if resume is None else folder / f"checkpoint_{resume:08d}.pt"
            run = small_run(folder, resume=file, more_handlers=[At(Events.ITERATION_COMPLETED(once=stop), terminate)])
            run.trainer.run()
        self.assert_equal_end(run)

    def test_finished(self):
        run = small_run(self.folder / "finished", resume=self.reference.checkpoint.path(TOTAL))
        run.trainer.run()
        self.assert_same(final_state(self.reference), final_state(run), "state")
        self.assertEqual(self.reference.best.path.read_bytes(), run.best.path.read_bytes())


if __name__ == "__main__":
    unittest.main()
