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

import contextlib
import io
import json
import math
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from parameterized import parameterized

from benchmarks import common, joint_vs_single, localization
from benchmarks.common import Cell, CellStore, Target, counted, mean_interval, paired_difference
from benchmarks.render import load_results, render_table


class TemporaryFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


class TestTraining(TemporaryFolder):
    def test_is_the_command_of_a_user(self):
        with mock.patch("subprocess.run", side_effect=lambda *_, **__: time.sleep(0.06)) as run:
            minutes = common.train_bundle(
                ["a/train.json", "a/over.json"], self.folder / "new", {"epochs": 3, "network_def#channels": [8, 16]}
            )
        (command,), options = run.call_args
        self.assertEqual(command[1:4], ["-m", "monai.bundle", "run"])
        given = dict(zip(command[4::2], command[5::2], strict=True))
        self.assertEqual(given.pop("--config_file"), "['bundles/a/train.json', 'bundles/a/over.json']")
        folder = str(self.folder / "new")
        expected = {"--ckpt_dir": f"{folder}/models", "--output_dir": f"{folder}/output", "--progress": "False"}
        self.assertEqual(given, {**expected, "--epochs": "3", "--network_def#channels": "[8, 16]"})
        self.assertEqual((options["cwd"], options["check"]), (common.ROOT, True))
        self.assertTrue((self.folder / "new" / "log.txt").is_file())
        self.assertTrue(0.001 <= minutes < 1)

    def test_a_network_of_other_options_is_not_taken(self):
        options = {"epochs": 3, "image_size": (32, 32), "dataset_dir": Path("/somewhere/data.npz")}
        with mock.patch("subprocess.run", side_effect=RuntimeError), self.assertRaises(RuntimeError):
            common.ensure_trained(["a/train.json"], self.folder, options)
        with mock.patch("subprocess.run") as run:
            common.ensure_trained(["a/train.json"], self.folder, options)
            run.assert_called_once()  # for the first did not come to its end
            elsewhere = {**options, "dataset_dir": Path("/elsewhere/data.npz")}
            common.ensure_trained(["a/train.json"], self.folder, elsewhere)
            with self.assertRaisesRegex(ValueError, "was trained with .*'epochs': 3.* asked for is .*'epochs': 4"):
                common.ensure_trained(["a/train.json"], self.folder, {**options, "epochs": 4})
            run.assert_called_once()
        self.assertNotIn("somewhere", (self.folder / "trained_by.json").read_text(encoding="utf-8"))


class TestNetworks(TemporaryFolder):
    """Cells measured before the bundle's default became smaller, and those still missing, are of one network."""

    LARGE = [32, 64, 128]

    @mock.patch.dict("os.environ", JOINTDIFF_DATA="/data")
    def test_joint_and_single(self):
        for method in joint_vs_single.METHODS:
            cell = Cell(joint_vs_single.DATA, method, 1)
            options = joint_vs_single.training_options(cell, joint_vs_single.EPOCHS)
            self.assertEqual((options["channels"], options["epochs"], options["seed"]), (self.LARGE, 6, 1))

    @parameterized.expand([("phantoms", 10, None), (localization.BRAIN, 40, [32, 32]), ("busi_64", 40, [32, 32])])
    @mock.patch.object(localization, "ensure_trained")
    def test_localization(self, data, epochs, image_size, trainings):
        localization.train(Cell(data, "maps", 2), None, self.folder, quick=False)
        (_, _, options), _ = trainings.call_args
        self.assertEqual((options["seed"], options.get("epochs"), options.get("image_size")), (2, epochs, image_size))

    def test_measured_cells_are_still_known(self):
        stores = localization.stores_in(common.RESULTS / "cells")
        for file in (common.RESULTS / "cells" / "localization").glob("*.json"):
            cell = Cell(**json.loads(file.read_text(encoding="utf-8"))["cell"])
            self.assertIsNotNone(stores[cell.data].get(cell), file.name)


class TestLeaveOnePatientOut(TemporaryFolder):
    def test_every_slice_is_used_and_no_patient_is_in_two_parts(self):
        patients = {"train": ["b", "a", "b", "d"], "val": ["c", "c"], "test": ["e"]}
        number, arrays = 0, {"class_names": np.array(["normal", "tumor"])}
        for part, names in patients.items():
            arrays[f"{part}_patients"] = np.array(names)
            arrays[f"{part}_images"] = np.arange(number, number + len(names))
            number += len(names)
        whole = self.folder / "whole.npz"
        np.savez(whole, **arrays)
        tested = []
        for left_out, (test, val) in enumerate(["ab", "bc", "cd", "de", "ea"]):
            with np.load(localization.without_patient(whole, left_out, self.folder / str(left_out))) as fold:
                of_part = {p: set(fold[f"{p}_patients"]) for p in patients}
                self.assertEqual((of_part["test"], of_part["val"]), ({test}, {val}))
                self.assertEqual(of_part["train"], set("abcde") - {test, val})
                images = [fold[f"{p}_images"] for p in patients]
                np.testing.assert_array_equal(np.sort(np.concatenate(images)), np.arange(7))
                tested += fold["test_images"].tolist()
                self.assertEqual(list(fold["class_names"]), ["normal", "tumor"])
        self.assertEqual(sorted(tested), list(range(7)))


class TestStatistics(unittest.TestCase):
    def test_interval_of_three(self):
        # t(0.975, 2) = 4.30265..., sample standard deviation of (1, 2, 3) is 1
        interval = mean_interval([1.0, 2.0, 3.0])
        half = 4.302652729911275 / math.sqrt(3)
        self.assertAlmostEqual(interval["mean"], 2.0)
        self.assertAlmostEqual(interval["low"], 2.0 - half, places=9)
        self.assertAlmostEqual(interval["high"], 2.0 + half, places=9)
        self.assertEqual(interval["n"], 3)

    def test_equal_values_have_an_interval_of_no_width(self):
        self.assertEqual(mean_interval([0.5, 0.5]), {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 2})

    def test_one_value_has_no_interval(self):
        self.assertEqual(mean_interval([0.25]), {"mean": 0.25, "low": None, "high": None, "n": 1})

    def test_wrong_values(self):
        for values in ([], [1.0, math.nan]):
            with self.subTest(values=values), self.assertRaisesRegex(ValueError, "expected at least one value"):
                mean_interval(values)
        with self.assertRaisesRegex(ValueError, "confidence=1.5"):
            mean_interval([1.0, 2.0], confidence=1.5)

    def test_pairs_by_seed_not_by_order(self):
        ours, reference = {0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 2.0, 1: 5.0}
        difference = paired_difference(ours, reference)
        self.assertAlmostEqual(difference["mean"], 0.0)
        self.assertEqual(difference["worst"], -1.0)
        self.assertEqual(paired_difference(ours, reference, larger_is_better=False)["worst"], 1.0)

    def test_seeds_must_agree(self):
        with self.assertRaisesRegex(ValueError, "expected the same"):
            paired_difference({0: 1.0}, {1: 1.0})


class TestCells(TemporaryFolder):
    def store(self, **settings):
        return CellStore("bench", settings=settings or {"steps": 10, "size": (8, 8)}, root=self.folder)

    def measure_quietly(self, store, cells, measure):
        with contextlib.redirect_stdout(io.StringIO()):
            return store.run_missing(cells, measure)

    def test_measures_only_what_is_missing(self):
        cells = [Cell("data", "joint", seed) for seed in range(3)]
        measured = []

        def measure(cell):
            measured.append(cell.seed)
            return {"auc": 0.9 + cell.seed / 100}

        self.measure_quietly(self.store(), cells[:2], measure)
        values = self.measure_quietly(self.store(), cells, measure)
        self.assertEqual(measured, [0, 1, 2])
        self.assertEqual(list(values), cells)
        self.assertEqual(self.store().values("data", "joint", "auc"), [0.9, 0.91, 0.92])

    def test_interrupted_run_keeps_what_it_has(self):
        def measure(cell):
            if cell.seed == 1:
                raise KeyboardInterrupt
            return {"auc": 1.0}

        with self.assertRaises(KeyboardInterrupt):
            self.measure_quietly(self.store(), [Cell("data", "joint", seed) for seed in range(3)], measure)
        self.assertEqual([p.name for p in (self.folder / "bench").iterdir()], ["data__joint__seed0.json"])

    def test_record(self):
        cell = Cell("data", "joint", 7)
        self.measure_quietly(self.store(), [cell], lambda _: {"auc": 1.0})
        record = json.loads(self.store().path(cell).read_text(encoding="utf-8"))
        self.assertEqual(record["cell"], {"data": "data", "method": "joint", "seed": 7})
        self.assertEqual(record["settings"], {"steps": 10, "size": [8, 8]})
        self.assertEqual(record["environment"], self.store().environment(cell))
        with self.assertRaises(FileNotFoundError):
            self.store().environment(Cell("data", "joint", 8))
        self.assertGreaterEqual(record["seconds"], 0)
        self.assertIn("torch", record["environment"]["versions"])

    def test_other_settings_are_refused_before_anything_is_measured(self):
        self.measure_quietly(self.store(steps=10), [Cell("data", "joint", 1)], lambda _: {"auc": 1.0})
        cells = [Cell("data", "joint", 0), Cell("data", "joint", 1)]
        with self.assertRaisesRegex(ValueError, "measured with settings"):
            self.measure_quietly(self.store(steps=20), cells, lambda _: self.fail("measured"))

    def test_numeric_order_of_seeds(self):
        cells = [Cell("data", "joint", seed) for seed in (10, 9, 2)]
        self.measure_quietly(self.store(), cells, lambda cell: {"seed": cell.seed})
        self.assertEqual(self.store().values("data", "joint", "seed"), [2, 9, 10])

    def test_names_cannot_be_confused(self):
        for name in ("a__b", "", "../x", "a b"):
            with self.subTest(name=name), self.assertRaisesRegex(ValueError, "Cell: got name"):
                Cell("data", name, 0)

    def test_missing_cell(self):
        with self.assertRaisesRegex(ValueError, "no cell of data 'data' and method 'other'"):
            self.store().values("data", "other", "auc")

    def test_not_a_number_leaves_no_file(self):
        with self.assertRaises(ValueError):
            self.measure_quietly(self.store(), [Cell("data", "joint", 0)], lambda _: {"auc": math.nan})
        self.assertEqual(list(self.folder.rglob("*.*")), [])


class TestFiles(TemporaryFolder):
    def test_failed_write_leaves_the_old_file(self):
        path = self.folder / "file.json"
        common.write_json(path, {"a": 1})
        with self.assertRaises(ValueError):
            common.write_json(path, {"a": math.inf})
        self.assertEqual(json.loads(path.read_text(encoding="utf-8")), {"a": 1})
        self.assertEqual(list(self.folder.iterdir()), [path])

    def test_result_renders(self):
        rows = [{"method": "ours", "AUC": mean_interval([0.98, 0.99, 0.985])}]
        common.write_result("auc", "AUC", rows, notes="One note.", environment={"cpu": "X"}, folder=self.folder)
        text = render_table(load_results(self.folder)["auc"])
        self.assertIn("| ours | 0.985 [0.973, 0.997] |", text)
        self.assertTrue(text.endswith("One note.\n\n*Measured on X*"))

    def test_result_keeps_its_targets(self):
        targets = [Target("AUC", "at least 0.98", "0.99", True, "2 seeds"), Target("accuracy", "0.9", "", None)]
        common.write_result("auc", "AUC", [{"AUC": 0.99}], targets=targets, environment={}, folder=self.folder)
        found = load_results(self.folder)["auc"]
        self.assertEqual([Target(**target) for target in found["targets"]], targets)
        common.write_result("auc", "AUC", [{"AUC": 0.99}], environment={}, folder=self.folder)
        self.assertEqual(load_results(self.folder)["auc"]["targets"], [])


class TestTarget(unittest.TestCase):
    @parameterized.expand(
        [
            (True, "0.99", "3 seeds", "AUC, at least 0.98: met (0.99; 3 seeds)."),
            (False, "0.97", "", "AUC, at least 0.98: MISSED (0.97)."),
            (None, "", "2 of 3 trainings left", "AUC, at least 0.98: not run (2 of 3 trainings left)."),
            (None, "", "", "AUC, at least 0.98: not run."),
        ]
    )
    def test_sentence(self, met, found, about, sentence):
        target = Target("AUC", "at least 0.98", found, met, about)
        self.assertEqual(target.sentence(), sentence)
        self.assertIn(f": {target.verdict}", sentence)

    @parameterized.expand(
        [
            ("figure", ("", "at least 1", "2", True), ValueError, "words for the figure"),
            ("asked", ("AUC", "", "2", True), ValueError, "words for the figure"),
            ("verdict without finding", ("AUC", "at least 1", "", False), ValueError, "not run"),
            ("finding without verdict", ("AUC", "at least 1", "2", None), ValueError, "not run"),
            ("number", ("AUC", "at least 1", 2.0, True), TypeError, "expected text"),
            ("word for a verdict", ("AUC", "at least 1", "2", "met"), TypeError, "True, False or None"),
            ("numpy's truth", ("AUC", "at least 1", "2", np.bool_(True)), TypeError, "True, False or None"),
        ]
    )
    def test_wrong(self, _, values, error, message):
        with self.assertRaisesRegex(error, f"Target: got .*{message}"):
            Target(*values)

    def test_counted(self):
        self.assertEqual([counted(n, "thread") for n in (0, 1, 2)], ["0 threads", "1 thread", "2 threads"])


class TestEnvironment(TemporaryFolder):
    def test_record_is_json_and_names_no_machine(self):
        record = json.loads(json.dumps(common.environment_record()))
        self.assertEqual(
            set(record), {"cpu", "cores", "threads", "gpu", "system", "python", "versions", "commit", "date"}
        )
        self.assertRegex(record["date"], r"^\d{4}-\d\d-\d\d$")

    def test_commit(self):
        def git(*arguments):
            names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
            subprocess.run(["git", *names, *arguments], cwd=self.folder, check=True, capture_output=True)

        self.assertEqual(common.git_commit(self.folder), "unknown")
        code = self.folder / "monai_jointdiff" / "a.py"
        code.parent.mkdir()
        code.write_text("1")
        git("init")
        git("add", ".")
        git("commit", "-m", "a")
        clean = common.git_commit(self.folder)
        self.assertRegex(clean, r"^[0-9a-f]{12}$")
        (self.folder / "results.json").write_text("{}")  # measuring writes results, which does not change the code
        self.assertEqual(common.git_commit(self.folder), clean)
        code.write_text("2")
        self.assertEqual(common.git_commit(self.folder), clean + "+changes")


if __name__ == "__main__":
    unittest.main()
