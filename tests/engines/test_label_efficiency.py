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

"""A study of label efficiency whose trainings are played by a function that writes what a training writes."""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import shutil
import subprocess
import tempfile
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from monai.bundle import ConfigParser
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.data import open_source
from monai_jointdiff.engines import (
    LabelEfficiencyStudy,
    LabelRun,
    LabelRunResult,
    label_efficiency,
    summarize_label_runs,
)
from monai_jointdiff.metrics import Interval, mean_of_repeats

_, has_matplotlib = optional_import("matplotlib")
_, has_scipy = optional_import("scipy")

ROOT = Path(__file__).resolve().parents[2]
SOURCE = {  # of phantoms, whatever dataset_dir says
    "num_labels": 50,
    "label_seed": 0,
    "validation_count": None,
    "source": {
        "_target_": "monai_jointdiff.data.open_with_few_labels",
        "image_size": 16,
        "phantom_counts": (60, 90, 6),
        "num_labels": "@num_labels",
        "label_seed": "@label_seed",
        "validation_count": "@validation_count",
    },
}
GRID: dict[str, Any] = {"counts": [20, 10], "algorithms": ["supervised", "fixmatch"], "label_seeds": [0, 5]}


def options_of(command: Sequence[str]) -> dict[str, Any]:
    """Name and value of each option, as Fire reads them."""
    names, values = command[4::2], command[5::2]
    return {name.removeprefix("--"): ast.literal_eval(value) for name, value in zip(names, values, strict=True)}


def accuracy(algorithm: str, num_labels: int, label_seed: int) -> float:
    return 0.5 + num_labels / 100 + label_seed / 100 + 0.1 * (algorithm == "fixmatch")


class Trainings:
    """Stands for `subprocess.run`: keeps the options, and breaks down at one of the trainings."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[dict[str, Any]] = []

    def __call__(self, command: Sequence[str], stdout: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        options = options_of(command)
        self.asked.append(options)
        models, output = Path(options["ckpt_dir"]), Path(options["output_dir"])
        for folder in (models, output):
            folder.mkdir(parents=True)
        (models / "model.pt").touch()
        (models / "checkpoint_00000004.pt").touch()
        if len(self.asked) == self.fails_at:
            stdout.write("line\n" * 50 + "ValueError: out of luck\n")
            return subprocess.CompletedProcess([], 1)
        (output / "labelled.txt").write_text("a\n" * (options["num_labels"] + 1), encoding="utf-8")
        value = accuracy(options["algorithm"], options["num_labels"], options["label_seed"])
        classes = {"a": {"f1": {"value": value}}, "b": {"f1": {"value": value - 0.2}}, "c": {"f1": {"value": None}}}
        metrics = {"balanced_accuracy": {"value": value}, "auc": {"value": value / 2}, "f1": {"value": 9.0}}
        content = {"metrics": {**metrics, "per_class": classes}}
        (output / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
        return subprocess.CompletedProcess([], 0)


@unittest.skipUnless(has_matplotlib and has_scipy, "matplotlib or scipy is not installed")
class TestStudy(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.configs = [self.folder / "train.json", self.folder / "train_semi.json"]
        for file, content in zip(self.configs, (SOURCE, {}), strict=True):
            file.write_text(json.dumps(content), encoding="utf-8")

    def study(self, **options: Any) -> LabelEfficiencyStudy:
        given = {"dataset_dir": "/somewhere/images", "epochs": 3, "image_size": None}
        return LabelEfficiencyStudy(self.configs, self.folder, **{**GRID, "options": given, **options})

    def written(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "label_efficiency.json").read_text(encoding="utf-8")))

    def run_study(self, trainings: Trainings, drawn: bool = False, **options: Any) -> list[LabelRunResult]:
        """Without the picture, which takes half a second each time, unless it is looked at."""
        names = () if drawn else ("label_efficiency_figure", "save_figure")
        with (
            mock.patch("subprocess.run", trainings),
            mock.patch("builtins.print"),
            contextlib.ExitStack() as stack,
        ):
            for name in names:
                stack.enter_context(mock.patch.object(label_efficiency, name))
            return self.study(**options).run()

    def test_every_training_has_its_options_and_its_folder(self) -> None:
        trainings = Trainings()
        self.run_study(trainings)
        found = [(asked["label_seed"], asked["num_labels"], asked["algorithm"]) for asked in trainings.asked]
        expected = [(seed, n, a) for seed in (0, 5) for n in (10, 20) for a in ("supervised", "fixmatch")]
        self.assertEqual(found, expected)
        self.assertEqual(len({asked["ckpt_dir"] for asked in trainings.asked}), 8)
        first = trainings.asked[0]
        self.assertEqual(first["config_file"], [str(file) for file in self.configs])
        self.assertEqual((first["dataset_dir"], first["epochs"], first["num_samples"]), ("/somewhere/images", 3, 0))
        self.assertEqual(first["validation_count"], "labelled")
        self.assertNotIn("image_size", first)
        models = self.folder / "runs" / "supervised_10_labels_seed_0" / "models"
        self.assertEqual([path.name for path in models.iterdir()], ["model.pt"])  # checkpoints are of no use any more

    def test_results_and_files(self) -> None:
        results = self.run_study(Trainings())
        content = self.written()
        self.assertNotIn("somewhere", json.dumps(content))
        self.assertNotIn(str(self.folder), json.dumps(content))
        self.assertEqual((content["settings"]["trainings"], content["settings"]["dataset_dir"]), (8, "images"))
        points = {(point["algorithm"], point["num_labels"]): point for point in content["means"]}
        self.assertEqual(len(points), 4)
        for (algorithm, n), point in points.items():
            values = [accuracy(algorithm, n, seed) for seed in (0, 5)]
            self.assertEqual(point["draws"], 2)
            self.assertEqual(point["balanced_accuracy"], mean_of_repeats(values).as_dict())
            self.assertAlmostEqual(point["auc"]["value"], np.mean(values) / 2)
            self.assertAlmostEqual(point["macro_f1"]["value"], np.mean(values) - 0.1)
        with open(self.folder / "label_efficiency.csv", newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        self.assertEqual(len(rows), 8)
        self.assertEqual([row["labelled"] for row in rows], [str(result.run.num_labels + 1) for result in results])
        for row, result in zip(rows, results, strict=True):
            self.assertEqual(float(row["auc"]), result.auc)

    def test_picture(self) -> None:
        self.run_study(Trainings(), drawn=True, label_seeds=[0], counts=[20], algorithms=["joint"])
        self.assertEqual((self.folder / "label_efficiency.png").read_bytes()[:4], b"\x89PNG")

    def test_goes_on_where_it_was_interrupted(self) -> None:
        with self.assertRaisesRegex(RuntimeError, r"supervised, 20 labels, seed 0 failed \(code 1\)(.|\n)*out of luck"):
            self.run_study(Trainings(fails_at=3))
        written = self.written()
        self.assertEqual((len(written["runs"]), written["settings"]["trainings"]), (2, 8))
        second = Trainings()
        results = self.run_study(second)
        self.assertEqual(len(second.asked), 6)
        self.assertEqual(len(results), 8)
        third = Trainings()
        self.assertEqual(self.run_study(third), results)  # from the files, to the last digit
        self.assertEqual(third.asked, [])
        more = Trainings()
        self.run_study(more, label_seeds=[0, 5, 6])
        self.assertEqual([asked["label_seed"] for asked in more.asked], [6] * 4)

    def test_more_trainings_are_added_to_what_is_there(self) -> None:
        """In the files, too: as one call for all of them would have written."""
        with mock.patch("time.perf_counter", lambda: 0.0):
            self.run_study(Trainings(), label_seeds=[5], counts=[20])
            results = self.run_study(Trainings(), label_seeds=[0], counts=[10, 20], algorithms=["fixmatch"])
            self.assertEqual([result.run.num_labels for result in results], [10, 20])  # those asked for
            self.assertEqual(len(self.written()["runs"]), 4)
            self.run_study(Trainings())
            piecewise = self.written(), (self.folder / "label_efficiency.csv").read_text(encoding="utf-8")
            shutil.rmtree(self.folder / "runs")
            self.run_study(Trainings())
        self.assertEqual(piecewise[0], self.written())
        self.assertEqual(piecewise[1], (self.folder / "label_efficiency.csv").read_text(encoding="utf-8"))
        self.assertEqual([point["draws"] for point in piecewise[0]["means"]], [2] * 4)
        fewer = Trainings()
        self.run_study(fewer, label_seeds=[0], counts=[10], algorithms=["supervised"])  # forgets nothing
        self.assertEqual((fewer.asked, len(self.written()["runs"])), ([], 8))

    def test_trainings_of_other_options_are_not_among_the_results(self) -> None:
        self.run_study(Trainings(), label_seeds=[0])
        self.run_study(Trainings(), label_seeds=[5], options={"epochs": 4})
        self.assertEqual({row["label_seed"] for row in self.written()["runs"]}, {5})

    def test_trainings_of_other_options_are_not_mixed(self) -> None:
        self.run_study(Trainings())
        none = Trainings()
        with self.assertRaisesRegex(ValueError, "LabelEfficiencyStudy: .* other options .epochs was 3, is 4"):
            self.run_study(none, options={"dataset_dir": "/somewhere/images", "epochs": 4})
        with self.assertRaisesRegex(ValueError, "validation_count was 'labelled', is None"):
            self.run_study(none, fair_validation=False)
        self.assertEqual(none.asked, [])

    def test_data_of_the_same_name_and_changed_configurations_are_other_options(self) -> None:
        places = [self.folder / place / "images" for place in ("here", "there")]
        for place in places:
            place.mkdir(parents=True)
        here: dict[str, Any] = {"options": {"dataset_dir": str(places[0])}}
        self.run_study(Trainings(), **here)
        none = Trainings()
        with self.assertRaisesRegex(ValueError, r"other options \(dataset_fingerprint was 'sha256:\w{64}', is"):
            self.run_study(none, options={"dataset_dir": str(places[1])})
        detour = {"dataset_dir": str(places[1] / ".." / ".." / "here" / "images")}
        self.run_study(none, options=detour)  # the same place
        study = self.study(**here, label_seeds=[7])
        self.configs[1].write_text('{"threshold": 0.8}', encoding="utf-8")
        with self.assertRaisesRegex(ValueError, r"other options \(config_fingerprint was 'sha256:\w{64}', is"):
            self.run_study(none, **here)
        with (
            mock.patch("subprocess.run", none),
            mock.patch("builtins.print"),
            self.assertRaisesRegex(ValueError, "a configuration file has changed since the study began"),
        ):
            study.run()
        self.assertEqual(none.asked, [])
        self.configs[1].unlink()
        with self.assertRaisesRegex(ValueError, "there is no configuration file .*train_semi.json"):
            self.study()

    def test_says_what_is_trained_before_the_first_training(self) -> None:
        printed: list[str] = []

        def first(*_: Any, **__: Any) -> None:
            raise InterruptedError  # nothing after it is of interest

        with (
            mock.patch("subprocess.run", first),
            mock.patch("builtins.print", lambda *words, **_: printed.append(" ".join(words))),
            self.assertRaises(InterruptedError),
        ):
            self.study().run()
        text = "\n".join(printed)
        self.assertRegex(text, r"data: .*phantoms.*16 x 16(.|\n)*train: 60 images(.|\n)*val: 90 images")
        self.assertNotIn("unlabelled", text)  # all labels that there are
        self.assertIn("dataset_dir /somewhere/images, epochs 3", text)
        self.assertIn("trainings: 8, 8 of them to make", text)
        self.assertIn(f"results: {self.folder}", text)

    @parameterized.expand([("chest_xray",), ("skin_lesion",)])
    def test_options_of_a_bundle(self, name: str) -> None:
        """They reach the trainings; a misspelt one shows as phantoms."""
        names = ("image_column", "label_column", "split_column", "patient_column")
        given = {**{option: f"my_{option}" for option in names}, "class_names": "a,b", "batch_size": 16}
        bundle = ROOT / "bundles" / name

        def study(**options: Any) -> LabelEfficiencyStudy:
            parser = ConfigParser()
            parser.read_config(bundle / "configs" / "label_efficiency.json")
            small = {"source#phantom_counts": [150, 60, 6], "image_size": 16}
            places = {"bundle_root": str(bundle), "output_dir": str(self.folder)}
            parser.update({**places, "train_options": small, **options})
            parsed: LabelEfficiencyStudy = parser.get_parsed_content("study")
            return parsed

        plain = options_of(study().command(LabelRun("joint", 10, 0)))
        self.assertFalse({*given, "device", "num_workers"} & set(plain))  # those of train.json, and of a preset
        for device in ("cpu", "$torch.device('cpu')"):
            found = options_of(study(**given, num_workers=2, device=device).command(LabelRun("joint", 10, 0)))
            self.assertLessEqual({**given, "num_workers": 2, "device": "$torch.device('cpu')"}.items(), found.items())
        printed: list[str] = []
        with (
            mock.patch("subprocess.run", side_effect=InterruptedError),
            mock.patch("builtins.print", lambda *words, **_: printed.append(" ".join(words))),
            self.assertRaises(InterruptedError),
        ):
            study(datset_dir="my_images").run()
        self.assertRegex("\n".join(printed), "data: .*phantoms")
        with self.assertRaises(RuntimeError) as caught:  # MONAI's own, around the reader's
            study(dataset_dir="nowhere").run()
        self.assertIn("nowhere", str(caught.exception.__cause__))

    @parameterized.expand([([10, 60],), ([10, 61],), ([2, 10],)])
    def test_counts_that_the_data_cannot_have_are_refused_at_once(self, counts: list[int]) -> None:
        none = Trainings()
        wrong = next(count for count in counts if count != 10)
        message = f"counts must be from 3 to 59: .* 3 classes and 60 training images.* got {wrong}. .* with train.json"
        with self.assertRaisesRegex(ValueError, f"LabelEfficiencyStudy: {message}"):
            self.run_study(none, counts=counts)
        self.assertEqual(none.asked, [])
        self.assertFalse((self.folder / "runs").exists())
        self.run_study(none, counts=[3, 59], label_seeds=[0])
        self.assertEqual(len(none.asked), 4)

    def test_choices_of_labels_that_a_training_would_refuse_are_refused_at_once(self) -> None:
        """Two patients of five images: eight labels are ten. Four findings, one for each image: they take four."""
        patients: dict[str, Any] = {"train_labels": np.arange(10) // 5, "train_patients": np.repeat(["a", "b"], 5)}
        findings: dict[str, Any] = {"train_labels": np.tile(np.eye(4, dtype=int), (3, 1))}
        none = Trainings()
        for arrays, count, message in (
            (patients, 8, "8 labels, seed 0, whole patients together, leave no training image"),
            (findings, 3, "3 labels are too few for one of each of the 4 classes"),
        ):
            rest = {f"{part}_labels": arrays["train_labels"] for part in ("val", "test")}
            images = {
                f"{p}_images": np.zeros((len(rest["val_labels"]), 8, 8), np.uint8) for p in ("train", "val", "test")
            }
            np.savez(self.folder / "data.npz", **arrays, **rest, **images)
            source = open_source(self.folder / "data.npz")
            with (
                mock.patch.object(LabelEfficiencyStudy, "_source", return_value=source),
                self.assertRaisesRegex(ValueError, message),
            ):
                self.run_study(none, counts=[count])
        self.assertEqual(none.asked, [])

    def test_complete_trainings_need_no_data(self) -> None:
        results = self.run_study(Trainings())
        with mock.patch.object(LabelEfficiencyStudy, "_source", side_effect=AssertionError):
            self.assertEqual(self.run_study(Trainings()), results)

    def test_command_keeps_texts_and_values(self) -> None:
        values = {"dataset_dir": "2024_01", "progress": True, "train#epoch_length": 3, "class_names": ["a", "b"]}
        command = self.study(options=values).command(LabelRun("joint", 10, 0))
        self.assertLessEqual(values.items(), options_of(command).items())
        self.assertEqual(command[1:4], ["-m", "monai.bundle", "run"])

    @parameterized.expand(
        [
            ({"counts": []}, "counts must be a list of different ones"),
            ({"counts": 20}, "counts must be a list .* got 20"),
            ({"counts": [20, 20]}, "counts must be a list of different ones"),
            ({"counts": [0]}, "whole numbers >= 1"),
            ({"algorithms": "joint"}, "algorithms must be a list"),
            ({"algorithms": ["mixmatch"]}, "among fixmatch, pi_model, joint, acpl, fixmatch_alone, supervised"),
            ({"label_seeds": [0.5]}, "label_seeds must be a list .*whole numbers >= 0"),
            ({"options": {"num_labels": 5, "resume": "x"}}, "the study sets num_labels, resume itself"),
            ({"options": {"device": Path()}}, "options must be plain values"),
        ]
    )
    def test_wrong_input(self, options: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"LabelEfficiencyStudy: .*{message}"):
            self.study(**options)


class TestSummary(unittest.TestCase):
    def test_figures_that_are_not_defined_have_no_mean(self) -> None:
        result = LabelRunResult(LabelRun("joint", 10, 0), 10, 1.0, None, 0.5, 0.25)
        (point,) = summarize_label_runs([result])
        self.assertEqual(point["auc"], Interval(0.5, reason="one repeat"))
        self.assertIsNone(point["balanced_accuracy"].value)
        self.assertIn("not defined", point["balanced_accuracy"].reason)


if __name__ == "__main__":
    unittest.main()
