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

"""Skin phantoms: what is known about them is exactly true."""

from __future__ import annotations

import unittest
from typing import Any

import numpy as np
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.data import SKIN_CLASSES, SkinPhantoms, make_phantoms, open_source
from monai_jointdiff.data.skin_anatomy import Tissue, reflectance
from monai_jointdiff.metrics import macro_auc, pca_logistic_floor

HAM10000 = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
SIZES = [((16, 16),), ((24, 32),), ((40, 28),)]
CLASSES = [(name, label) for label, name in enumerate(SKIN_CLASSES)]
linear_model, has_sklearn = optional_import("sklearn.linear_model")
preprocessing, _ = optional_import("sklearn.preprocessing")
pipeline, _ = optional_import("sklearn.pipeline")


def amounts(**given: float) -> Tissue:
    """One pixel of tissue."""
    return Tissue(*(np.full((1, 1), given.get(name, 0.0)) for name in Tissue._fields))


def lesions(name: str, count: int = 20, size: int = 64) -> list[Tissue]:
    """What lesions of a class add to the skin."""
    source = SkinPhantoms(2, size, 7)
    return [source.lesion(index, SKIN_CLASSES.index(name)) for index in range(count)]


def spread(values: np.ndarray) -> float:
    """Standard deviation over mean."""
    return float(values.std() / values.mean())


def interior(lesion: Tissue) -> np.ndarray:
    """Where a lesion is at full strength: its blood, which covers it evenly but for vessels and patches, is not low."""
    return np.asarray(lesion.blood > 0.5 * np.median(lesion.blood[lesion.anywhere()]))


def roughness(mask: np.ndarray) -> float:
    """Edges between inside and outside, squared, over the area: 16 for a square, more for notched outlines."""
    padded = np.pad(mask, 1).astype(int)
    edges = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
    return float(edges**2 / mask.sum())


def distance(weights: np.ndarray, mask: np.ndarray) -> float:
    """Mean distance of what is weighed from the middle of the mask, in units of that of the mask's own pixels."""
    places = np.argwhere(mask)
    y, x = np.indices(mask.shape)
    away = np.hypot(y - places[:, 0].mean(), x - places[:, 1].mean())
    return float((away * weights).sum() / weights.sum() / away[mask].mean())


class TestPhantom(unittest.TestCase):
    @parameterized.expand(SIZES)
    def test_types_shapes_and_ranges(self, size: tuple[int, int]) -> None:
        source = SkinPhantoms(2, size)
        for index in range(8):
            phantom = source(index)
            self.assertEqual((phantom.image.shape, phantom.image.dtype), ((3, *size), np.uint8))
            self.assertEqual((phantom.mask.shape, phantom.mask.dtype), ((1, *size), np.bool_))
            self.assertEqual(phantom.label, source.label(index))
            self.assertGreater(phantom.image[0].mean(), phantom.image[1].mean())  # skin is more red than green
            self.assertGreater(np.ptp(phantom.image[1].astype(int)), 32)

    def test_function_of_seed_and_index(self) -> None:
        forward = [SkinPhantoms(2, 16, 5)(index) for index in range(4)]
        source = SkinPhantoms(2, 16, 5)
        for index in (2, 0, 3, 1, 2):
            again = source(index)
            np.testing.assert_array_equal(again.image, forward[index].image)
            np.testing.assert_array_equal(again.mask, forward[index].mask)
            self.assertEqual(again.label, forward[index].label)
        other = SkinPhantoms(2, 16, 6)
        for one, two in ((0, forward[1]), (0, other(0)), (1, other(0))):
            self.assertFalse(np.array_equal(two.image, forward[one].image))

    @parameterized.expand(
        [
            ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
            ({"spatial_dims": 3}, "skin is drawn from above, spatial_dims must be 2, got 3"),
            ({"image_size": 7}, "image_size must be 2 numbers of at least 8, got 7"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
        ]
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"SkinPhantoms: {message}"):
            SkinPhantoms(**arguments)

    @parameterized.expand([(-1,), (7,)])
    def test_wrong_label(self, label: int) -> None:
        source = SkinPhantoms(2, 16)
        for draw in (source, source.lesion):
            with self.assertRaisesRegex(ValueError, rf"SkinPhantoms: label must be in \[0, 7\), got {label}"):
                draw(0, label)

    def test_by_name(self) -> None:
        phantoms = make_phantoms("skin", 2, (16, 24), 4)
        np.testing.assert_array_equal(phantoms(2).image, SkinPhantoms(2, (16, 24), 4)(2).image)
        with self.assertRaisesRegex(ValueError, "SkinPhantoms: skin is drawn from above"):
            make_phantoms("skin", 3, 16)


class TestFrequencies(unittest.TestCase):
    def test_classes_are_those_of_ham10000(self) -> None:
        self.assertEqual(SKIN_CLASSES, tuple(HAM10000))

    @parameterized.expand([(0, 0, 6000), (0, 6000, 600), (3, 0, 1000), (11, 777, 144)])
    def test_every_run_of_phantoms_has_the_shares_of_ham10000(self, seed: int, first: int, count: int) -> None:
        source = SkinPhantoms(2, 8, seed)
        found = np.bincount([source.label(index) for index in range(first, first + count)], minlength=7)
        expected = count * np.array(list(HAM10000.values())) / sum(HAM10000.values())
        self.assertLess(np.abs(found - expected).max(), 3)
        self.assertGreaterEqual(found.min(), 1)

    def test_default_training_part_has_forty_of_the_rarest(self) -> None:
        for seed in range(5):
            labels = [item["label"] for item in open_source(phantoms="skin", seed=seed).part("train")]
            self.assertGreaterEqual(np.bincount(labels, minlength=7).min(), 40)


class TestColor(unittest.TestCase):
    def test_absorption_follows_beers_law(self) -> None:
        for name in ("melanin", "blood", "deep"):
            one, three = reflectance(amounts(**{name: 0.4})), reflectance(amounts(**{name: 1.2}))
            np.testing.assert_allclose(three, one**3, rtol=1e-6)
        mixed = reflectance(amounts(melanin=0.3, blood=0.8))
        alone = reflectance(amounts(melanin=0.3)) * reflectance(amounts(blood=0.8))
        np.testing.assert_allclose(mixed, alone, rtol=1e-6)

    def test_colors_of_the_substances(self) -> None:
        brown, red, blue = (reflectance(amounts(**{name: 1.0}))[:, 0, 0] for name in ("melanin", "blood", "deep"))
        self.assertTrue(brown[0] > brown[1] > brown[2])
        self.assertTrue(red[0] > 1.5 * red[2] > 1.5 * red[1])
        self.assertTrue(blue[2] > blue[1] > blue[0])
        white = reflectance(amounts(melanin=2.0, blood=1.0, white=1.0))[:, 0, 0]
        self.assertGreater(white.min(), 0.85)

    def test_tissues_add_up(self) -> None:
        both = amounts(melanin=0.2, white=0.5).plus(amounts(melanin=0.3, blood=1.0, white=0.5))
        np.testing.assert_allclose(np.ravel(both), [0.5, 1.0, 0.0, 0.75])
        self.assertFalse(amounts().anywhere().any())
        self.assertTrue(amounts(white=0.1).anywhere().all())


class TestLesions(unittest.TestCase):
    @parameterized.expand(CLASSES)
    def test_mask_is_where_the_lesion_changes_the_picture(self, _: str, label: int) -> None:
        source = SkinPhantoms(2, (24, 32), 3)
        for index in range(10):
            phantom, before = source(index, label), source.without_lesion(index)
            mask = phantom.mask[0]
            np.testing.assert_array_equal(phantom.image[:, ~mask], before[:, ~mask])
            np.testing.assert_array_equal(mask, source.lesion(index, label).anywhere())
            changed = (phantom.image != before).any(axis=0)
            self.assertGreater(changed[mask].mean(), 0.85)
            self.assertTrue(0.02 < mask.mean() < 0.7, mask.mean())

    def test_lesions_of_one_number_grow_on_the_same_skin(self) -> None:
        source = SkinPhantoms(2, 24, 4)
        for index in range(5):
            drawn = [source(index, label) for label in range(7)]
            outside = ~np.any([phantom.mask[0] for phantom in drawn], axis=0)
            self.assertEqual([phantom.label for phantom in drawn], list(range(7)))
            for phantom in drawn[1:]:
                np.testing.assert_array_equal(phantom.image[:, outside], drawn[0].image[:, outside])

    def test_melanoma_is_notched_and_of_several_colors_and_a_nevus_is_not(self) -> None:
        figures = {}
        for name in ("mel", "nv"):
            drawn = lesions(name)
            outline = np.mean([roughness(one.anywhere()) for one in drawn])
            uneven = np.mean([spread(one.melanin[interior(one)]) for one in drawn])
            blue = np.mean([one.deep[one.anywhere()].max() for one in drawn])
            figures[name] = np.array([outline, uneven, blue])
        self.assertTrue((figures["mel"] > np.array([1.15, 1.5, 2.0]) * figures["nv"]).all(), figures)

    def test_keratosis_has_a_sharp_border_cysts_and_plugs(self) -> None:
        soft = {
            name: [(one.blood < 0.9 * one.blood.max())[one.anywhere()].mean() for one in lesions(name)]
            for name in ("bkl", "df")
        }
        self.assertLess(np.mean(soft["bkl"]), 0.5 * np.mean(soft["df"]))
        for one in lesions("bkl"):
            self.assertGreater(one.white.max(), 0.3)
            self.assertLess((one.white > 0.2)[one.anywhere()].mean(), 0.35)
            self.assertGreater(one.melanin.max(), 1.4 * np.median(one.melanin[one.anywhere()]))

    def test_carcinoma_has_thin_vessels_and_a_pearly_ground(self) -> None:
        for one in lesions("bcc"):
            inside = one.anywhere()
            ground = np.median(one.blood[inside])
            vessels = one.blood > ground + 0.3
            self.assertGreater(one.blood.max(), ground + 0.5)
            self.assertLess(vessels[inside].mean(), 0.45)
            self.assertGreater(one.white[inside & ~vessels].mean(), 0.05)

    def test_scales_lie_everywhere_and_a_scar_in_the_middle(self) -> None:
        scales = [distance(one.white, one.anywhere()) for one in lesions("akiec") if one.white.any()]
        scars = [distance(one.white, one.anywhere()) for one in lesions("df")]
        self.assertGreater(len(scales), 15)
        self.assertGreater(np.mean(scales), 0.65)
        self.assertLess(np.mean(scars), 0.5)

    def test_lacunae_are_full_of_blood_between_pale_walls(self) -> None:
        for one in lesions("vasc"):
            inside = one.anywhere()
            full = one.blood > 0.5 * one.blood.max()
            self.assertTrue(0.25 < full[inside].mean() < 0.95)
            self.assertGreater(one.blood.max(), 2.0 * np.quantile(one.blood[inside], 0.05))
            pale = inside & (one.blood <= np.quantile(one.blood[inside], 0.02))
            self.assertLess(one.deep[pale].mean(), 0.05 * one.deep[full].mean())


class TestDifficulty(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "needs scikit-learn")
    def test_neither_mean_color_nor_a_linear_model_solves_it_but_there_is_more_to_see(self) -> None:
        source = SkinPhantoms(2, 32)
        phantoms = [source(index, index % 7) for index in range(770)]
        images = np.stack([phantom.image for phantom in phantoms]).astype(np.float32) / 255
        labels = np.array([phantom.label for phantom in phantoms])
        floor = pca_logistic_floor(images[:490], labels[:490], images[490:], labels[490:])
        color = self._auc(images.mean(axis=(2, 3)), labels)
        contrast = self._auc(np.concatenate([f(images, axis=(2, 3)) for f in (np.std, np.min, np.max)], axis=1), labels)
        self.assertLess(color, 0.68)
        self.assertTrue(0.55 < floor.auc < 0.82, floor)
        self.assertGreater(contrast, floor.auc + 0.08)

    @staticmethod
    def _auc(features: np.ndarray, labels: np.ndarray) -> float:
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=2000))
        model.fit(features[:490], labels[:490])
        return macro_auc(model.predict_proba(features[490:]), labels[490:])


if __name__ == "__main__":
    unittest.main()
