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

import logging
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory

from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.handlers import StatsHandler, TensorBoardStatsHandler
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.handlers import LossTerms
from tests.engines.small_run import EPOCH_LENGTH, EPOCHS, small_run, use_one_thread

TERMS = ("diffusion", "classification", "total")
event_accumulator, has_tensorboard = optional_import("tensorboard.backend.event_processing.event_accumulator")


def setUpModule() -> None:
    use_one_thread()


class Collect:
    """Reads what the logging handlers would read."""

    def __init__(self, event, values):
        self.event, self.values, self.seen = event, values, []

    def attach(self, engine):
        engine.add_event_handler(self.event, lambda e: self.seen.append(self.values(e)))


class TestLossTerms(unittest.TestCase):
    def setUp(self):
        folder = TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    @parameterized.expand([(IterationEvents.LOSS_COMPLETED,), (Events.ITERATION_COMPLETED,)])
    def test_readable(self, event):
        def current(engine):
            output = engine.state.output  # a list of one per image once it is decollated
            first = output[0] if isinstance(output, list) else output
            return {term: float(first[f"loss_{term}"]) for term in TERMS} | {"loss": float(first["loss"])}

        collect = Collect(event, current)
        metrics = Collect(Events.EPOCH_COMPLETED, lambda e: {term: e.state.metrics[f"loss_{term}"] for term in TERMS})
        run = small_run(self.folder, more_handlers=[collect, metrics])
        run.trainer.run()
        self.assertEqual(len(collect.seen), EPOCHS * EPOCH_LENGTH)
        for values in collect.seen:
            self.assertAlmostEqual(values["total"], values["diffusion"] + 0.5 * values["classification"], places=5)
            self.assertEqual(values["total"], values["loss"])
        for epoch, values in enumerate(metrics.seen):  # the mean over the epoch
            of_epoch = collect.seen[epoch * EPOCH_LENGTH : (epoch + 1) * EPOCH_LENGTH]
            for term in TERMS:
                self.assertAlmostEqual(values[term], sum(v[term] for v in of_epoch) / EPOCH_LENGTH, places=6)

    @unittest.skipUnless(has_tensorboard, "needs tensorboard")
    def test_monai_handlers(self):
        holder: list[LossTerms] = []

        def values(output):
            return holder[0].values(output)

        writer = TensorBoardStatsHandler(log_dir=str(self.folder / "logs"), output_transform=values)
        run = small_run(
            self.folder, more_handlers=[StatsHandler(name="terms", output_transform=values, tag_name="x"), writer]
        )
        holder.append(LossTerms(run.loss))
        with self.assertLogs("terms", logging.INFO) as logs:
            run.trainer.run()
        writer.close()
        for term in TERMS:
            self.assertTrue(any(f"loss_{term}" in line for line in logs.output), term)
        events = event_accumulator.EventAccumulator(str(self.folder / "logs"))
        events.Reload()
        for term in TERMS:
            steps = [event.step for event in events.Scalars(f"loss_{term}")]
            self.assertEqual(
                len(steps), EPOCHS * EPOCH_LENGTH + EPOCHS
            )  # per iteration and, from the metrics, per epoch
        last = [event.value for event in events.Scalars("loss_total") if event.step == EPOCHS * EPOCH_LENGTH][-1]
        self.assertAlmostEqual(last, float(run.loss.terms["total"]), places=5)


if __name__ == "__main__":
    unittest.main()
