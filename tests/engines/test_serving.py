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


"""Trained models and the data they are used on."""

from __future__ import annotations

import contextlib
import io
import unittest
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.data import open_source
from monai_jointdiff.engines import (
    ModelDescription,
    announce_model,
    images_to_classify,
    load_trained,
    noise_items,
    noise_of_draws,
    preprocessing_of_model,
    source_of_model,
    start_model,
)
from monai_jointdiff.visualize import save_png
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import small_network

COUNTS = (6, 4, 4)


def phantom_model(spatial_dims: int = 2, image_size: int = 8) -> ModelDescription:
    source = open_source(spatial_dims=spatial_dims, image_size=image_size, phantom_counts=COUNTS)
    network = small_network(spatial_dims=spatial_dims)
    return ModelDescription(network.config, {}, source.description())


def model_of(class_names: list[str], multi_label: bool = False) -> ModelDescription:
    model = phantom_model()
    return replace(model, data={**model.data, "class_names": class_names, "multi_label": multi_label})


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(np.random.default_rng(seed).integers(0, 256, (9, 6)).astype(np.uint8), path)


class TestLoadTrained(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.network = small_network()

    def test_weights(self) -> None:
        weights = {key: value + 1 for key, value in self.network.state_dict().items()}
        torch.save(weights, self.folder / "model.pt")
        phantom_model().save(self.folder / "model.json")
        self.assertTrue(load_trained(self.network, self.folder))
        torch.testing.assert_close(dict(self.network.state_dict()), weights, rtol=0, atol=0)

    def test_none_says_untrained(self) -> None:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            self.assertFalse(load_trained(self.network, self.folder))
        self.assertIn("the network is UNTRAINED", text.getvalue())

    def test_weights_without_description_or_of_another_network_are_refused(self) -> None:
        torch.save({"a": torch.zeros(1)}, self.folder / "model.pt")
        with self.assertRaisesRegex(ValueError, "model.pt but no model.json"):
            load_trained(self.network, self.folder)
        phantom_model().save(self.folder / "model.json")
        with self.assertRaisesRegex(ValueError, "do not belong together"):
            load_trained(self.network, self.folder)


class TestData(unittest.TestCase):
    @parameterized.expand([(2, 8), (3, 8)])
    def test_source_is_that_of_the_training(self, spatial_dims: int, size: int) -> None:
        model = phantom_model(spatial_dims, size)
        source = source_of_model(model, None, phantom_counts=COUNTS)
        self.assertEqual(source.description(), model.data)
        prepare = preprocessing_of_model(model)
        trained = open_source(spatial_dims=spatial_dims, image_size=size, phantom_counts=COUNTS)
        for item in source.part("test"):
            one, two = prepare(item), trained.preprocessing()(item)
            self.assertEqual(one["name"], two["name"])
            torch.testing.assert_close(one["image"], two["image"], rtol=0, atol=0)

    def test_order_of_classes_is_the_models(self) -> None:
        folder = temporary_folder(self)
        for name in ("apple", "pear"):
            picture(folder / "test" / name / "x.png")
        source = source_of_model(model_of(["pear", "apple"]), str(folder))
        labels = {item["name"]: item["label"] for item in source.part("test")}
        self.assertEqual(labels, {"test/apple/x.png": 1, "test/pear/x.png": 0})

    def test_model_of_several_labels_takes_data_with_one_and_with_none(self) -> None:
        folder = temporary_folder(self)
        for name in ("test/a/x.png", "test/y.png"):
            picture(folder / name)
        source = source_of_model(model_of(["a", "b"], True), str(folder))
        labels = {item["name"]: item["label"] for item in source.part("test")}
        self.assertEqual(labels, {"test/a/x.png": [1.0, 0.0], "test/y.png": [-1.0, -1.0]})

    def test_data_of_another_kind_are_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "phantoms have the classes .*say where other images are"):
            source_of_model(model_of(["a", "b"]), None)
        folder = temporary_folder(self)
        np.savez(folder / "several.npz", test_images=np.zeros((3, 8, 8), np.uint8), test_labels=np.eye(3, dtype=int))
        with self.assertRaisesRegex(ValueError, "gives an image one class, several.npz gives it several labels"):
            source_of_model(phantom_model(), str(folder / "several.npz"))
        with self.assertRaisesRegex(ValueError, "there is no .*nowhere"):
            source_of_model(phantom_model(), "nowhere")


class TestPartsOfTheModel(unittest.TestCase):
    def test_are_those_of_the_training(self) -> None:
        folder = temporary_folder(self)
        images = np.random.default_rng(0).integers(0, 255, (40, 8, 8)).astype(np.uint8)
        np.savez(folder / "x.npz", train_images=images, train_labels=np.arange(40) % 2)
        trained = open_source(str(folder / "x.npz"), seed=5)
        model = replace(phantom_model(), data=trained.description())
        for part in ("train", "val", "test"):
            names = [item["name"] for item in trained.part(part)]
            found = source_of_model(model, str(folder / "x.npz"), label_column=None)
            self.assertEqual([item["name"] for item in found.part(part)], names)
        other = source_of_model(model, str(folder / "x.npz"), seed=6)
        self.assertNotEqual([item["name"] for item in other.part("test")], names)


class TestImagesToClassify(unittest.TestCase):
    def test_folder_and_file(self) -> None:
        folder = temporary_folder(self)
        for name in ("b.png", "in/a.png", ".hidden/c.png"):
            picture(folder / name)
        (folder / "notes.txt").write_text("no image", encoding="utf-8")
        items = images_to_classify(str(folder), phantom_model())
        expected: list[dict[str, Any]] = [
            {"image": folder / name, "label": -1, "name": name} for name in ("b.png", "in/a.png")
        ]
        self.assertEqual(items, expected)
        self.assertEqual(images_to_classify(str(folder / "in" / "a.png"), phantom_model())[0]["name"], "a.png")
        several = images_to_classify(str(folder), model_of(["a", "b"], True))
        self.assertEqual(several[0]["label"], [-1.0, -1.0])

    def test_items_pass_the_preprocessing(self) -> None:
        folder = temporary_folder(self)
        picture(folder / "b.png")
        model = phantom_model()
        (item,) = images_to_classify(str(folder), model)
        prepared = preprocessing_of_model(model)(item)
        self.assertEqual(prepared["image"].shape, model.image_shape)
        self.assertEqual(int(prepared["label"]), -1)

    def test_phantoms_and_npz_give_their_test_part(self) -> None:
        self.assertEqual(images_to_classify(None, phantom_model()), open_source(phantom_counts=COUNTS).part("test"))
        folder = temporary_folder(self)
        images = np.zeros((5, 8, 8), np.uint8)
        np.savez(folder / "x.npz", train_images=images, test_images=images[:2])
        for model in (phantom_model(), model_of(["a", "b"], True)):
            items = images_to_classify(str(folder / "x.npz"), model)
            self.assertEqual([item["name"] for item in items], ["test/000000", "test/000001"])

    def test_nothing_to_classify_is_refused(self) -> None:
        folder = temporary_folder(self)
        with self.assertRaisesRegex(ValueError, "holds no images"):
            images_to_classify(str(folder), phantom_model())
        with self.assertRaisesRegex(ValueError, "there is no"):
            images_to_classify(str(folder / "nowhere"), phantom_model())


class TestNoiseItems(unittest.TestCase):
    def test_are_the_numbered_noise(self) -> None:
        items = noise_items(3, (1, 4, 4), seed=2)
        self.assertEqual([item["name"] for item in items], ["sample_00000", "sample_00001", "sample_00002"])
        together = torch.stack([item["image"] for item in items])
        torch.testing.assert_close(together, noise_of_draws(range(3), (1, 4, 4), 2), rtol=0, atol=0)
        with self.assertRaisesRegex(ValueError, "must be at least 1, got 0"):
            noise_items(0, (1, 4, 4), 0)


class TestAnnounce(unittest.TestCase):
    @parameterized.expand([(True, "(trained;"), (False, "(UNTRAINED;")])
    def test_says_what_is_used(self, trained: bool, state: str) -> None:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            folder = temporary_folder(self)
            if trained:
                (folder / "model.pt").touch()
            announce_model(phantom_model(), "my_images", range(3), folder, "a/output")
        parts = ("my_images, 3 images", f"model: {folder}", state, "8 x 8", "normal, opacity, effusion")
        for part in (*parts, "results: a/output"):
            self.assertIn(part, text.getvalue())


class TestStartModel(unittest.TestCase):
    def test_removes_old_weights_unless_resumed(self) -> None:
        folder = temporary_folder(self)
        for resume, stays in (("checkpoint.pt", True), (None, False)):
            (folder / "model.pt").touch()
            start_model(phantom_model(), folder, resume)
            self.assertEqual((folder / "model.pt").exists(), stays)
            self.assertEqual(ModelDescription.load(folder / "model.json"), phantom_model())


if __name__ == "__main__":
    unittest.main()
