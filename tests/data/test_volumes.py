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

"""Images in several files, slices of volumes: which are taken, what they show, and where they lie in the patient."""

from __future__ import annotations

import os
import pickle
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor, list_data_collate
from parameterized import parameterized

from monai_jointdiff.data import ImageFiles, ImagePreprocessing, SliceRule, reading
from monai_jointdiff.data.reading import read_volume
from tests.bundles.runs import temporary_folder

CODES = [("R", "A", "S"), ("L", "P", "S"), ("P", "S", "R"), ("I", "L", "A")]


def oblique(codes: tuple[str, ...], spacing: tuple[float, ...] = (1.5, 1.0, 3.0)) -> np.ndarray:
    """Voxel axes that run roughly toward these directions, a little turned, somewhere in the scanner."""
    affine = np.eye(4)
    axes = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(nibabel.orientations.axcodes2ornt(codes)):
        axes[int(world), axis] = sign * spacing[axis]
    turn = np.array([[np.cos(0.1), -np.sin(0.1), 0], [np.sin(0.1), np.cos(0.1), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ axes
    affine[:3, 3] = (-20.0, 30.0, 5.0)
    return affine


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, 1)
    nibabel.save(image, path)
    return path


def save_coordinates(folder: Path, affine: np.ndarray, shape: tuple[int, ...] = (15, 18, 12)) -> tuple[Path, ...]:
    """One file for each of x, y and z: the voxels hold the millimetres at which they lie."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    return tuple(
        save(folder / f"{name}.nii.gz", world[..., n].astype(np.float32), affine) for n, name in enumerate("xyz")
    )


def places(image: torch.Tensor, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the inner pixels: the millimetres that they hold, and those that the affine says."""
    assert isinstance(image, MetaTensor)
    array = image.numpy()
    inside = np.argwhere((array > -1).all(axis=0))
    low, high = inside.min(axis=0) + margin, inside.max(axis=0) - margin
    index = inside[((inside >= low) & (inside <= high)).all(axis=1)]
    held = 100.0 * array[(slice(None), *index.T)].T
    full = np.concatenate([index, np.zeros((len(index), 3 - index.shape[1])), np.ones((len(index), 1))], axis=1)
    return held, (full @ image.affine.numpy().T)[:, :3]


class TestGeometry(unittest.TestCase):
    """Images whose values are the millimetres at which they lie tell whether the affine is right.

    Where the size changes by no whole number, the filter itself moves what it averages by some hundredths of a pixel.
    """

    rule = {"kind": "window", "window": [-100, 100]}

    @parameterized.expand([(codes, size) for codes in CODES for size in ((8, 8, 8), (12, 20, 16))])
    def test_of_a_volume(self, codes: tuple[str, ...], size: tuple[int, ...]) -> None:
        files = save_coordinates(temporary_folder(self), oblique(codes))
        image = ImagePreprocessing(3, size, 3, self.rule)(ImageFiles(files))
        held, said = places(image, 1)
        self.assertGreater(len(held), 20)
        self.assertLess(np.abs(held - said).max(), 0.1 * float(image.affine[:3, 0].norm()))

    @parameterized.expand([(codes,) for codes in CODES])
    def test_of_a_padded_volume(self, codes: tuple[str, ...]) -> None:
        files = save_coordinates(temporary_folder(self), oblique(codes, (2.0, 2.0, 2.0)), (12, 12, 12))
        held, said = places(ImagePreprocessing(3, (12, 15, 20), 3, self.rule)(ImageFiles(files)), 0)
        self.assertEqual(len(held), 12**3)
        np.testing.assert_allclose(held, said, atol=1e-4)

    @parameterized.expand([(codes, axis) for codes in CODES for axis in (0, 1, 2)])
    def test_of_slices(self, codes: tuple[str, ...], axis: int) -> None:
        files = save_coordinates(temporary_folder(self), oblique(codes))
        prepare = ImagePreprocessing(2, (10, 14), 3, self.rule)
        for index in (2, 7):
            image = prepare(ImageFiles(files, axis, index))
            held, said = places(image, 1)
            self.assertGreater(len(held), 10)
            self.assertLess(np.abs(held - said).max(), 0.1 * float(image.affine[:3, 0].norm()))
        normal = prepare(ImageFiles(files, axis, 3)).affine[:3, 3] - prepare(ImageFiles(files, axis, 2)).affine[:3, 3]
        torch.testing.assert_close(normal, image.affine[:3, 2])  # third column: from slice to slice

    def test_axial_slices_run_to_the_head_and_show_the_front_above(self) -> None:
        files = save_coordinates(temporary_folder(self), oblique(("P", "S", "R")))
        affine = ImagePreprocessing(2, 8, 3, self.rule)(ImageFiles(files, 0, 4)).affine
        back, left, head = (affine[:3, n] / affine[:3, n].norm() for n in range(3))
        self.assertLess(float(back[1]), -0.9)
        self.assertLess(float(left[0]), -0.9)
        self.assertGreater(float(head[2]), 0.9)

    def test_of_a_picture_and_an_array(self) -> None:
        folder = temporary_folder(self)
        save(folder / "flat.nii", np.zeros((6, 9), np.float32), np.diag([2.0, 3.0, 1.0, 1.0]))
        image = ImagePreprocessing(2, 9)(folder / "flat.nii")
        self.assertEqual(image.affine.shape, (4, 4))
        np.testing.assert_allclose(image.affine[:3, 0], [0, 3, 0])  # rows run along the second axis of the file
        self.assertIs(type(ImagePreprocessing(2, 4)(np.zeros((1, 4, 4), np.uint8))), torch.Tensor)

    def test_batch_has_the_affine_of_each(self) -> None:
        files = save_coordinates(temporary_folder(self), oblique(("R", "A", "S")))
        images = [ImagePreprocessing(2, 8, 3, self.rule)(ImageFiles(files, 0, n)) for n in (2, 5)]
        batch = list_data_collate([{"image": image} for image in images])["image"]
        torch.testing.assert_close(batch.affine, torch.stack([image.affine for image in images]))


class TestSeveralFiles(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.array = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
        self.one = save(self.folder / "one.nii", self.array)

    def test_channels_in_the_order_of_the_files_whatever_their_orientation(self) -> None:
        flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
        flipped[0, 3] = 5
        two = save(self.folder / "two.nii", -self.array[::-1], flipped)
        both = ImagePreprocessing(3, (8, 7, 6), 2)(ImageFiles((self.one, two)))
        first, second = (ImagePreprocessing(3, (8, 7, 6))(path) for path in (self.one, two))
        torch.testing.assert_close(both.as_tensor(), torch.cat([first, second]).as_tensor(), rtol=0, atol=0)
        torch.testing.assert_close(both[0].as_tensor(), -both[1].as_tensor(), atol=1e-5, rtol=0)

    def test_files_that_do_not_belong_together_are_named(self) -> None:
        shifted = np.eye(4)
        shifted[1, 3] = 0.8
        cases = [
            (save(self.folder / "small.nii", self.array[1:]), r"small.nii': its shape is \(8, 7, 5\), that of '.*one"),
            (save(self.folder / "away.nii", self.array, shifted), "away.nii': its header places it up to 0.8 mm away"),
            (self.folder / "none.nii", "none.nii': there is no such file"),
        ]
        (self.folder / "broken.nii").write_bytes(self.one.read_bytes()[:500])
        cases.append((self.folder / "broken.nii", "broken.nii'"))
        for axis in (None, 0):
            for other, message in cases:
                with self.assertRaisesRegex(ValueError, message):
                    prepare = ImagePreprocessing(3 if axis is None else 2, 8, 2)
                    prepare(ImageFiles((self.one, other), axis, 2))

    def test_a_little_apart_is_the_same_place(self) -> None:
        nearly = np.eye(4)
        nearly[1, 3] = 0.3
        two = save(self.folder / "two.nii", self.array, nearly)
        self.assertEqual(len(ImagePreprocessing(3, 8, 2)(ImageFiles((self.one, two)))), 2)

    def test_number_of_channels(self) -> None:
        with self.assertRaisesRegex(ValueError, "2 files .* make 2 channels, not 3"):
            ImagePreprocessing(3, 8, 3)(ImageFiles((self.one, self.one)))


class TestSlices(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        array = np.random.default_rng(1).integers(0, 1000, (7, 8, 9)).astype(np.int16)
        self.files = ImageFiles(tuple(save(self.folder / f"{n}.nii.gz", array + 100 * n) for n in range(2)))
        self.volume = np.stack([array.T[:, ::-1, ::-1] + 100 * n for n in range(2)])  # depth, rows, columns

    def one(self, axis: int, index: int) -> ImageFiles:
        return ImageFiles(self.files.paths, axis, index)

    @parameterized.expand([(0, (8, 7)), (1, (9, 7)), (2, (9, 8))])
    def test_are_those_of_the_scaled_volume(self, axis: int, size: tuple[int, int]) -> None:
        whole = ImagePreprocessing(3, (9, 8, 7), 2)(self.volume)
        for index in range(self.volume.shape[1 + axis]):
            found = ImagePreprocessing(2, size, 2)(self.one(axis, index))
            torch.testing.assert_close(found.as_tensor(), whole.select(1 + axis, index), rtol=0, atol=1e-6)

    def test_volume_is_read_once_for_all_its_slices_in_turn(self) -> None:
        prepare = pickle.loads(pickle.dumps(ImagePreprocessing(2, 8, 2)))  # as loader workers get it
        with mock.patch.object(reading, "_read", wraps=reading._read) as read:
            for index in range(9):
                prepare(self.one(0, index))
                prepare(ImageFiles(self.files.paths[:1] * 2, 0, index))
        self.assertEqual(read.call_count, 4)

    def test_file_that_was_written_anew_is_read_anew(self) -> None:
        prepare = ImagePreprocessing(2, (8, 7), 2)
        before = prepare(self.one(0, 3))
        path = self.files.paths[0]
        save(path, np.ascontiguousarray(self.volume[0].T[::-1, ::-1][::-1]).astype(np.int16))
        os.utime(path, ns=(1, 1))
        self.assertFalse(torch.equal(prepare(self.one(0, 3))[0], before[0]))

    def test_number_that_is_not_there(self) -> None:
        for index, name in ((-1, "-01"), (9, "009")):
            with self.assertRaisesRegex(ValueError, f"1.nii.gz#slice_{name}': it has 9 slices along axis 0"):
                ImagePreprocessing(2, 8, 2)(self.one(0, index))

    def test_names(self) -> None:
        self.assertEqual(str(ImageFiles((Path("a.nii"), Path("b.nii")), 0, 7)), "a.nii + b.nii#slice_007")
        self.assertEqual(str(ImageFiles((Path("a.nii"),))), "a.nii")

    def test_volumes_and_what_is_none(self) -> None:
        found = read_volume(self.files)
        assert found is not None
        np.testing.assert_array_equal(found, self.volume)
        flat = save(self.folder / "flat.nii", np.zeros((5, 6), np.float32))
        thin = save(self.folder / "thin.nii", np.zeros((5, 6, 1), np.float32))
        for path in (flat, thin, self.folder / "never_read.png"):
            self.assertIsNone(read_volume(ImageFiles((path,))))


class TestMasks(unittest.TestCase):
    @parameterized.expand([(2, (8, 8)), (3, (8, 8, 8))])
    def test_covers_pixels_by_half(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        image = np.zeros((1, *(16,) * spatial_dims), np.uint8)
        mask = np.zeros_like(image)
        mask[(0, *(slice(4, 9),) * spatial_dims)] = 3
        found_image, found = ImagePreprocessing(spatial_dims, size).with_mask(image, mask)
        self.assertEqual((found.shape, found.dtype), ((1, *size), torch.bool))
        expected = torch.zeros(1, *size, dtype=torch.bool)
        expected[(0, *(slice(2, 4),) * spatial_dims)] = True
        self.assertTrue(bool((found == expected).sum() >= found.numel() - 3**spatial_dims))
        self.assertTrue(bool(found[(0, *(slice(2, 4),) * spatial_dims)].all()))
        torch.testing.assert_close(found_image, ImagePreprocessing(spatial_dims, size)(image))

    def test_is_padded_with_nothing(self) -> None:
        _, found = ImagePreprocessing(2, 8).with_mask(np.zeros((1, 4, 8), np.uint8), np.ones((1, 4, 8), np.uint8))
        np.testing.assert_array_equal(found[0].any(dim=1), [0, 0, 1, 1, 1, 1, 0, 0])

    def test_of_another_image_is_refused(self) -> None:
        folder = temporary_folder(self)
        image = save(folder / "image.nii", np.zeros((5, 6, 7), np.float32))
        mask = save(folder / "mask.nii", np.zeros((5, 6, 6), np.uint8))
        with self.assertRaisesRegex(ValueError, "mask.nii#slice_002': its shape is .* that of '.*image.nii#slice_002'"):
            ImagePreprocessing(2, 8).with_mask(ImageFiles((image,), 2, 2), ImageFiles((mask,), 2, 2))
        with self.assertRaisesRegex(ValueError, "cannot use 'an array': its shape is"):
            ImagePreprocessing(2, 8).with_mask(np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 9), np.uint8))


class Halved:
    """A correction that is easily told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, image: Any) -> Any:
        self.seen.append(image)
        return image / 2

    def as_dict(self) -> dict[str, Any]:
        return {"by": 2}


class TestCorrection(unittest.TestCase):
    def test_comes_before_the_intensity_rule(self) -> None:
        rule = {"kind": "window", "window": [0, 100]}
        image = np.full((1, 4, 4), 100, np.int16)
        self.assertEqual(float(ImagePreprocessing(2, 4, 1, rule, Halved())(image).max()), 0.0)
        self.assertEqual(float(ImagePreprocessing(2, 4, 1, rule)(image).max()), 1.0)

    def test_8_bit_and_ranges_stay_what_they_are(self) -> None:
        eight = ImagePreprocessing(2, 4, 1, None, Halved())(np.full((1, 4, 4), 201, np.uint8))
        np.testing.assert_allclose(eight, 100 / 127.5 - 1, atol=1e-6)  # half is rounded to even
        ranged = ImagePreprocessing(2, 4, 1, {"float_range": [0.5, 1]}, Halved())
        found = ranged(np.linspace(0.5, 1, 16, dtype=np.float32).reshape(1, 4, 4))
        np.testing.assert_allclose(found, -1.0, atol=1e-6)

    def test_slices_share_the_correction_of_their_volume(self) -> None:
        array = np.random.default_rng(1).normal(size=(4, 5, 6)).astype(np.float32)
        path = save(temporary_folder(self) / "a.nii", array, np.diag([1.0, 2.0, 3.0, 1.0]))
        halved = Halved()
        prepare = ImagePreprocessing(2, 8, 1, None, halved)
        for index in range(6):
            prepare(ImageFiles((path,), 0, index))
        (seen,) = halved.seen
        self.assertEqual(seen.shape, (1, 6, 5, 4))
        np.testing.assert_allclose(seen.affine[:3, :3].norm(dim=0), [3.0, 2.0, 1.0])

    def test_of_the_description_is_demanded(self) -> None:
        data = {"spatial_dims": 2, "image_size": [4, 4], "in_channels": 1, "intensity": {}}
        image = np.full((1, 4, 4), 200, np.uint8)
        with_it = ImagePreprocessing.from_description({**data, "bias_correction": {"by": 2}}, Halved())
        self.assertFalse(torch.equal(with_it(image), ImagePreprocessing.from_description(data)(image)))
        torch.testing.assert_close(
            with_it.without_correction()(image), ImagePreprocessing.from_description(data)(image)
        )
        for description, correction in (({**data, "bias_correction": {"by": 2}}, None), (data, Halved())):
            with self.assertRaisesRegex(ValueError, "trained with bias_correction .*, got correction"):
                ImagePreprocessing.from_description(description, correction)


class TestSliceRule(unittest.TestCase):
    def volume(self) -> np.ndarray:
        """A ball, bright in the second channel only."""
        axis = np.linspace(-1, 1, 21)
        z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
        ball = np.where(z**2 + y**2 + x**2 < 0.5, 1.0, -1.0)
        return np.stack([np.full_like(ball, -0.81), ball]).astype(np.float32)

    @parameterized.expand([(0,), (1,), (2,)])
    def test_slices_with_enough_of_the_largest(self, axis: int) -> None:
        """A disk at height h has the share 1 - h^2 / 0.5 of the largest."""
        heights = np.linspace(-1, 1, 21)
        for share in (0.0, 0.25, 0.6):
            found = SliceRule(axis, min_foreground=share).indices(self.volume())
            clear = np.flatnonzero(1 - heights**2 / 0.5 > share + 0.05).tolist()
            never = np.flatnonzero(1 - heights**2 / 0.5 < share - 0.05).tolist()
            self.assertLessEqual(set(clear), set(found))
            self.assertEqual(set(never) & set(found), set())

    def test_every_third(self) -> None:
        every = SliceRule(0, min_foreground=0.0).indices(self.volume())
        self.assertEqual(SliceRule(0, 3, 0.0).indices(self.volume()), [n for n in every if n % 3 == 0])

    def test_dark_volume_has_none(self) -> None:
        self.assertEqual(SliceRule().indices(np.full((1, 4, 4, 4), -1.0, np.float32)), [])

    @parameterized.expand([(0,), (1,), (2,)])
    def test_classes_by_the_pixels_of_the_mask(self, axis: int) -> None:
        mask = np.zeros((6, 6, 6), bool)
        for index, count in ((1, 5), (2, 4), (3, 1)):
            plane = np.zeros(36, bool)
            plane[:count] = True
            np.moveaxis(mask, axis, 0)[index] = plane.reshape(6, 6)
        labels = SliceRule(axis, min_mask_pixels=4).labels(mask, [0, 1, 2, 3])
        self.assertEqual(labels, {0: 0, 1: 1, 2: 1})  # slice 3 is neither

    def test_from_options(self) -> None:
        self.assertIsNone(SliceRule.from_options({"slice_axis": None, "slice_every": 2}))
        self.assertIsNone(SliceRule.from_options({}))
        options = {"slice_axis": 1, "slice_every": 2, "mask_classes": ["a", "b"], "other": 3}
        self.assertEqual(SliceRule.from_options(options), SliceRule(1, 2, classes=("a", "b")))

    @parameterized.expand(
        [
            ({"axis": 3}, "slice_axis must be 0, 1 or 2, got 3"),
            ({"axis": "null"}, "slice_axis must be 0, 1 or 2, got 'null'"),
            ({"every": 0}, "slice_every must be at least 1, got 0"),
            ({"min_mask_pixels": 0}, "min_mask_pixels must be at least 1, got 0"),
            ({"min_foreground": 1.5}, r"min_foreground must be in \[0, 1\], got 1.5"),
            ({"classes": ("a",)}, "mask_classes must be two names"),
        ]
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"SliceRule: {message}"):
            SliceRule(**arguments)


if __name__ == "__main__":
    unittest.main()
