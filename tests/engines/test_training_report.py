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


"""What happens when a training is over."""

from __future__ import annotations

import contextlib
import io
import json
import unittest
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from parameterized import parameterized
from torch import nn

from monai_jointdiff.data import ImageSource, open_source
from monai_jointdiff.engines import (
    ModelDescription,
    SamplingInferer,
    TrainingReport,
    choose_decision,
    predict,
)
from monai_jointdiff.handlers import BestModel
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.schedulers import make_scheduler
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import small_network, use_one_thread

CPU = torch.device("cpu")


def setUpModule() -> None:
    use_one_thread()


def small_source(**changes: Any) -> ImageSource:
    source = open_source(image_size=8, phantom_counts=(24, 12, 10))
    return replace(source, **changes)


def unlabelled(source: ImageSource, part: str) -> ImageSource:
    items = [{**item, "label": -1} for item in source.part(part)]
    return replace(source, items={**source.items, part: items})


class Run:
    """A report and the folders it writes to."""

    def __init__(self, case: unittest.TestCase, source: ImageSource | None = None, **options: Any) -> None:
        folder = temporary_folder(case)
        self.models, self.output = folder / "models", folder / "output"
        self.models.mkdir()
        self.source = small_source() if source is None else source
        self.network = small_network(dropout=0.0)
        self.weights = {key: value.clone() for key, value in self.network.state_dict().items()}
        scheduler = make_scheduler("ddim", 2)
        self.inferer = JointDiffusionInferer(scheduler)
        self.sampling = SamplingInferer(self.inferer, scheduler, 2)
        self.description = ModelDescription(self.network.config, {}, self.source.description())
        self.report = TrainingReport(
            self.source,
            self.network,
            self.inferer,
            self.sampling,
            self.description,
            self.models,
            self.output,
            CPU,
            **{"num_samples": 0, "floor": False, "batch_size": 5, **options},
        )

    def save(self) -> None:
        torch.save(self.weights, self.models / "model.pt")

    def run(self) -> tuple[dict[str, Any], str]:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            summary = self.report.run()
        assert summary is not None
        return summary, text.getvalue()

    def content(self, name: str) -> Any:
        return json.loads((self.output / name).read_text())


class TestPredict(unittest.TestCase):
    def test_gives_logits_in_the_order_of_the_data(self) -> None:
        run = Run(self)
        dataset = run.report.dataset("test")
        found = predict(run.network, run.inferer, dataset, CPU, batch_size=3)
        items = [dataset[n] for n in range(len(dataset))]
        self.assertEqual(found.names, [item["name"] for item in items])
        self.assertEqual(found.labels.tolist(), [int(item["label"]) for item in items])
        run.network.eval()
        with torch.no_grad():
            expected = run.network(torch.stack([item["image"] for item in items]))
        np.testing.assert_allclose(found.logits, expected.numpy(), atol=1e-5)


class TestReport(unittest.TestCase):
    def test_takes_the_best_weights_and_decides_on_validation(self) -> None:
        run = Run(self)
        run.save()
        for parameter in run.network.parameters():
            nn.init.constant_(parameter, 0.1)  # the last epoch, not the best
        summary, text = run.run()
        torch.testing.assert_close(dict(run.network.state_dict()), run.weights, rtol=0, atol=0)
        validation = predict(run.network, run.inferer, run.report.dataset("val"), CPU)
        expected = choose_decision(validation, False, "validation part of phantoms of seed 0")
        stored = ModelDescription.load(run.models / "model.json")
        self.assertAlmostEqual(stored.decision.temperature, expected.temperature, places=4)
        self.assertEqual(stored.decision.chosen_on, expected.chosen_on)
        self.assertEqual(run.content("summary.json"), summary)
        self.assertEqual(run.content("metrics.json")["part"], "test")
        self.assertIn("final table", text)
        self.assertNotIn("Frechet", str(summary))

    def test_test_labels_do_not_touch_the_decision(self) -> None:
        decisions = []
        for source in (small_source(), unlabelled(small_source(), "test")):
            run = Run(self, source)
            run.save()
            summary, text = run.run()
            decisions.append(ModelDescription.load(run.models / "model.json").decision)
        self.assertEqual(*decisions)
        self.assertEqual(summary, {"data": "phantoms of seed 0"})
        self.assertIn("the test part has no labels", text)

    def test_generation(self) -> None:
        run = Run(self, classify=False, num_samples=6)
        run.save()
        summary, _ = run.run()
        rows = run.content("generation.json")["rows"]
        self.assertEqual([row["count"] for row in rows], [6] * 3)
        for row in rows:
            self.assertEqual(summary[f"Frechet distance to test images: {row['images']}"], row["frechet"])
        self.assertFalse((run.output / "metrics.json").exists())
        self.assertEqual(ModelDescription.load(run.models / "model.json").decision.temperature, 1.0)

    @parameterized.expand([(True,), (False,)])
    def test_bar_of_the_samples_can_be_left_out(self, progress: bool) -> None:
        run = Run(self, classify=False, num_samples=6, progress=progress)
        run.save()
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            run.run()
        self.assertEqual("generating" in text.getvalue(), progress)

    def test_one_sample_is_too_few_to_compare_and_no_reason_to_stop(self) -> None:
        run = Run(self, classify=False, num_samples=1)
        run.save()
        summary, text = run.run()
        self.assertEqual(list(summary), ["data"])
        self.assertIn("at least 2 are needed", text)

    def test_floor(self) -> None:
        run = Run(self, floor=True)
        run.save()
        self.assertIn("test auc of PCA + logistic regression (floor)", run.run()[0])
        source = small_source()
        train = [{**item, "label": min(item["label"], 0)} for item in source.part("train")]
        poor = Run(self, replace(source, items={**source.items, "train": train}), floor=True)
        poor.save()
        summary, text = poor.run()
        self.assertIn("no floor", text)
        self.assertIn("test auc", summary)

    def test_part_of_the_images_is_drawn_from_all(self) -> None:
        run = Run(self)
        labels = run.report._images("test", 5)[1]
        everything = run.report._images("test")[1]
        self.assertEqual(len(labels), 5)
        self.assertEqual(labels.tolist(), everything[:5].tolist())
        stored = [item["label"] for item in run.source.part("test")]
        self.assertEqual(sorted(everything.tolist()), sorted(stored))
        self.assertNotEqual(everything.tolist(), stored)


class TestWithoutValidation(unittest.TestCase):
    def judged(self, value: float) -> tuple[Run, BestModel]:
        run = Run(self)
        best = BestModel(run.network, run.models, "val_loss", larger_is_better=False)

        def validate(global_epoch: int = 1) -> None:
            engine = Engine(lambda engine, batch: None)
            engine.state.metrics = {"val_loss": value}
            best(engine)

        evaluator: Any = type("Validation", (), {"run": staticmethod(validate)})()
        run.report.best, run.report.evaluator = best, evaluator
        return run, best

    def test_validates_itself_and_leaves_a_model(self) -> None:
        run, best = self.judged(0.5)
        torch.save({"of an earlier run": torch.zeros(1)}, run.models / "model.pt")
        run.run()
        self.assertEqual(best.value, 0.5)
        torch.testing.assert_close(torch.load(run.models / "model.pt", weights_only=True), run.weights)

    def test_validation_without_a_number_is_refused(self) -> None:
        run, _ = self.judged(float("nan"))
        torch.save(run.weights, run.models / "model.pt")  # of an earlier run
        with self.assertRaisesRegex(ValueError, "this run left no model.pt in .*models"):
            run.run()

    def test_missing_file_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "this run left no model.pt"):
            Run(self).run()

    def test_nothing_is_validated_twice(self) -> None:
        run, best = self.judged(0.5)
        run.save()
        best.value = 0.1
        run.run()
        self.assertEqual(best.value, 0.1)


if __name__ == "__main__":
    unittest.main()
