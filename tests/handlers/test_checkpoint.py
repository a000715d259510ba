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

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from ignite.engine import Engine, Events
from parameterized import parameterized
from torch import nn

from monai_jointdiff.handlers import BestModel, ExponentialMovingAverage, ResumableCheckpoint, atomic_save
from monai_jointdiff.handlers import checkpoint as checkpoint_module


class Toy:
    """A network of one weight that grows by one each step, under an ignite engine."""

    def __init__(
        self, folder: Path, epoch_length: int = 4, epochs: int = 3, with_parts: bool = True, **options
    ) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        self.ema = ExponentialMovingAverage(self.network)
        self.best = BestModel(self.ema, folder, "val")
        parts = {"ema": self.ema, "best": self.best} if with_parts else {}
        self.checkpoint = ResumableCheckpoint(folder, self.network, self.optimizer, **parts, **options)
        self.engine = Engine(self.step)
        self.engine.state.epoch_length = epoch_length
        self.epochs = epochs
        self.checkpoint.attach(self.engine)
        self.ema.attach(self.engine)

    def step(self, engine: Engine, batch: int) -> None:
        with torch.no_grad():
            self.network.weight += 1

    @property
    def weight(self) -> float:
        return self.network.weight.item()

    def run(self) -> Toy:
        length = self.engine.state.epoch_length
        self.engine.run(range(length), max_epochs=self.epochs, epoch_length=length)
        return self


def run_and_die(folder: Path) -> None:
    """In another process: killed while the second checkpoint is half written."""
    save, calls = torch.save, []

    def half(obj, stream):
        calls.append(1)
        if len(calls) == 2:
            stream.write(b"half a file")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(obj, stream)

    with mock.patch.object(torch, "save", half):
        Toy(folder, keep=1).run()


class TestResumableCheckpoint(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name) / "run"

    def iterations(self, folder: Path | None = None) -> list[int]:
        return sorted(int(path.stem.split("_")[1]) for path in (folder or self.folder).glob("checkpoint_*.pt"))

    @parameterized.expand([(None, 2, [8, 12]), (3, 9, [3, 4, 6, 8, 9, 12]), (2, 3, [8, 10, 12]), (None, 1, [12])])
    def test_files(self, interval, keep, expected):
        Toy(self.folder, interval=interval, keep=keep).run()
        self.assertEqual(self.iterations(), expected)

    def test_content(self):
        Toy(self.folder).run()
        for iteration in self.iterations():
            content = torch.load(self.folder / f"checkpoint_{iteration:08d}.pt", weights_only=True)
            self.assertEqual(content["iteration"], iteration)
            self.assertEqual(float(content["network"]["weight"]), iteration)
            network = nn.Linear(1, 1, bias=False)
            network.load_state_dict(content["ema"])  # a plain state dict, without prefix

    @parameterized.expand(
        [(Events.ITERATION_COMPLETED, 6, 6), (Events.ITERATION_STARTED, 7, 6), (Events.EPOCH_COMPLETED, 2, 8)]
    )
    def test_terminated(self, event, once, expected):
        toy = Toy(self.folder)
        toy.engine.add_event_handler(event(once=once), lambda engine: engine.terminate())
        toy.run()
        self.assertEqual(self.iterations()[-1], expected)
        resumed = Toy(self.folder, resume=self.folder / f"checkpoint_{expected:08d}.pt").run()
        self.assertEqual((resumed.weight, resumed.engine.state.epoch, resumed.engine.state.iteration), (12, 3, 12))

    def test_further_parts(self):
        class Counter:
            def __init__(self) -> None:
                self.count = torch.zeros(2)

            def state_dict(self):
                return {"count": self.count}

            def load_state_dict(self, state_dict):
                self.count.copy_(state_dict["count"])

        part = Counter()
        toy = Toy(self.folder, further={"counter": part})
        toy.engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: part.count.fill_(7))
        toy.run()
        other = Counter()
        file = self.folder / "checkpoint_00000012.pt"
        Toy(self.folder, resume=file, further={"counter": other}).run()
        self.assertEqual(other.count.tolist(), [7, 7])
        with self.assertRaisesRegex(ValueError, "counter was True, is None"):
            Toy(self.folder, resume=file).run()

    def test_file_from_before_there_were_further_parts(self):
        Toy(self.folder).run()
        file = self.folder / "checkpoint_00000012.pt"
        content = torch.load(file, weights_only=True)
        del content["further"]
        atomic_save(content, file)
        self.assertEqual(Toy(self.folder, resume=file).run().weight, 12)

    def test_nothing_is_saved_where_a_run_cannot_go_on(self):
        # terminated by a foreign handler at the last iteration of an epoch: ignite skips EPOCH_COMPLETED
        toy = Toy(self.folder, interval=4)
        toy.engine.add_event_handler(Events.ITERATION_COMPLETED(once=8), lambda engine: engine.terminate())
        toy.run()
        self.assertEqual(self.iterations(), [4])

    def test_gradients_pending(self):
        toy = Toy(self.folder, epoch_length=5, interval=1, keep=99, epochs=1)
        toy.engine.accumulation_steps = 2
        toy.run()
        self.assertEqual(self.iterations(), [2, 4, 5])

    def test_saves_after_all_other_handlers(self):
        # a handler that stands behind in the list and changes what is saved
        toy = Toy(self.folder, interval=1, keep=99, epochs=1)

        def change(engine: Engine) -> None:
            toy.network.weight.data += 100

        toy.engine.add_event_handler(Events.ITERATION_COMPLETED, change)
        toy.run()
        content = torch.load(self.folder / "checkpoint_00000002.pt", weights_only=True)
        self.assertEqual(float(content["network"]["weight"]), 202)

    def test_finished_run_stays_finished(self):
        Toy(self.folder).run()
        again = Toy(self.folder, resume=self.folder / "checkpoint_00000012.pt").run()
        self.assertEqual((again.weight, again.engine.state.iteration), (12, 12))
        longer = Toy(self.folder, resume=self.folder / "checkpoint_00000012.pt", epochs=4).run()
        self.assertEqual(longer.weight, 16)

    def test_list_of_files_goes_on(self):
        toy = Toy(self.folder)
        toy.engine.add_event_handler(Events.ITERATION_COMPLETED(once=10), lambda engine: engine.terminate())
        toy.run()
        self.assertEqual(self.iterations(), [8, 10])
        Toy(self.folder, resume=self.folder / "checkpoint_00000010.pt").run()
        self.assertEqual(self.iterations(), [10, 12])

    def test_files_of_other_runs_stay(self):
        Toy(self.folder, epochs=5).run()
        self.assertEqual(self.iterations(), [16, 20])
        Toy(self.folder).run()
        self.assertEqual(self.iterations(), [8, 12, 16, 20])
        other = self.folder.parent / "other"
        Toy(other, resume=self.folder / "checkpoint_00000008.pt").run()
        self.assertEqual(self.iterations(other), [12])
        self.assertEqual(self.iterations(), [8, 12, 16, 20])

    def test_failing_write_leaves_the_predecessor(self):
        toy = Toy(self.folder, keep=1)
        save, calls = torch.save, []

        def full_disk(obj, stream):
            calls.append(1)
            if len(calls) == 2:
                stream.write(b"half a file")
                raise OSError("no space left on device")
            save(obj, stream)

        with mock.patch.object(torch, "save", full_disk), self.assertRaisesRegex(OSError, "no space"):
            toy.run()
        self.assertEqual([path.name for path in self.folder.iterdir()], ["checkpoint_00000004.pt"])
        self.assertEqual(Toy(self.folder, resume=self.folder / "checkpoint_00000004.pt").run().weight, 12)

    def test_predecessor_is_removed_only_after_the_rename(self):
        def watch(content, path):
            if path.name == "checkpoint_00000008.pt":
                self.assertEqual(self.iterations(), [4])
            return atomic_save(content, path)

        with mock.patch.object(checkpoint_module, "atomic_save", watch):
            Toy(self.folder, keep=1).run()
        self.assertEqual(self.iterations(), [12])

    @unittest.skipUnless("fork" in multiprocessing.get_all_start_methods(), "needs os.fork")
    def test_killed_while_writing(self):
        process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(self.folder,))
        process.start()
        process.join()
        self.assertEqual(process.exitcode, -signal.SIGKILL)
        self.assertEqual(self.iterations(), [4])
        self.assertEqual(len(list(self.folder.iterdir())), 2)  # and a partial file
        resumed = Toy(self.folder, resume=self.folder / "checkpoint_00000004.pt").run()
        self.assertEqual(resumed.weight, 12)
        self.assertEqual(self.iterations(), [8, 12])
        self.assertEqual(len(list(self.folder.iterdir())), 2)

    def test_only_rank_0_writes(self):
        with mock.patch.object(checkpoint_module, "is_writing_process", return_value=False):
            toy = Toy(self.folder).run()
        self.assertFalse(self.folder.exists())
        self.assertEqual(toy.weight, 12)


class TestWrongInput(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        Toy(self.folder, options={"seed": 1}).run()
        self.file = self.folder / "checkpoint_00000012.pt"

    @parameterized.expand([("interval", 0), ("keep", 0)])
    def test_options(self, name, value):
        with self.assertRaisesRegex(ValueError, f"ResumableCheckpoint: {name} must be >= 1"):
            Toy(self.folder, **{name: value})

    def assert_refused(self, message: str, **options) -> None:
        with self.assertRaisesRegex(ValueError, message):
            Toy(self.folder, **{"resume": self.file, "options": {"seed": 1}, **options}).run()

    def test_other_run(self):
        self.assert_refused("other options: seed was 1, is 2", options={"seed": 2})
        self.assert_refused("other options: epoch_length was 4, is 5", epoch_length=5)
        self.assert_refused("best was True, is False; ema was True, is False", with_parts=False)

    def test_entries_of_dictionaries_are_named(self):
        options = {"seed": 1, "network": {"channels": [8, 16], "head": {"dropout": 0.0, "hidden": 4}}}
        folder = self.folder / "nested"
        Toy(folder, options=options).run()
        file = folder / "checkpoint_00000012.pt"
        Toy(folder, options=options, resume=file).run()
        for other, message in (
            ({"channels": [8, 16], "head": {"dropout": 0.2, "hidden": 4}}, "network.head.dropout was 0.0, is 0.2."),
            ({"channels": [8, 32], "head": {"dropout": 0.0, "hidden": 4}}, r"network.channels was \[8, 16\], is"),
            ({"channels": [8, 16]}, "network.head.dropout was 0.0, is None; network.head.hidden was 4, is None"),
        ):
            self.assert_refused(f"other options: {message}", options={"seed": 1, "network": other}, resume=file)

    def test_unreadable(self):
        self.file.write_bytes(self.file.read_bytes()[:100])
        self.assert_refused("cannot read .*checkpoint_00000012.pt")
        self.assert_refused("cannot read .*missing.pt", resume=self.folder / "missing.pt")

    def test_weights_only_file(self):
        file = atomic_save(nn.Linear(1, 1).state_dict(), self.folder / "model.pt")
        self.assert_refused("model.pt is no checkpoint of a run; it may hold weights only", resume=file)

    def test_other_network(self):
        content = torch.load(self.file, weights_only=True)
        content["network"] = nn.Linear(2, 1).state_dict()
        atomic_save(content, self.file)
        self.assert_refused("(?s)does not fit this network: .*weight")


if __name__ == "__main__":
    unittest.main()
