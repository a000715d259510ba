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


"""What a network gave comes back to the pixels of the file: place, order of the axes, affine."""

from __future__ import annotations

import os
import unittest
from pathlib import Path

import nibabel
import numpy as np
from monai.utils import optional_import
from parameterized import parameterized
from PIL import Image

from monai_jointdiff.data import ImagePreprocessing, read_image
from monai_jointdiff.data.restoring import OriginalGrid, nifti_bytes, original_grid
from monai_jointdiff.data.volumes import ImageFiles
from tests.bundles.runs import temporary_folder
from tests.data.test_reading import AXIS_CODES, affine_of, pixels, save_dicom

_, has_pydicom = optional_import("pydicom")

DATA = os.environ.get("JOINTDIFF_DATA")
ORIGINALS = Path(DATA or ".") / "originals"
NEEDS_DATA = "set JOINTDIFF_DATA to the folder with the test data"


def smooth(*shape: int) -> np.ndarray:
    """Without detail that scaling would lose, and unlike any of its flips and transpositions; in [-1, 1]."""
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    wave = sum((k + 1) * axis + (0.5 - axis) ** 2 for k, axis in enumerate(axes))
    return (2 * (wave - wave.min()) / (wave.max() - wave.min()) - 1).astype(np.float32)


def written(case: unittest.TestCase, image: np.ndarray, grid: OriginalGrid) -> Path:
    path = temporary_folder(case) / "written.nii.gz"
    path.write_bytes(nifti_bytes(image, grid))
    return path


class TestRestore(unittest.TestCase):
    @parameterized.expand(
        [
            ("wide", (20, 40), (16, 16)),
            ("tall_to_wide", (50, 30), (16, 24)),
            ("smaller_than_the_model", (9, 12), (24, 24)),
            ("odd", (33, 21), (17, 16)),
            ("same", (16, 16), (16, 16)),
            ("volume", (10, 24, 18), (16, 16, 16)),
            ("flat_volume", (3, 30, 40), (12, 24, 24)),
        ]
    )
    def test_image_comes_back_to_its_place(self, _: str, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
        image = smooth(*shape)[None]
        prepared = ImagePreprocessing(len(shape), size, 1, {"float_range": [-1, 1]})(image).numpy()
        grid = OriginalGrid.of_array(shape)
        restored = grid.restore(prepared)
        self.assertEqual(restored.shape, image.shape)
        self.assertLess(np.abs(restored - image).mean(), 0.07)  # two slices of the model hold three of the flat one
        for axis in range(1, image.ndim):
            self.assertGreater(np.abs(np.flip(restored, axis) - image).mean(), 0.1)

    def test_single_pixel_comes_back_where_it_was(self) -> None:
        """20 x 40 goes into 16 x 16 as rows 4 to 11: pixel (8, 3) of the model is rows 10 to 12, columns 7 to 10."""
        image = np.zeros((1, 16, 16), np.float32)
        image[0, 8, 3] = 1
        restored = OriginalGrid.of_array((20, 40)).restore(image)[0]
        rows, columns = np.indices(restored.shape)
        self.assertAlmostEqual(float((rows * restored).sum() / restored.sum()), (8 - 4 + 0.5) * 2.5 - 0.5, places=1)
        self.assertAlmostEqual(float((columns * restored).sum() / restored.sum()), (3 + 0.5) * 2.5 - 0.5, places=1)

    def test_same_size_loses_nothing(self) -> None:
        image = np.random.default_rng(0).normal(size=(2, 7, 9)).astype(np.float32)
        np.testing.assert_array_equal(OriginalGrid.of_array((7, 9)).restore(image), image)

    def test_padding_of_the_model_never_comes_back(self) -> None:
        image = np.full((1, 16, 16), 100.0, np.float32)
        image[:, 4:12] = 1.0
        np.testing.assert_allclose(OriginalGrid.of_array((20, 40)).restore(image), 1.0, rtol=1e-5)

    def test_pixels_that_are_not_square(self) -> None:
        """Rows 4 mm apart: 10 x 40 pixels are a square in millimeters."""
        grid = OriginalGrid((10, 40), (4.0, 1.0), (1, 0), (False, False))
        image = np.broadcast_to(np.arange(16.0)[:, None], (1, 16, 16)).astype(np.float32)
        restored = grid.restore(image)
        self.assertEqual(restored.shape, (1, 10, 40))
        np.testing.assert_allclose(restored[0, 1:-1, 0], (np.arange(10)[1:-1] + 0.5) * 1.6 - 0.5, atol=0.1)

    def test_wrong_input(self) -> None:
        with self.assertRaisesRegex(ValueError, "2 spatial axes expected, got shape .1, 4, 4, 4."):
            OriginalGrid.of_array((4, 4)).restore(np.zeros((1, 4, 4, 4), np.float32))
        with self.assertRaisesRegex(TypeError, "a file or an array expected, got int"):
            original_grid(3, 2)  # type: ignore[arg-type]
        with self.assertRaisesRegex(ValueError, "pictures lie in no patient"):
            nifti_bytes(np.zeros((1, 4, 4), np.float32), OriginalGrid.of_array((4, 4)))


class TestFiles(unittest.TestCase):
    @parameterized.expand([(codes,) for codes in AXIS_CODES])
    def test_nifti_has_the_axes_and_the_affine_of_the_file(self, codes: tuple[str, ...]) -> None:
        path = temporary_folder(self) / "volume.nii.gz"
        affine = affine_of(codes, (1.0, 2.0, 3.0))
        affine[:3, 3] = (-10, 20, 30)
        array = pixels(4, 5, 6, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
        canonical = read_image(path, 3)
        grid = original_grid(path, 3)
        self.assertEqual(grid.shape, canonical.shape[1:])
        np.testing.assert_array_equal(grid.in_file_order(canonical), array)
        back = nibabel.load(written(self, canonical.astype(np.float32), grid))
        np.testing.assert_array_equal(np.asanyarray(back.dataobj), array)
        np.testing.assert_allclose(back.affine, affine)

    @parameterized.expand([(codes,) for codes in AXIS_CODES])
    def test_spacing_is_that_of_the_canonical_axes(self, codes: tuple[str, ...]) -> None:
        """The model sees the same, and what it sees comes back to where it was."""
        path = temporary_folder(self) / "volume.nii"
        array = smooth(12, 14, 10)
        nibabel.save(nibabel.Nifti1Image(array, affine_of(codes, (1.0, 2.0, 3.0))), path)
        prepared = ImagePreprocessing(3, 32, 1, {"float_range": [-1, 1]})(path).numpy()
        grid = original_grid(path, 3)
        back = grid.in_file_order(grid.restore(prepared))
        self.assertEqual(back.shape, array.shape)
        self.assertLess(np.abs(back - array).mean(), 0.05)

    def test_axes_without_meaning_stay_without(self) -> None:
        path = temporary_folder(self) / "array.nii"
        array = pixels(4, 5, 6, dtype=np.int16)
        file = nibabel.Nifti1Image(array, None)
        file.header.set_zooms((1.0, 2.0, 3.0))
        nibabel.save(file, path)
        canonical = read_image(path, 3)
        grid = original_grid(path, 3)
        copy = written(self, canonical.astype(np.float32), grid)
        np.testing.assert_array_equal(read_image(copy, 3), canonical)
        back, first = nibabel.load(copy), nibabel.load(path)
        np.testing.assert_allclose(back.affine, first.affine)
        self.assertEqual((int(back.header["sform_code"]), int(back.header["qform_code"])), (0, 0))
        self.assertEqual(back.header.get_zooms(), first.header.get_zooms())

    def test_channels_come_last(self) -> None:
        path = temporary_folder(self) / "two.nii.gz"
        array = pixels(4, 5, 6, 2, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(array, affine_of(("S", "R", "P"))), path)
        canonical = read_image(path, 3, in_channels=2)
        np.testing.assert_array_equal(original_grid(path, 3).in_file_order(canonical), array)

    @parameterized.expand([((4, 5, 1),), ((4, 1, 6),), ((4, 5),)])
    def test_single_slice(self, shape: tuple[int, ...]) -> None:
        path = temporary_folder(self) / "slice.nii"
        array = pixels(*shape, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(array, affine_of(("L", "P", "S"), (1.0, 2.0, 3.0))), path)
        canonical = read_image(path, 2)
        grid = original_grid(path, 2)
        self.assertEqual(grid.shape, canonical.shape[1:])
        np.testing.assert_array_equal(grid.in_file_order(canonical), array)

    @parameterized.expand([(codes, axis) for codes in AXIS_CODES for axis in range(3)])
    def test_slice_of_a_volume_lies_where_it_was_cut(self, codes: tuple[str, ...], axis: int) -> None:
        """Each voxel of the slice has the value and the place of that voxel in the volume."""
        path = temporary_folder(self) / "volume.nii"
        affine = affine_of(codes, (1.0, 2.0, 3.0))
        affine[:3, 3] = (-10, 20, 30)
        array = np.random.default_rng(0).permutation(4 * 5 * 6).reshape(4, 5, 6).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
        cut = np.take(read_image(path, 3), 1, axis=axis + 1).astype(np.float32)
        grid = original_grid(ImageFiles((path, path), axis, 1), 2)
        self.assertEqual(grid.shape, cut.shape[1:])
        back = nibabel.load(written(self, np.concatenate([cut, cut]), grid))
        values = np.asanyarray(back.dataobj)
        self.assertEqual((values.ndim, values.size), (4, 2 * cut.size))
        for index in np.ndindex(values.shape[:3]):
            place = back.affine @ [*index, 1]
            voxel = np.argwhere(array == values[(*index, 0)])[0]
            np.testing.assert_allclose(affine @ [*voxel, 1], place, atol=1e-4)

    def test_several_files_lie_as_the_first(self) -> None:
        path = temporary_folder(self) / "volume.nii"
        nibabel.save(nibabel.Nifti1Image(pixels(4, 5, 6), affine_of(("L", "P", "S"))), path)
        self.assertEqual(original_grid(ImageFiles((path, path)), 3).shape, original_grid(path, 3).shape)

    @parameterized.expand([("a.png", "L"), ("a.jpg", "RGB"), ("a.tif", "L")])
    def test_pictures(self, name: str, mode: str) -> None:
        path = temporary_folder(self) / name
        Image.fromarray(pixels(5, 9)).convert(mode).save(path)
        grid = original_grid(path, 2)
        self.assertEqual((grid.shape, grid.affine), ((5, 9), None))

    @parameterized.expand([("jpg", 1), ("jpg", 6), ("png", 3), ("png", 8)])
    def test_pictures_lie_upright(self, ending: str, orientation: int) -> None:
        path, exif = temporary_folder(self) / f"a.{ending}", Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels(20, 40)).save(path, exif=exif)
        self.assertEqual(original_grid(path, 2).shape, read_image(path).shape[1:])
        self.assertEqual(original_grid(path, 2).shape, (40, 20) if orientation in (6, 8) else (20, 40))

    def test_arrays(self) -> None:
        self.assertEqual(original_grid(np.zeros((3, 5, 9)), 2).shape, (5, 9))
        volume = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
        grid = original_grid(volume, 3)
        np.testing.assert_array_equal(read_image(written(self, volume, grid), 3), volume)

    @unittest.skipUnless(has_pydicom, "needs pydicom")
    def test_dicom_slice(self) -> None:
        path = save_dicom(temporary_folder(self) / "one.dcm", array := pixels(6, 9, dtype=np.uint16))
        grid = original_grid(path, 2)
        self.assertEqual(grid.shape, (6, 9))
        back = nibabel.load(written(self, read_image(path).astype(np.float32), grid))
        np.testing.assert_array_equal(np.asanyarray(back.dataobj)[..., 0], array.T)

    def test_same_bytes_for_the_same_image(self) -> None:
        grid = OriginalGrid.of_array((3, 4, 5))
        image = np.ones((1, 3, 4, 5), np.float32)
        self.assertEqual(nifti_bytes(image, grid), nifti_bytes(image, grid))


@unittest.skipUnless(DATA, NEEDS_DATA)
class TestRealFiles(unittest.TestCase):
    @parameterized.expand(
        [
            ("nifti_monai/anatomical.nii", 3),
            ("nifti_monai/reoriented_anat_moved.nii", 3),
            ("nrrd/prostate_phantom_subvolume.nrrd", 3),
            ("dicom/brain_T1post_series", 3),
            ("dicom/cxr/Fake_MONOHR1.dcm", 2),
        ]
    )
    def test_written_copy_is_read_as_the_file(self, name: str, spatial_dims: int) -> None:
        """The copy has other bytes, another format even; what is read from it lies as in the original."""
        path = ORIGINALS / name
        canonical = read_image(path, spatial_dims).astype(np.float32)
        copy = written(self, canonical, original_grid(path, spatial_dims))
        np.testing.assert_array_equal(read_image(copy, spatial_dims), canonical)
        if name.endswith((".nii", ".nii.gz")):
            one, two = nibabel.load(path), nibabel.load(copy)
            np.testing.assert_allclose(one.affine, two.affine, atol=1e-4)
            self.assertEqual(one.shape, two.shape)


if __name__ == "__main__":
    unittest.main()
