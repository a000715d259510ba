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

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from ignite.engine import Engine, Events
from parameterized import parameterized
from torch import nn

from monai_jointdiff.handlers import BestModel, EarlyStop, ExponentialMovingAverage

NAN = float("nan")


class TestBestModel(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name) / "models"

    def validate(self, best: BestModel, values: list[float], network: nn.Linear) -> list[float]:
        """Validations of epochs 1, 2, ... with weights 1, 2, ...; the weight in the file after each."""
        kept = []
        for epoch, value in enumerate(values, start=1):
            nn.init.constant_(network.weight, float(epoch))
            evaluator = Engine(lambda engine, batch: None)
            best.attach(evaluator)

            @evaluator.on(Events.EPOCH_COMPLETED)
            def measure(engine: Engine, epoch: int = epoch, value: float = value) -> None:
                engine.state.metrics["val"] = value
                engine.state.epoch = epoch

            evaluator.run([0])
            if best.path.exists():
                kept.append(float(torch.load(best.path, weights_only=True)["weight"]))
        return kept

    @parameterized.expand(
        [
            (True, [0.5, 0.4, 0.5, 0.9, NAN, 0.8], [1, 1, 1, 4, 4, 4], 0.9),
            (False, [0.5, 0.6, 0.5, 0.4, NAN, 0.3], [1, 1, 1, 4, 4, 6], 0.3),
            (True, [NAN, -1.0, NAN], [2, 2], -1.0),
        ]
    )
    def test_keeps_the_best(self, larger_is_better, values, expected, value):
        network = nn.Linear(1, 1, bias=False)
        best = BestModel(network, self.folder, "val", larger_is_better)
        self.assertEqual(self.validate(best, values, network), expected)
        self.assertEqual((best.value, best.epoch, best.iteration), (value, expected[-1], None))
        self.assertEqual(best.validated, len(values))  # also where the metric was no number

    def test_keeps_the_last(self):
        network = nn.Linear(1, 1, bias=False)
        best = BestModel(network, self.folder, "val", keep="last")
        self.assertEqual(self.validate(best, [0.5, 0.9, 0.4, NAN], network), [1, 2, 3, 3])
        self.assertEqual((best.value, best.epoch), (0.4, 3))
        with self.assertRaisesRegex(ValueError, "keep must be one of best, last, got 'first'"):
            BestModel(network, self.folder, "val", keep="first")
        with self.assertRaisesRegex(ValueError, "EarlyStop: where the last weights are kept"):
            EarlyStop(best, patience=2)

    def test_average(self):
        average = ExponentialMovingAverage(nn.Linear(1, 1, bias=False))
        average.iteration = 40
        best = BestModel(average, self.folder, "val")
        self.assertEqual(self.validate(best, [0.1, 0.2], average.ema_model), [1, 2])
        self.assertEqual(best.iteration, 40)

    def test_state_brings_the_file_back(self):
        # killed after epoch 3, resumed from the checkpoint of epoch 2; and resumed in another folder
        network = nn.Linear(1, 1, bias=False)
        best = BestModel(network, self.folder, "val")
        self.validate(best, [0.5, 0.4], network)
        state, content = best.state_dict(), best.path.read_bytes()
        self.validate(best, [0.6, 0.7, 0.8], network)
        self.assertNotEqual(best.path.read_bytes(), content)
        for folder in (self.folder, self.folder.parent / "elsewhere"):
            resumed = BestModel(network, folder, "val")
            resumed.load_state_dict(state)
            self.assertEqual((resumed.value, resumed.epoch, resumed.validated), (0.5, 1, 2))
            self.assertEqual(resumed.path.read_bytes(), content)

    def test_state_of_an_older_version_knows_only_the_best_validation(self):
        network = nn.Linear(1, 1, bias=False)
        best = BestModel(network, self.folder, "val")
        self.validate(best, [0.5, 0.4], network)
        older = {key: value for key, value in best.state_dict().items() if key != "validated"}
        best.load_state_dict(older)
        self.assertEqual((best.epoch, best.validated), (1, 1))

    def test_state_before_the_first_validation(self):
        best = BestModel(nn.Linear(1, 1), self.folder, "val")
        best.load_state_dict(best.state_dict())
        self.assertIsNone(best.value)
        self.assertFalse(best.path.exists())

    def test_file_of_an_earlier_run_stays_until_there_are_weights(self):
        self.folder.mkdir()
        file = self.folder / "model.pt"
        torch.save({"weight": 99.0}, file)
        network, seen = nn.Linear(1, 1, bias=False), []
        best = BestModel(network, self.folder, "val", before_first=lambda: seen.append(file.read_bytes()))
        earlier = file.read_bytes()
        self.assertEqual(self.validate(best, [NAN, NAN], network), [99, 99])
        best.load_state_dict(best.state_dict())  # of a checkpoint without weights
        self.assertEqual((file.read_bytes(), seen), (earlier, []))
        self.assertEqual(self.validate(best, [0.5, 0.9, 0.7], network), [1, 2, 2])
        self.assertEqual(seen, [earlier])  # before the first, and once

    def test_resumed_run_makes_room_before_it_brings_its_file_back(self):
        network, called = nn.Linear(1, 1, bias=False), []
        best = BestModel(network, self.folder, "val")
        self.validate(best, [0.5], network)
        resumed = BestModel(network, self.folder, "val", before_first=lambda: called.append(best.path.unlink()))
        resumed.load_state_dict(best.state_dict())
        self.assertEqual(len(called), 1)
        self.assertEqual(float(torch.load(best.path, weights_only=True)["weight"]), 1)

    def test_sweeps(self):
        self.folder.mkdir()
        partial = self.folder / ".model.pt.123.partial"
        partial.touch()
        network = nn.Linear(1, 1, bias=False)
        self.validate(BestModel(network, self.folder, "val"), [0.5], network)
        self.assertFalse(partial.exists())

    def test_only_rank_0_writes(self):
        network = nn.Linear(1, 1, bias=False)
        best = BestModel(network, self.folder, "val", before_first=mock.Mock(side_effect=AssertionError))
        with mock.patch("monai_jointdiff.handlers.best_model.is_writing_process", return_value=False):
            self.validate(best, [0.5], network)
        self.assertEqual(best.value, 0.5)  # but all remember: early stopping must agree
        self.assertFalse(self.folder.exists())

    def test_missing_metric(self):
        evaluator = Engine(lambda engine, batch: None)
        BestModel(nn.Linear(1, 1), self.folder, "val_auc").attach(evaluator)
        with self.assertRaisesRegex(ValueError, r"no metric 'val_auc', it has \[\]"):
            evaluator.run([0])


class TestEarlyStop(unittest.TestCase):
    def run_with(self, bests: list[int], patience: int, done: int = 0, interval: int = 1) -> int:
        """Epochs that a run of 10 makes when the best epoch after the validation of epoch e is `bests[e - 1]`."""
        best = BestModel(nn.Linear(1, 1), "unused", "val")
        if done >= interval:
            validated = done // interval * interval
            best.epoch, best.validated = bests[validated - 1], validated
        trainer = Engine(lambda engine, batch: None)
        epochs: list[int] = []

        @trainer.on(Events.STARTED)
        def resume(engine: Engine) -> None:
            engine.state.epoch = engine.state.iteration = done

        @trainer.on(Events.EPOCH_COMPLETED)
        def validate(engine: Engine) -> None:
            if engine.state.epoch % interval == 0:
                best.epoch, best.validated = bests[engine.state.epoch - 1], engine.state.epoch
            epochs.append(engine.state.epoch)

        EarlyStop(best, patience).attach(trainer)
        trainer.run([0], max_epochs=10)
        return epochs[-1] if epochs else done

    def test_patience(self):
        bests = [1, 2, 2, 2, 5, 5, 5, 5, 5, 5]
        self.assertEqual(self.run_with(bests, patience=2), 4)
        self.assertEqual(self.run_with(bests, patience=3), 8)
        self.assertEqual(self.run_with(bests, patience=6), 10)

    @parameterized.expand([(1, 6), (2, 6), (3, 6), (4, 9), (6, 9), (7, 10)])
    def test_epochs_count_when_they_are_validated(self, patience, expected):
        bests = [0, 0, 3, 3, 3, 3, 3, 3, 3, 3]  # validations of epochs 3, 6 and 9: the first is the best
        for done in (0, 2, 3, 4, 5):  # a resumed run as well
            self.assertEqual(self.run_with(bests, patience, done, interval=3), expected)

    def test_resumed_run_stops_at_the_same_epoch(self):
        bests = [1, 2, 2, 2, 2, 2, 2, 2, 2, 2]
        for done in (1, 3, 5):  # the last: it had stopped already
            self.assertEqual(self.run_with(bests, patience=3, done=done), 5)

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "patience must be >= 1, got 0"):
            EarlyStop(BestModel(nn.Linear(1, 1), "unused", "val"), 0)


if __name__ == "__main__":
    unittest.main()
