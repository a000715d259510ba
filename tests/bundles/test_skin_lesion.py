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

"""The skin lesion bundle from end to end through `monai.bundle`: what it has beside the programs of `chest_xray`."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import unittest
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import torch
from parameterized import parameterized
from PIL import Image

from monai_jointdiff.data import SKIN_CLASSES, ImageSource, ShuffledOrder, SkinPhantoms
from monai_jointdiff.engines import ModelDescription, load_weights
from tests.bundles import runs
from tests.bundles.default_model import BUNDLES
from tests.bundles.runs import ROOT, leave_no_trace, message_of, working_directory

BUNDLE, CHEST = BUNDLES / "skin_lesion", BUNDLES / "chest_xray"
DATA = os.environ.get("JOINTDIFF_DATA")
NEEDS_DATA = "JOINTDIFF_DATA does not say where the real data are"
TRAIN = "bundles/skin_lesion/train.json"
PHANTOMS = {"source#phantom_counts": [150, 60, 60]}  # 144 phantoms are as few as hold every class
TEMPORARY = Path()
TRAINED = Path()  # one epoch on phantoms

# Every place where the programs differ from those of chest_xray; others have the bundle's name in `bundle_root` alone.
DIFFERENCES = {
    "bundle_root",
    "patient_column",
    "epochs",
    "balance",
    "source#in_channels",
    "source#phantoms",
    "source#phantom_counts",
    "source#usual_columns#patient_column",
    "train#random_transforms#flip",
}
PROGRAMS = sorted(
    path.stem for path in (BUNDLE / "configs").glob("*.json") if path.stem not in ("metadata", "default_model")
)


def setUpModule() -> None:
    global TEMPORARY, TRAINED
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()
    TRAINED = TEMPORARY / "trained"
    train(TRAINED, batch_size=32, **PHANTOMS)


def fresh(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=name + "_", dir=TEMPORARY))


def train(directory: Path, **options: Any) -> str:
    return runs.train(directory, config_file=TRAIN, **{"epochs": 1, "num_samples": 0, **options})


def use(program: str, model: Path, output: Path, **options: Any) -> str:
    return runs.use(program, model, output, bundle="skin_lesion", **options)


def parsed(**options: Any) -> monai.bundle.ConfigParser:
    """train.json with options, nothing of it made yet."""
    parser = monai.bundle.ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    with working_directory(ROOT):
        parser.update({**PHANTOMS, **options})
    return parser


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """The entries of a configuration by their full names."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        k: v for key, value in config.items() for k, v in leaves(value, f"{prefix}#{key}" if prefix else key).items()
    }


def save_photographs(folder: Path, count: int = 126) -> Path:
    """JPEG files with a table as HAM10000's: two images of each lesion, classes by name, the last without a label."""
    phantoms = SkinPhantoms(2, (20, 24), 1)
    with open(folder / "labels.csv", "w", encoding="utf-8") as stream:
        stream.write("file,dx,lesion_id\n")
        for n in range(count):
            lesion = n // 2
            label = lesion % 7
            Image.fromarray(phantoms(n, label).image.transpose(1, 2, 0)).save(folder / f"{n:03d}.jpg", quality=90)
            stream.write(f"{n:03d}.jpg,{SKIN_CLASSES[label] if n < count - 2 else ''},HAM_{lesion:07d}\n")
    return folder


class TestPrograms(unittest.TestCase):
    def test_training_describes_what_it_saw(self) -> None:
        described = content(TRAINED / "models" / "model.json")
        self.assertEqual(described["data"]["class_names"], list(SKIN_CLASSES))
        self.assertEqual((described["network"]["in_channels"], described["network"]["out_channels"]), (3, 3))
        self.assertEqual(described["data"]["opened_with"]["phantoms"], "skin")
        self.assertEqual(described["data"]["opened_with"]["patient_column"], "lesion_id")
        self.assertIn("test auc", content(TRAINED / "output" / "summary.json"))

    def test_evaluation_repeats_the_figures_of_the_training(self) -> None:
        output = fresh("evaluate")
        use("evaluate", TRAINED, output)
        for file in ("metrics.json", "predictions.csv"):
            self.assertEqual((output / file).read_text(), (TRAINED / "output" / file).read_text())

    def test_generates_in_color(self) -> None:
        output = fresh("generate")
        use("generate", TRAINED, output, num_samples=2, num_inference_steps=2)
        pictures = [Image.open(path) for path in sorted(output.rglob("*.png"))]
        self.assertEqual(len(pictures), 3)  # two samples and the grid of both
        for picture in pictures:
            self.assertEqual(picture.mode, "RGB")
            self.assertGreater(np.ptp(np.asarray(picture).astype(int), axis=2).max(), 0)

    def test_inference_keeps_color_and_its_order(self) -> None:
        """Against the network on what Pillow reads: a color JPEG, one that is gray, a PNG with transparency."""
        folder, output = fresh("photographs"), fresh("inference")
        pixels = SkinPhantoms(2, 16, 2)(0).image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / "a.jpg")
        Image.fromarray(pixels).convert("L").save(folder / "b.jpg")
        Image.fromarray(pixels).convert("RGBA").save(folder / "c.png")
        use("inference", TRAINED, output, dataset_dir=str(folder))
        description = ModelDescription.load(TRAINED / "models" / "model.json")
        network = description.build_network().eval()
        network.load_state_dict(load_weights(TRAINED / "models" / "model.pt"))
        found = rows(output / "predictions.csv")
        self.assertEqual([row["image"] for row in found], ["a.jpg", "b.jpg", "c.png"])
        for row in found:
            stored = np.asarray(Image.open(folder / row["image"]).convert("RGB"))
            image = torch.from_numpy(stored.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
            with torch.no_grad():
                logits = network(image[None]).double().numpy()
            expected = description.decision.probabilities(logits)[0]
            for name, value in zip(SKIN_CLASSES, expected, strict=True):
                self.assertAlmostEqual(float(row[f"probability_{name}"]), value, places=5)

    def test_counterfactuals_in_color_on_the_pixels_of_the_photograph(self) -> None:
        folder, output = save_photographs(fresh("photographs"), 2), fresh("counterfactual")
        options = {"num_inference_steps": 2, "scale": 1.0, "probability": None, "target": "mel", "limit": None}
        use("counterfactual", TRAINED, output, dataset_dir=str(folder), **options)
        self.assertEqual([row["target"] for row in rows(output / "counterfactuals.csv")], ["mel", "mel"])
        for n in range(2):
            (case,) = output.glob(f"cases/*{n:03d}*")
            for name in ("counterfactual", "reconstruction", "difference"):
                picture = Image.open(case / f"{name}.png")
                self.assertEqual((picture.mode, picture.size), ("RGB", (24, 20)))
            panel = np.asarray(Image.open(case / "panel.png").convert("RGB")).astype(int)
            original = np.asarray(Image.open(folder / f"{n:03d}.jpg")).astype(int)
            middle = tuple(original[10, 12])
            shown = (np.abs(panel - middle).max(axis=2) <= 12).sum()  # the image is shown in its own colors
            self.assertGreater(shown, 20)


class TestClasses(unittest.TestCase):
    def test_weights_make_rare_classes_count_as_much_and_leave_the_draws_as_they_are(self) -> None:
        parser = parsed()
        source = parser.get_parsed_content("source")
        labels = np.array([item["label"] for item in source.part("train")])
        weights = parser.get_parsed_content("loss").class_weights.double().numpy()
        np.testing.assert_allclose(weights * np.bincount(labels, minlength=7), len(labels) / 7, rtol=1e-6)
        self.assertIs(type(parser.get_parsed_content("train#order")), ShuffledOrder)
        self.assertTrue(parser.get_parsed_content("train#random_transforms").flip)

    def test_label_list_leaves_the_others_unlabelled(self) -> None:
        folder = fresh("list")
        source: ImageSource = parsed().get_parsed_content("source")
        by_class = {item["label"]: item["name"] for item in source.part("train")}
        (folder / "all.txt").write_text("\n".join(by_class.values()), encoding="utf-8")
        parser = parsed(label_list=str(folder / "all.txt"))
        labels = [item["label"] for item in parser.get_parsed_content("source").part("train")]
        self.assertEqual(sorted(labels), [-1] * 143 + list(range(7)))
        np.testing.assert_allclose(parser.get_parsed_content("loss").class_weights.numpy(), 1.0)
        (folder / "six.txt").write_text("\n".join(n for k, n in by_class.items() if k != 3), encoding="utf-8")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            parsed(label_list=str(folder / "six.txt")).get_parsed_content("loss")
        message = message_of(caught.exception)
        self.assertRegex(message, "no labelled training image of class 3 of 7 .*--balance none")
        loss = parsed(label_list=str(folder / "six.txt"), balance="none").get_parsed_content("loss")
        self.assertIsNone(loss.class_weights)

    def test_volumes_of_phantoms_are_refused(self) -> None:
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            parsed(spatial_dims=3).get_parsed_content("source")
        self.assertIn("SkinPhantoms: skin is drawn from above", message_of(caught.exception))


class TestPhotographs(unittest.TestCase):
    def test_training_by_a_table(self) -> None:
        folder, model = save_photographs(fresh("photographs")), fresh("model")
        printed = train(model, dataset_dir=str(folder), label_column="dx", image_size=16, balance="none")
        self.assertIn("16 x 16, 3 channels", printed)
        data = content(model / "models" / "model.json")["data"]
        self.assertEqual((data["class_names"], data["in_channels"]), (list(SKIN_CLASSES), 3))
        self.assertNotIn(str(TEMPORARY), (model / "models" / "model.json").read_text())

    def test_no_lesion_is_in_two_parts(self) -> None:
        folder = save_photographs(fresh("photographs"))
        source = parsed(dataset_dir=str(folder), label_column="dx").get_parsed_content("source")
        parts = [{int(item["name"][:3]) // 2 for item in source.part(part)} for part in ("train", "val", "test")]
        self.assertEqual(sum(map(len, parts)), 63)
        self.assertEqual(set.union(*parts), set(range(63)))

    def test_table_without_lesions_is_refused_until_the_column_is_named(self) -> None:
        folder = save_photographs(fresh("photographs"), 42)
        table = (folder / "labels.csv").read_text(encoding="utf-8").replace("lesion_id", "remark")
        (folder / "labels.csv").write_text(table, encoding="utf-8")
        options = {"dataset_dir": str(folder), "label_column": "dx"}
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            parsed(**options).get_parsed_content("source")
        self.assertIn("no column 'lesion_id'; it has file, dx, remark", message_of(caught.exception))
        source = parsed(**options, patient_column="patient").get_parsed_content("source")
        self.assertEqual(sum(len(source.items[part]) for part in ("train", "val", "test")), 42)

    def test_color_is_kept_even_if_the_images_that_are_looked_at_are_gray(self) -> None:
        folder = fresh("photographs")
        for n in range(40):
            pixels = SkinPhantoms(2, 16, 3)(n).image.transpose(1, 2, 0)
            gray = n in np.unique(np.linspace(0, 39, 16).astype(int))  # those which the reader of folders probes
            Image.fromarray(pixels).convert("L" if gray else "RGB").save(folder / f"{n:03d}.png")
        source = parsed(dataset_dir=str(folder), image_size=16, balance="none").get_parsed_content("source")
        image = source.preprocessing()({"image": folder / "001.png", "label": -1, "name": "001.png"})["image"]
        expected = SkinPhantoms(2, 16, 3)(1).image.astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(np.asarray(image), expected, atol=1e-6)


@unittest.skipUnless(DATA, NEEDS_DATA)
class TestRealData(unittest.TestCase):
    def test_ham10000(self) -> None:
        file, model = str(Path(str(DATA)) / "ham10000_28.npz"), fresh("model")
        options = {"image_size": None, "preflight": False, "train#epoch_length": 3}
        few = {"validate#dataset#data": "$@source.part('val')[::10]"}
        printed = train(model, dataset_dir=file, **options, **few)
        counts = "akiec 127, bcc 184, bkl 407, df 42, mel 343, nv 3025, vasc 56"
        self.assertIn(f"train: 4184 images ({counts})", printed)
        self.assertIn("28 x 28, 3 channels", printed)
        self.assertEqual(content(model / "models" / "model.json")["data"]["class_names"], list(SKIN_CLASSES))
        self.assertTrue((model / "models" / "model.pt").is_file())

    def test_photographs_as_they_were_published(self) -> None:
        folder, output = Path(str(DATA)) / "originals" / "ham10000_224", fresh("inference")
        use("inference", TRAINED, output, dataset_dir=str(folder))
        self.assertEqual(len(rows(output / "predictions.csv")), 35)
        source = parsed(dataset_dir=str(folder), patient_column="patient", image_size=32).get_parsed_content("source")
        self.assertEqual((source.class_names, source.in_channels), (list(SKIN_CLASSES), 3))
        source.preflight()


class TestBundleFormat(unittest.TestCase):
    def test_has_the_programs(self) -> None:
        programs = {"train", "multi_gpu_train", "evaluate", "inference", "generate", "counterfactual"}
        self.assertLessEqual(programs, set(PROGRAMS))

    @parameterized.expand(PROGRAMS)
    def test_differs_from_the_chest_bundle_only_where_listed(self, program: str) -> None:
        ours, theirs = (leaves(content(bundle / "configs" / f"{program}.json")) for bundle in (BUNDLE, CHEST))
        found = {key for key in ours.keys() | theirs.keys() if ours.get(key, "missing") != theirs.get(key, "missing")}
        listed = {"train": DIFFERENCES, "train_autoencoder": DIFFERENCES - {"balance"}}
        self.assertEqual(found, listed.get(program, {"bundle_root"} & set(theirs)))
        if "bundle_root" in theirs:
            self.assertEqual(ours["bundle_root"], theirs["bundle_root"].replace("chest_xray", "skin_lesion"))


class TestReadme(unittest.TestCase):
    def test_counts_of_the_classes_are_those_of_the_default_training_part(self) -> None:
        readme = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
        source = parsed(**{"source#phantom_counts": [6000, 0, 0]}).get_parsed_content("source")
        counts = np.bincount([item["label"] for item in source.part("train")], minlength=7)
        for name, count in zip(SKIN_CLASSES, counts, strict=True):
            self.assertRegex(readme, rf"\| `{name}` \|.*\| {count} \|")


if __name__ == "__main__":
    unittest.main()
