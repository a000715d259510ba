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
import json
import pickle
import unittest
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.data import ImageSource, open_source, open_with_few_labels
from monai_jointdiff.engines import (
    ModelDescription,
    announce_model,
    division_of,
    images_to_classify,
    images_to_decide,
    load_trained,
    noise_items,
    noise_of_draws,
    part_in_words,
    preprocessing_of_model,
    require_trained,
    source_of_model,
    start_model,
)
from monai_jointdiff.engines.serving import MAY_HAVE_TRAINED
from monai_jointdiff.transforms import N4BiasFieldCorrection
from monai_jointdiff.visualize import save_png
from tests.bundles.runs import temporary_folder
from tests.data.test_reading import has_pydicom, pixels, save_series
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


class TestTrained(unittest.TestCase):
    def test_untrained_is_refused_unless_allowed(self) -> None:
        folder = temporary_folder(self)
        for refused in (False, "false", "yes"):
            with self.assertRaisesRegex(ValueError, "answers of an untrained network mean nothing. Train first"):
                require_trained(folder, refused)
        with self.assertRaisesRegex(ValueError, r"Train first \(another program\)"):
            require_trained(folder, program="another program")
        for allowed in (True, "true"):
            require_trained(folder, allowed)
        (folder / "model.pt").touch()
        require_trained(folder)


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


class TestColumnsOfAModel(unittest.TestCase):
    def test_those_of_the_training_do_not_matter_where_there_are_none_and_others_are_refused(self) -> None:
        folder = temporary_folder(self)
        np.savez(folder / "x.npz", images=np.zeros((50, 8, 8), np.uint8))
        model = phantom_model()
        opened_with = {**model.data["opened_with"], "patient_column": "lesion_id", "label_column": ["p", "q"]}
        model = replace(model, data={**model.data, "opened_with": opened_with})
        for options in ({}, {"patient_column": "lesion_id", "label_column": "p,q"}, {"patient_column": "patient"}):
            self.assertEqual(len(source_of_model(model, str(folder / "x.npz"), **options).part("all")), 50)
        with self.assertRaisesRegex(ValueError, "--patient_column pid cannot be used: x.npz has arrays"):
            source_of_model(model, str(folder / "x.npz"), patient_column="pid")


class TestPartInWords(unittest.TestCase):
    def test_how_much_of_the_data_it_is(self) -> None:
        folder = temporary_folder(self)
        np.savez(folder / "x.npz", images=np.zeros((50, 8, 8), np.uint8))
        drawn, stored = open_source(str(folder / "x.npz")), open_source(image_size=8, phantom_counts=COUNTS)
        count = len(drawn.part("test"))
        self.assertLess(count, 25)
        model = replace(phantom_model(), division=division_of(drawn))
        expected = f"the test part, drawn by the seed as for training: {count} of 50 images (of data"
        self.assertIn(expected, part_in_words(drawn, "test", model))
        self.assertIn("--part all", part_in_words(drawn, "test", model))
        self.assertEqual(part_in_words(drawn, "all", model), "taken: all 50 images")
        self.assertIn("the val part: 4 of 14 images", part_in_words(stored, "val", model))
        with self.assertRaisesRegex(ValueError, "'tset' is no part"):
            part_in_words(stored, "tset", model)
        older = phantom_model()
        self.assertIsNone(older.division)
        expected = f"the test part, drawn by the seed (whether as for training is not recorded): {count} of 50 images"
        self.assertIn(expected, part_in_words(drawn, "test", older))


class TestDrawnPartsOfChangedData(unittest.TestCase):
    """Of ten apples and ten pears in folders a model is trained; then something changes."""

    def setUp(self) -> None:
        self.folder = temporary_folder(self) / "fruit"
        for n in range(20):
            picture(self.folder / ("pear" if n % 2 else "apple") / f"{n:02d}.png", n)
        trained = open_source(self.folder, image_size=8)
        self.model = replace(phantom_model(), data=trained.description(), division=division_of(trained))
        self.trained = {str(item["name"]) for item in trained.part("train")}

    def refused(self, **options: Any) -> ImageSource:
        source = source_of_model(self.model, str(self.folder), **options)
        for part in ("train", "val", "test"):
            with self.assertRaisesRegex(
                ValueError, rf"fruit does not say which images are its {part} part.*--part all"
            ):
                part_in_words(source, part, self.model)
            with self.assertRaisesRegex(ValueError, "a part drawn by the seed could hold training images"):
                images_to_decide(str(self.folder), self.model, part, **options)
        count = len(source.part("all"))
        self.assertEqual(part_in_words(source, "all", self.model), f"taken: all {count} images")
        self.assertEqual(len(images_to_decide(str(self.folder), self.model, "all", **options).items), count)
        return source

    def test_unchanged(self) -> None:
        source = source_of_model(self.model, str(self.folder))
        self.assertEqual({str(item["name"]) for item in source.part("train")}, self.trained)
        self.assertIn("drawn by the seed as for training: 4 of 20 images", part_in_words(source, "test", self.model))
        moved = self.folder.rename(self.folder.with_name("moved"))
        self.assertIn("as for training", str(images_to_decide(str(moved), self.model)))

    def test_one_more_image(self) -> None:
        picture(self.folder / "apple" / "20.png", 20)
        source = self.refused()
        self.assertTrue(self.trained & {str(item["name"]) for item in source.part("test")})  # the harm

    def test_a_corrected_label(self) -> None:
        (self.folder / "apple" / "00.png").rename(self.folder / "pear" / "00.png")
        self.refused()

    def test_another_seed(self) -> None:
        self.refused(seed=1)

    def test_data_that_say_it_themselves(self) -> None:
        parts = {"train": "apple", "val": "pear", "test": "apple"}
        other = self.folder.parent / "other"
        for number, (part, name) in enumerate(parts.items()):
            picture(other / part / name / f"{number}.png", number)
        source = source_of_model(self.model, str(other))
        for part in parts:
            self.assertIn(f"taken: the {part} part: 1 of 3 images", part_in_words(source, part, self.model))

    def test_few_labels_leave_the_division(self) -> None:
        few = open_with_few_labels(self.folder, num_labels=4, validation_count=2, image_size=8)
        self.assertLess(len(few.part("val")), len(open_source(self.folder, image_size=8).part("val")))
        self.assertEqual(division_of(few), self.model.division)

    def test_is_in_the_model_json_and_older_files_lack_it(self) -> None:
        path = self.folder / "model.json"
        self.model.save(path)
        self.assertEqual(ModelDescription.load(path), self.model)
        older = json.loads(path.read_text(encoding="utf-8"))
        del older["division"]
        self.assertIsNone(ModelDescription.from_dict(older).division)


class TestPreparationOfTheModel(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_phantoms_are_those_of_the_training(self, spatial_dims: int) -> None:
        options: dict[str, Any] = {"spatial_dims": spatial_dims, "image_size": 8, "seed": 3, "phantom_counts": COUNTS}
        trained = open_source(phantoms="brain", **options)
        model = replace(phantom_model(spatial_dims), data=trained.description())
        prepare, found = preprocessing_of_model(model), source_of_model(model, None)
        self.assertEqual(found.items, trained.items)
        for item in found.part("test"):
            expected = trained.preprocessing()(item)
            torch.testing.assert_close(prepare(item)["image"], expected["image"], rtol=0, atol=0)
            torch.testing.assert_close(prepare(item)["mask"], expected["mask"])

    def test_model_of_images_that_phantoms_cannot_be(self) -> None:
        data = open_source(phantoms="skin", image_size=16, phantom_counts=COUNTS).description()
        model = replace(phantom_model(), data={**data, "spatial_dims": 3, "image_size": [8, 8, 8]})
        prepare = pickle.loads(pickle.dumps(preprocessing_of_model(model)))  # as workers of a loader get it
        volume = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 8)).astype(np.uint8)
        self.assertEqual(prepare({"image": volume, "label": 0, "name": "v"})["image"].shape, (3, 8, 8, 8))
        with self.assertRaises(RuntimeError) as caught:  # MONAI's Compose raises it from the transform's own error
            prepare({"image": 0, "label": 0, "name": "phantom/000000"})
        self.assertIn("skin is drawn from above", str(caught.exception.__cause__))

    def test_description_of_an_older_version_has_chests_and_no_correction(self) -> None:
        model = phantom_model()
        data = {key: value for key, value in model.data.items() if key != "bias_correction"}
        older = replace(model, data={**data, "opened_with": {"seed": 0, "phantom_counts": COUNTS}})
        (item, *_) = source_of_model(older, None).part("test")
        one, two = (preprocessing_of_model(each)(item)["image"] for each in (older, model))
        torch.testing.assert_close(one, two, rtol=0, atol=0)

    def test_bias_correction_is_that_of_the_training(self) -> None:
        correction = N4BiasFieldCorrection(1, "positive", (20, 20))
        folder = temporary_folder(self)
        tissue, field = np.where(np.arange(24) < 12, 60.0, 120.0), np.exp(np.linspace(-0.5, 0.5, 24))
        np.savez(folder / "x.npz", test_images=np.outer(field, tissue)[None].astype(np.uint8))
        trained = open_source(str(folder / "x.npz"), correction=correction)
        model = replace(phantom_model(), data=json.loads(json.dumps(trained.description())))
        (item, *_) = images_to_classify(str(folder / "x.npz"), model)
        expected = trained.preprocessing()(item)["image"]
        torch.testing.assert_close(preprocessing_of_model(model)(item)["image"], expected, rtol=0, atol=0)
        found = source_of_model(model, str(folder / "x.npz"))
        torch.testing.assert_close(found.preprocessing()(item)["image"], expected, rtol=0, atol=0)
        plain = replace(model, data={**model.data, "bias_correction": None})
        self.assertGreater(float((preprocessing_of_model(plain)(item)["image"] - expected).abs().max()), 0.02)


class TestSlicesToClassify(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        (self.folder / "p").mkdir()
        for name in ("flair", "t1c"):
            volume = np.random.default_rng(0).normal(5, 1, (6, 7, 5)).astype(np.float32)
            nibabel.save(
                nibabel.Nifti1Image(volume, np.diag([-1.0, -1.0, 1.0, 1.0])), self.folder / "p" / f"{name}.nii"
            )

    def model(self, **options: Any) -> ModelDescription:
        usual = {"image_column": ["flair", "t1c"]}
        source = open_source(phantoms="brain", image_size=8, phantom_counts=COUNTS, usual_columns=usual, **options)
        return ModelDescription(small_network().config, {}, source.description())

    def test_as_the_training_would_cut_them(self) -> None:
        model = self.model(image_column=["flair", "t1c"], slice_axis=0, min_foreground=0.0)
        items = images_to_classify(str(self.folder), model)
        self.assertEqual([item["name"] for item in items], [f"p/flair.nii#slice_{n:03d}" for n in range(5)])
        self.assertEqual({item["patient"] for item in items}, {"p"})
        self.assertEqual(preprocessing_of_model(model)(items[3])["image"].shape, (2, 8, 8))

    def test_options_come_before_the_trainings(self) -> None:
        given: dict[str, Any] = {"image_column": "flair,t1c", "slice_axis": 2, "slice_every": 3, "min_foreground": None}
        items = images_to_classify(str(self.folder), self.model(min_foreground=0.0), **given)
        self.assertEqual([item["name"] for item in items], ["p/flair.nii#slice_000", "p/flair.nii#slice_003"])
        one = images_to_classify(str(self.folder), self.model(min_foreground=0.0), slice_axis=2, image_column="flair")
        self.assertEqual({item["patient"] for item in one}, {"p/flair.nii", "p/t1c.nii"})  # each volume by itself


class TestImagesToClassify(unittest.TestCase):
    def test_folder_and_file(self) -> None:
        folder = temporary_folder(self)
        for name in ("b.png", "in/a.png", ".hidden/c.png"):
            picture(folder / name)
        (folder / "notes.txt").write_text("no image", encoding="utf-8")
        items = images_to_classify(str(folder), phantom_model())
        expected: list[dict[str, Any]] = [
            {"image": folder / name, "label": -1, "name": name, "not_held_out": MAY_HAVE_TRAINED}
            for name in ("b.png", "in/a.png")
        ]
        self.assertEqual(items, expected)
        self.assertEqual(images_to_classify(str(folder / "in" / "a.png"), phantom_model())[0]["name"], "a.png")
        several = images_to_classify(str(folder), model_of(["a", "b"], True))
        self.assertEqual(several[0]["label"], [-1.0, -1.0])

    @unittest.skipUnless(has_pydicom, "needs pydicom")
    def test_series_is_a_volume_for_a_model_of_volumes(self) -> None:
        folder = temporary_folder(self)
        for name in ("p0", "p1"):
            save_series(folder / name, pixels(4, 6, 9, dtype=np.uint16))
        model = phantom_model(3)
        items = images_to_classify(str(folder), model)
        self.assertEqual([item["name"] for item in items], ["p0", "p1"])
        self.assertEqual(preprocessing_of_model(model)(items[0])["image"].shape, model.image_shape)
        (item,) = images_to_classify(str(folder / "p1"), model)
        self.assertEqual(item["name"], "p1")
        self.assertEqual(len(images_to_classify(str(folder), phantom_model())), 8)

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
            self.assertFalse(any("not_held_out" in item for item in items))

    def test_without_a_test_part_all_are_taken(self) -> None:
        folder = temporary_folder(self)
        np.savez(folder / "x.npz", train_images=np.zeros((40, 8, 8), np.uint8))
        items = images_to_classify(str(folder / "x.npz"), phantom_model())
        self.assertEqual([item["name"] for item in items], [f"train/{n:06d}" for n in range(40)])
        self.assertTrue(all(item["not_held_out"] == MAY_HAVE_TRAINED for item in items))

    def test_data_without_parts_are_taken_whole(self) -> None:
        folder = temporary_folder(self)
        np.savez(folder / "new.npz", images=np.zeros((50, 8, 8), np.uint8))
        items = images_to_classify(str(folder / "new.npz"), phantom_model())
        self.assertEqual([item["name"] for item in items], [f"images/{n:06d}" for n in range(50)])
        self.assertTrue(all(item["not_held_out"] == MAY_HAVE_TRAINED for item in items))

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
    def test_old_weights_go_before_the_description_of_others_comes(self) -> None:
        folder = temporary_folder(self)
        (folder / "model.pt").touch()
        model_of(["a", "b", "c"]).save(folder / "model.json")
        start_model(phantom_model(), folder)
        self.assertFalse((folder / "model.pt").exists())
        self.assertEqual(ModelDescription.load(folder / "model.json"), phantom_model())


if __name__ == "__main__":
    unittest.main()
