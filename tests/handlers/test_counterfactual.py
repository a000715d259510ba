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


"""Counterfactuals become files at the place of their originals, a table and a page; and pictures during training."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import unittest
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch
from ignite.engine import Engine
from monai.utils import optional_import
from parameterized import parameterized
from torch import nn

from monai_jointdiff.data import ImagePreprocessing, read_image
from monai_jointdiff.handlers import CounterfactualImages, CounterfactualWriter, read_counterfactual_records
from monai_jointdiff.inferers import CounterfactualInferer, CounterfactualResult
from monai_jointdiff.metrics import counterfactual_figures
from monai_jointdiff.schedulers import make_scheduler
from monai_jointdiff.visualize import CounterfactualCase, counterfactual_panel, save_png
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import small_network, use_one_thread
from tests.visualize.counterfactuals import known_result
from tests.visualize.test_report import check_self_contained

SummaryWriter, _ = optional_import("torch.utils.tensorboard", name="SummaryWriter")
event_accumulator, has_tensorboard = optional_import("tensorboard.backend.event_processing.event_accumulator")

NAMES = ["normal", "effusion"]


def setUpModule() -> None:
    use_one_thread()


PANEL = "monai_jointdiff.handlers.counterfactual.counterfactual_panel"
TARGET_FILES = ("counterfactual.png", "difference.png", "record.json")


def blank(cases: Any, channel_names: Any) -> np.ndarray:
    """In the place of the real panel, which takes its time."""
    return np.zeros((2, 2, 3), np.uint8)


def write(
    output: Path,
    result: CounterfactualResult | tuple[CounterfactualResult, ...],
    names: list[str],
    *,
    repeat: int = 1,
    more: Any = None,
    panel: Any = blank,
    **options: Any,
) -> CounterfactualWriter:
    """Run an engine that makes this result, as the evaluator does."""
    engine = Engine(lambda engine, batch: {"pred": result})
    writer = CounterfactualWriter(output, **{"class_names": NAMES, **options})
    writer.attach(engine)
    with mock.patch(PANEL, panel):
        engine.run([{"name": names, **(more or {})}], max_epochs=repeat)
    return writer


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class TestFiles(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def test_every_file_of_a_case(self) -> None:
        region = np.zeros((2, 1, 16, 16), dtype=bool)
        region[:, :, 4:8] = True
        result = known_result(images(2, 1, 16, 16), 0.2, region=region)
        write(self.folder, result, ["test/000001", "test/000002"])
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"index.html", "counterfactuals.csv", "cases"})
        pictures = {f"{name}.png" for name in ("panel", "counterfactual", "reconstruction", "difference", "region")}
        for name in ("test__000001", "test__000002"):
            found = {path.name for path in (self.folder / "cases" / name).iterdir()}
            self.assertEqual(found, pictures | {"record.json"})
        (self.folder / "cases" / "test__000001" / "note.txt").touch()
        write(self.folder, known_result(images(1, 1, 16, 16), 0.2), ["test/000001"])  # nothing stale, nothing lost
        found = {path.name for path in (self.folder / "cases" / "test__000001").iterdir()}
        self.assertEqual(found, pictures - {"region.png"} | {"record.json", "note.txt"})

    def test_pixels_of_an_array(self) -> None:
        result = known_result(images(1, 1, 16, 12) * 0.5, images(1, 1, 16, 12) * 0.4)
        write(self.folder, result, ["a"], panel=counterfactual_panel)
        case = self.folder / "cases" / "a"
        for name, values in {
            "counterfactual": (result.counterfactual + 1) * 127.5,
            "reconstruction": (result.reconstruction + 1) * 127.5,
            "difference": (result.difference / 2 + 1) * 127.5,
        }.items():
            found = read_image(case / f"{name}.png").astype(float)
            np.testing.assert_allclose(found, values[0].numpy(), atol=0.51, err_msg=name)
        expected = counterfactual_panel(CounterfactualCase.of(result, 0, NAMES, name="a"))
        np.testing.assert_array_equal(read_image(case / "panel.png"), np.moveaxis(expected, -1, 0))

    def test_picture_comes_back_to_the_pixels_of_its_file(self) -> None:
        """A bright rectangle goes through the preprocessing; where it vanishes is where it was, rows are rows."""
        pixels = np.full((24, 50), 40, np.uint8)
        pixels[4:10, 30:44] = 200
        path = self.folder / "images" / "wide.png"
        save_png(pixels, path)
        image = ImagePreprocessing(2, 25, 1)(path)[None]
        change = torch.where(image > 0, -(image - image.median()), 0.0)
        change[:, :, :6] = 0.7  # in the padding: must not come back
        result = known_result(image.numpy(), change.numpy())
        write(self.folder, result, ["wide.png"], items=[{"image": path, "name": "wide.png"}])
        difference = read_image(self.folder / "cases" / "wide" / "difference.png")[0].astype(int) - 128
        self.assertEqual(difference.shape, pixels.shape)
        self.assertLess(difference[5:9, 32:42].max(), -60)
        outside = difference.copy()
        outside[2:12, 28:46] = 0
        self.assertLess(np.abs(outside).max(), 3)

    def test_volume_has_the_axes_and_the_place_of_its_file(self) -> None:
        path = self.folder / "volume.nii.gz"
        affine = np.array([[0, 0, -2.0, 7], [3, 0, 0, 8], [0, 1.5, 0, 9], [0, 0, 0, 1]])  # axes: front, head, left
        array = np.zeros((8, 16, 12), np.float32)
        array[1:3, 10:14, 2:5] = 1
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
        image = ImagePreprocessing(3, 24, 1, {"float_range": [0, 1]})(path)[None].numpy()
        result = known_result(image, np.where(image > 0, -1.0, 0.0))
        write(self.folder, result, ["volume.nii.gz"], items=[{"image": path, "name": "volume.nii.gz"}])
        case = self.folder / "cases" / "volume"
        for name in ("counterfactual", "reconstruction", "difference"):
            written = nibabel.load(case / f"{name}.nii.gz")
            np.testing.assert_allclose(written.affine, affine)
            self.assertEqual((written.shape, written.get_data_dtype()), (array.shape, np.float32))
        difference = np.asanyarray(nibabel.load(case / "difference.nii.gz").dataobj)
        self.assertLess(float(difference[array > 0].mean()), -0.7)
        self.assertGreater(float(difference[array == 0].mean()), -0.05)

    def test_volumes_without_a_file_are_nifti_and_colors_and_channels_are_pictures(self) -> None:
        for number, (shape, expected) in enumerate(
            {
                (1, 4, 8, 6): {"difference.nii.gz"},
                (3, 8, 6): {"difference.png"},
                (2, 8, 6): {"difference_channel0.png", "difference_channel1.png"},
            }.items()
        ):
            output = self.folder / str(number)
            result, names = known_result(images(1, *shape), 0.1), ["FLAIR", "T1c"] if shape[0] == 2 else None
            write(output, result, ["a"], items=[{"image": 7, "name": "a"}], channel_names=names)
            page = check_self_contained(self, (output / "index.html").read_text(encoding="utf-8"))
            self.assertEqual("from top to bottom: FLAIR, T1c." in page.text, shape[0] == 2)
            found = {path.name for path in (output / "cases" / "a").iterdir() if path.name.startswith("difference")}
            self.assertEqual(found, expected)

    def test_names_neither_collide_nor_escape(self) -> None:
        names = ["a/b.png", "a__b.png", "a/b.jpg", "A/B.nii.gz", "../../up.png", "/root.png", "..", "", "x" * 300]
        names += ["con?.png", "line\nbreak", "\u00e4.png", "C:\\windows.png", "."]
        write(self.folder / "out", known_result(images(len(names), 1, 8, 8), 0.1), names)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["out"])
        folders = list((self.folder / "out" / "cases").iterdir())
        self.assertEqual(len({path.name.casefold() for path in folders}), len(names))
        for path in folders:
            self.assertRegex(path.name, r"^\w[\w-]{0,90}$")
        found = {json.loads((path / "record.json").read_text(encoding="utf-8"))["name"] for path in folders}
        self.assertEqual(found, set(names))

    def test_nothing_is_left_half_written(self) -> None:
        with mock.patch("os.replace", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            write(self.folder, known_result(images(1, 1, 8, 8), 0.1), ["a"])
        self.assertEqual([path for path in self.folder.rglob("*") if path.is_file()], [])


class TestTableAndPage(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def test_a_row_for_each_case(self) -> None:
        result = known_result(
            images(2, 1, 8, 8), 0.25, [[0.9, 0.1], [0.3, 0.7]], [[0.2, 0.8], [0.6, 0.4]], [[0.85, 0.15]], target=[1, 0]
        )
        write(self.folder, result, ["a.png", "b.png"], more={"label": torch.tensor([0, -1])})
        one, two = rows(self.folder / "counterfactuals.csv")
        words = {"image": "a.png", "label": "normal", "prediction": "normal", "target": "effusion"}
        words |= {"reached": "True", "already": "False"}
        self.assertEqual({key: one[key] for key in words}, words)
        self.assertEqual((two["label"], two["prediction"], two["target"]), ("", "effusion", "normal"))
        numbers = {
            "probability_normal_image": 0.3,
            "probability_effusion_image": 0.7,
            "probability_effusion_reconstruction": 0.15,
            "probability_effusion_counterfactual": 0.4,
            "l1_input": 0.26,
            "l1_reconstruction": 0.25,
            "l1_encoding": 0.01,
            "scale": 11.0,
            "network_calls": 120.0,
            "seconds": 3.0,
        }
        for key, value in numbers.items():
            self.assertAlmostEqual(float(two[key]), value, places=5, msg=key)

    def test_what_the_rule_of_the_model_calls_them(self) -> None:
        result = known_result(images(2, 1, 8, 8), 0.25, [[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.1, 0.9]])
        write(self.folder, result, ["a.png", "b.png"])
        self.assertEqual([row["decision"] for row in rows(self.folder / "counterfactuals.csv")], ["", ""])
        write(self.folder, result, ["a.png", "b.png"], decide=lambda p: (p[:, 1] >= 0.3).long())
        found = rows(self.folder / "counterfactuals.csv")
        self.assertEqual([row["decision"] for row in found], ["normal", "effusion"])
        self.assertEqual([row["decision_counterfactual"] for row in found], ["effusion", "effusion"])
        page = (self.folder / "index.html").read_text(encoding="utf-8")
        self.assertEqual(page.count("By its own threshold the model calls the image effusion, not normal."), 1)

    def test_page_shows_all_cases_and_no_place_on_this_machine(self) -> None:
        path = self.folder / "in" / "<a>.png"
        save_png(np.zeros((8, 8), np.uint8), path)
        result = known_result(images(1, 1, 8, 8), 0.2)
        writer = write(self.folder, result, ["<a>.png"], repeat=2, items=[{"image": path, "name": "<a>.png"}])
        self.assertEqual(len(writer.cases), 1)
        page = check_self_contained(self, (self.folder / "index.html").read_text(encoding="utf-8"))
        self.assertEqual(len(page.all("img")), 4)
        for part in (
            "<a>.png",
            "Rule: classifier",
            "Encoding: inversion, at most 2 network calls a step,",
            "timestep 300",
        ):
            self.assertIn(part, page.text)
        for file in self.folder.rglob("*"):
            if file.is_file():
                self.assertNotIn(str(self.folder).encode(), file.read_bytes(), file.name)

    def test_several_labels_and_masks(self) -> None:
        mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
        mask[..., 2:4, 2:4] = True
        result = known_result(images(1, 1, 8, 8), 0.2, enforce=False)
        for label, expected in (
            ([1.0, 1.0], "normal, effusion"),
            ([0.0, 0.0], "none"),
            ([-1.0, -1.0], None),
            ([1.0, -1.0], "normal"),
            ([0.0, -1.0], None),  # the other one may be there
        ):
            more = {"label": torch.tensor([label]), "mask": mask}
            writer = write(self.folder, result, ["a"], multi_label=True, more=more)
            self.assertEqual(writer.cases[0][0].label, expected)
            self.assertTrue(writer.cases[0][0].tiles.has_finding)
            self.assertEqual(writer.cases[0][0].wanted, "effusion: no")

    def test_added_noise_calls_no_network(self) -> None:
        result = known_result(images(1, 1, 8, 8), 0.2)
        write(self.folder, replace(result, record=replace(result.record, encoding="noise")), ["a"])
        page = (self.folder / "index.html").read_text(encoding="utf-8")
        self.assertIn("Encoding: noise, up to timestep 300", page)


class TestTargets(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def results(self) -> tuple[CounterfactualResult, CounterfactualResult]:
        image, p = images(2, 1, 8, 8), [[0.7, 0.2, 0.1]]
        one, two = (known_result(image, change, p, p, target=k) for k, change in ((1, 0.2), (2, -0.3)))
        return one, two

    def test_files_of_each_target(self) -> None:
        names = ["normal", "Op/acity", "op_acity"]
        write(self.folder, self.results(), ["a.png", "b.png"], class_names=names)
        found = rows(self.folder / "counterfactuals.csv")
        self.assertEqual([row["image"] for row in found], ["a.png", "a.png", "b.png", "b.png"])
        self.assertEqual([row["target"] for row in found], ["Op/acity", "op_acity"] * 2)
        case = self.folder / "cases" / "a"
        self.assertEqual(
            {path.relative_to(case).as_posix() for path in case.rglob("*.*")},
            {"panel.png", "reconstruction.png"}
            | {f"to_{name}/{file}" for name in ("Op_acity", "op_acity-2") for file in TARGET_FILES},
        )
        record = json.loads((case / "to_op_acity-2" / "record.json").read_text(encoding="utf-8"))
        self.assertEqual((record["target"], record["name"], record["batch"]), (2, "a.png", ["a.png", "b.png"]))
        shown = read_image(case / "to_op_acity-2" / "difference.png")[0].astype(float)
        np.testing.assert_allclose(shown, (-0.15 + 1) * 127.5, atol=0.51)
        page = check_self_contained(self, (self.folder / "index.html").read_text(encoding="utf-8"))
        self.assertEqual(len(page.all("img")), 2 * 6)

    def test_nothing_of_an_earlier_run_with_other_targets_is_left(self) -> None:
        names = ["normal", "opacity", "effusion"]
        write(self.folder, self.results(), ["a", "b"], class_names=names)
        write(self.folder, self.results()[0], ["a", "b"], class_names=names)
        found = {path.name for path in (self.folder / "cases" / "a").rglob("*.*")}
        self.assertEqual(found, {"panel.png", "reconstruction.png", *TARGET_FILES})
        self.assertEqual(list(self.folder.glob("cases/a/*/*")), [])
        write(self.folder, self.results(), ["a", "b"], class_names=names)
        self.assertFalse((self.folder / "cases" / "a" / "record.json").exists())


def judge(images: torch.Tensor) -> torch.Tensor:
    """Class 1 by the mean of the image."""
    p = torch.sigmoid(10 * images.flatten(1).mean(1))
    return torch.stack([1 - p, p], 1)


class TestFigures(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def test_are_those_of_all_batches_together(self) -> None:
        image = images(3, 1, 8, 8) / 9 - 0.3
        parts = [known_result(image[:2], 0.8), known_result(image[2:], 0.1)]
        masks = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
        masks[..., :3] = True
        batches = [{"name": ["a", "b"], "mask": masks[:2]}, {"name": ["c"], "mask": masks[2:]}]
        engine = Engine(lambda engine, batch: {"pred": parts[engine.state.iteration - 1]})
        oracle = mock.Mock(side_effect=judge)
        writer = CounterfactualWriter(self.folder, NAMES, judge=judge, oracle=oracle, oracle_id="sha256:0")
        writer.attach(engine)
        with mock.patch(PANEL, blank):
            engine.run(batches)
        written = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        whole = known_result(image, np.array([0.8, 0.8, 0.1]).reshape(3, 1, 1, 1))
        stages = (whole.image, whole.reconstruction, whole.counterfactual)
        expected = counterfactual_figures(*stages, 1, classify=judge, oracle=judge, masks=masks, class_names=NAMES)
        self.assertEqual(written, {"oracle_id": "sha256:0", **json.loads(json.dumps(expected.as_dict()))})
        self.assertAlmostEqual(written["oracle"]["flips"]["overall"]["rate"]["value"], 2 / 3)
        self.assertGreater(oracle.call_count, 0)
        page = check_self_contained(self, (self.folder / "index.html").read_text(encoding="utf-8"))
        self.assertIn("by the oracle: effusion", page.text)

    def test_targets_of_an_image_are_drawn_together(self) -> None:
        result = known_result(images(2, 1, 8, 8) / 9 - 0.3, 0.8)
        write(self.folder, (result, result), ["a", "b"], judge=judge)
        written = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        self.assertEqual((written["count"], written["settings"]["drawn"]), (4, "groups"))
        self.assertIsNone(written["localization"])
        self.assertIsNone(written["oracle"])

    def test_slices_of_a_patient_are_drawn_together(self) -> None:
        count = 40
        result = known_result(images(count, 1, 8, 8) / 9 - np.linspace(0.1, 0.5, count).reshape(-1, 1, 1, 1), 0.8)
        names = [f"scan{n // 4}.nii.gz#slice_{n % 4:03d}" for n in range(count)]
        stages = (result.image, result.reconstruction, result.counterfactual)
        for patients in (10, 1):
            keys = [f"p{n * patients // count}" for n in range(count)]
            write(self.folder, result, names, judge=judge, more={"patient": keys})
            written = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            expected = counterfactual_figures(*stages, 1, classify=judge, class_names=NAMES, groups=keys)
            self.assertEqual(written, {"oracle_id": None, **json.loads(json.dumps(expected.as_dict()))})
            self.assertEqual(written["settings"]["units"], patients)
            self.assertEqual(written["to_input"]["l1"]["low"] is not None, patients == 10)
        self.assertEqual(written["model"]["flips"]["overall"]["rate"]["value"], 1)
        self.assertLess(written["model"]["flips"]["overall"]["rate"]["low"], 0.3)  # one patient flipped
        page = check_self_contained(self, (self.folder / "index.html").read_text(encoding="utf-8"))
        self.assertIn("over 1 groups of counterfactuals", page.text)
        write(self.folder, (result, result), names, judge=judge, more={"patient": [""] * count})
        written = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        self.assertEqual(written["settings"]["units"], count)  # of unknown patients each image stands for itself

    def test_images_that_may_have_trained_the_model_are_said_to(self) -> None:
        result = known_result(images(1, 1, 8, 8) / 9 - 0.3, 0.8)
        for known in ({}, {"not_held_out": "they may have trained the model"}):
            write(self.folder, result, ["a"], judge=judge, items=[{"image": 0, "name": "a", **known}])
            written = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            page = (self.folder / "index.html").read_text(encoding="utf-8")
            for text in (written["settings"].get("images", ""), page):
                self.assertEqual("may have trained the model" in text, bool(known))

    def test_the_table_outlives_figures_that_fail(self) -> None:
        sizes = []

        def tired(images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            raise RuntimeError("out of memory")

        with self.assertRaisesRegex(RuntimeError, "out of memory"):
            write(self.folder, known_result(images(3, 1, 8, 8), 0.2), ["a", "b", "c"], judge=tired, batch_size=2)
        self.assertEqual(len(rows(self.folder / "counterfactuals.csv")), 3)
        self.assertLessEqual(max(sizes), 2)

    def test_an_oracle_without_a_judge(self) -> None:
        with self.assertRaisesRegex(ValueError, "an oracle stands beside a judge, the model itself; got none"):
            CounterfactualWriter(self.folder, NAMES, oracle=judge)


class TestRecords(unittest.TestCase):
    @parameterized.expand([("everywhere", None, "inversion"), ("region", 0.3, "noise")])
    def test_a_written_record_is_replayed_bit_for_bit(self, _: str, fraction: float | None, encoding: str) -> None:
        folder = temporary_folder(self)
        network = small_network().eval()
        inferer = CounterfactualInferer(
            make_scheduler("ddim"),
            encoding=encoding,
            num_inference_steps=3,
            scale=50.0,
            probability=None,
            region_fraction=fraction,
        )
        inputs = torch.from_numpy(images(2, 1, 8, 8))
        result = inferer(inputs, network, target=[1, 2], seed=[2**40 + 1, 5])
        write(folder, result, ["a", "b"], class_names=["x", "y", "z"])
        record = read_counterfactual_records([folder / "cases" / name / "record.json" for name in "ab"])
        again = inferer.replay(inputs, network, record)
        torch.testing.assert_close(again.counterfactual, result.counterfactual, rtol=0, atol=0)
        self.assertGreater(float(result.difference.abs().max()), 0)
        self.assertEqual((record.target, record.seeds), ((1, 2), (2**40 + 1, 5)))
        if fraction is not None:
            torch.testing.assert_close(record.region, result.record.region)

    def test_records_of_different_runs_are_refused(self) -> None:
        folder = temporary_folder(self)
        write(folder / "one", known_result(images(1, 1, 8, 8), 0.1), ["a"])
        region = np.ones((1, 1, 8, 8), dtype=bool)
        write(folder / "two", known_result(images(1, 1, 8, 8), 0.1, region=region), ["a"])
        files = [folder / name / "cases" / "a" / "record.json" for name in ("one", "two")]
        with self.assertRaisesRegex(ValueError, "records that differ in confined"):
            read_counterfactual_records(files)
        with self.assertRaisesRegex(ValueError, "records of at least one image expected"):
            read_counterfactual_records([])


def items(labels: list[Any]) -> list[dict[str, Any]]:
    return [
        {"image": torch.full((1, 8, 8), n / 10 - 0.5), "label": torch.tensor(label), "name": str(n)}
        for n, label in enumerate(labels)
    ]


class TestCounterfactualImages(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def run_epochs(self, epochs: int, labels: list[Any], num_classes: int = 3, **options: Any) -> list[Any]:
        """What the inferer was asked."""
        asked: list[Any] = []
        names = list("abcdef"[:num_classes])

        def inferer(inputs: torch.Tensor, network: nn.Module, *question: Any) -> CounterfactualResult:
            asked.append((inputs.clone(), *question))
            even = [[1 / num_classes] * num_classes]
            return known_result(inputs.numpy(), 0.1 * len(asked), even, even)

        handler = CounterfactualImages(
            inferer,  # type: ignore[arg-type]
            items(labels),
            nn.Linear(1, 1),
            self.folder / "pictures",
            names,
            **options,
        )
        engine = Engine(lambda engine, batch: None)
        handler.attach(engine)
        engine.run([0], max_epochs=epochs)
        return asked

    def test_same_images_every_time_of_all_classes_in_turn(self) -> None:
        asked = self.run_epochs(5, [0, 0, 0, 2, 1, 1, 2], num_images=4, interval=2)
        self.assertEqual(len(asked), 2)
        for inputs, *question in asked:
            found = (inputs[:, 0, 0, 0] * 10 + 5).round().int().tolist()
            self.assertEqual((found, question), ([0, 4, 3, 1], []))  # the first of each class, then the second
        files = sorted(path.name for path in (self.folder / "pictures").iterdir())
        self.assertEqual(files, ["counterfactuals_epoch0002.png", "counterfactuals_epoch0004.png"])
        pictures = [read_image(self.folder / "pictures" / name) for name in files]
        self.assertEqual(pictures[0].shape[0], 3)
        self.assertTrue((pictures[0] != pictures[1]).any())

    def test_several_labels_are_asked_for_in_turn(self) -> None:
        ((inputs, target, enforce),) = self.run_epochs(
            1, [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], num_classes=2, num_images=8, multi_label=True
        )
        self.assertEqual((len(inputs), target, enforce), (3, [0, 1, 0], None))

    @unittest.skipUnless(has_tensorboard, "needs tensorboard")
    def test_tensorboard(self) -> None:
        with SummaryWriter(str(self.folder / "logs")) as writer:
            self.run_epochs(2, [0, 1], summary_writer=writer)
        events = event_accumulator.EventAccumulator(str(self.folder / "logs"))
        events.Reload()
        self.assertEqual([event.step for event in events.Images("counterfactuals")], [1, 2])

    def test_only_rank_0(self) -> None:
        with mock.patch("monai_jointdiff.handlers.counterfactual.is_writing_process", return_value=False):
            self.assertEqual(self.run_epochs(1, [0, 1]), [])
        self.assertFalse((self.folder / "pictures").exists())

    @parameterized.expand([(2,), (3,)])
    def test_a_real_network_keeps_its_mode_weights_and_random_numbers(self, spatial_dims: int) -> None:
        network = small_network(spatial_dims=spatial_dims).train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        data = [{"image": torch.from_numpy(images(1, *[8] * spatial_dims)), "label": torch.tensor(0)}] * 2
        inferer = CounterfactualInferer(make_scheduler("ddim"), num_inference_steps=2, probability=None)
        handler = CounterfactualImages(inferer, data, network, self.folder, ["a", "b", "c"])
        state = torch.get_rng_state()
        first, again = handler.picture(), handler.picture()
        np.testing.assert_array_equal(first, again)
        torch.testing.assert_close(torch.get_rng_state(), state)
        self.assertTrue(network.training)
        torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
        self.assertTrue(all(parameter.grad is None for parameter in network.parameters()))

    def test_wrong_input(self) -> None:
        for options in ({"num_images": 0}, {"interval": 0}):
            with self.assertRaisesRegex(ValueError, "at least one image and an interval"):
                CounterfactualImages(mock.Mock(), [], nn.Identity(), os.devnull, NAMES, **options)


if __name__ == "__main__":
    unittest.main()
