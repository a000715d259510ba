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


"""Data sets that are folders."""

from __future__ import annotations

import unittest
from pathlib import Path

import nibabel
import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import ImageFiles, SliceRule, read_image
from monai_jointdiff.data.folder import find_images, list_images, read_folder
from monai_jointdiff.visualize import save_png
from tests.bundles.runs import temporary_folder
from tests.data.test_reading import NEEDS_DATA, ORIGINALS, has_pydicom, pixels, save_dicom, save_frames, save_series


def picture(path: Path, colors: bool = False) -> None:
    generator = np.random.default_rng(len(path.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(generator.integers(0, 256, (5, 7, 3) if colors else (5, 7)).astype(np.uint8), path)


class TestFindImages(unittest.TestCase):
    def test_sorted_with_sub_folders_without_hidden_and_other_files(self) -> None:
        folder = temporary_folder(self)
        for name in ("b.png", "a/z.PNG", "a/y.jpg", ".git/x.png", "a/.thumb.png", "._b.png"):
            picture(folder / name) if name.endswith("png") else (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        for name in ("labels.csv", "README", "no.dat"):
            (folder / name).write_text("text", encoding="utf-8")
        found = [path.relative_to(folder).as_posix() for path in find_images(folder)]
        self.assertEqual(found, ["a/y.jpg", "a/z.PNG", "b.png"])

    def test_dicom_is_known_by_its_content(self) -> None:
        folder = temporary_folder(self)
        for name in ("1.2.826.0.1", "scan", "IM.ima"):
            (folder / name).write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 10)
        (folder / "short").write_bytes(b"DICM")
        self.assertEqual([path.name for path in find_images(folder)], ["1.2.826.0.1", "IM.ima", "scan"])


class TestByFolders(unittest.TestCase):
    def test_classes_and_unlabelled_images(self) -> None:
        folder = temporary_folder(self)
        for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png", "3.png"):
            picture(folder / name)
        records = read_folder(folder).records
        found = {record.name: (record.label, record.part) for record in records}
        expected = {"cat/1.png": "cat", "cat/deep/2.png": "cat", "dog/1.png": "dog", "3.png": None}
        self.assertEqual(found, {name: (label, None) for name, label in expected.items()})

    def test_parts(self) -> None:
        folder = temporary_folder(self)
        for name in ("train/cat/1.png", "Validation/dog/1.png", "test/1.png"):
            picture(folder / name)
        found = {record.name: (record.label, record.part) for record in read_folder(folder).records}
        expected = {"train/cat/1.png": ("cat", "train"), "Validation/dog/1.png": ("dog", "val")}
        self.assertEqual(found, {**expected, "test/1.png": (None, "test")})

    @parameterized.expand([(False, 1), (True, 3)])
    def test_channels(self, colors: bool, expected: int) -> None:
        folder = temporary_folder(self)
        picture(folder / "a.png", colors)
        self.assertEqual(read_folder(folder).in_channels, expected)

    def test_gray_pictures_stored_as_colors_have_one_channel(self) -> None:
        folder = temporary_folder(self)
        save_png(np.repeat(np.arange(35, dtype=np.uint8).reshape(5, 7, 1), 3, axis=2), folder / "a.png")
        self.assertEqual(read_folder(folder).in_channels, 1)

    def test_empty_folder_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "read_folder: .* holds no images"):
            read_folder(temporary_folder(self))


@unittest.skipUnless(has_pydicom, "needs pydicom")
class TestSeries(unittest.TestCase):
    """In 3D the folder of a DICOM series is one image; in 2D each of its files is."""

    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.arrays = {
            name: pixels(4, 6, 9, dtype=np.uint16, seed=n) for n, name in enumerate(("a/p0", "a/p1", "b/p2/s"))
        }
        for name, array in self.arrays.items():
            save_series(self.folder / name, array)

    def test_class_folders(self) -> None:
        records = read_folder(self.folder, 3).records
        expected = {"a/p0": "a", "a/p1": "a", "b/p2/s": "b"}
        self.assertEqual({record.name: record.label for record in records}, expected)
        for record in records:
            self.assertEqual(record.image, self.folder / record.name)
            np.testing.assert_array_equal(read_image(self.folder / record.name, 3)[0], self.arrays[record.name])
        self.assertEqual(len(read_folder(self.folder, 2).records), 12)

    def test_list_for_classification(self) -> None:
        self.assertEqual([record.name for record in list_images(self.folder, spatial_dims=3)], sorted(self.arrays))
        self.assertEqual(len(list_images(self.folder)), 12)
        (record,) = list_images(self.folder / "a" / "p1", spatial_dims=3)
        self.assertEqual((record.name, record.image), ("p1", self.folder / "a" / "p1"))

    def test_other_volumes_stay_what_they_are(self) -> None:
        """Beside a series, and DICOM files that are volumes by themselves."""
        nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), np.eye(4)), self.folder / "a" / "p0" / "x.nii")
        for name in ("one.dcm", "two.dcm"):
            (self.folder / "c").mkdir(exist_ok=True)
            save_frames(self.folder / "c" / name, pixels(4, 6, 9, dtype=np.uint16))
        names = [record.name for record in read_folder(self.folder, 3).records]
        self.assertEqual(names, ["a/p0", "a/p0/x.nii", "a/p1", "b/p2/s", "c/one.dcm", "c/two.dcm"])

    def test_folders_with_a_series_for_each_channel(self) -> None:
        folder = temporary_folder(self)
        for place in ("sick/case0", "well/case1"):
            for word in ("flair", "t1c"):
                save_series(folder / place / word, pixels(4, 6, 9, dtype=np.uint16))
        records = read_folder(folder, 3, "flair,t1c").records
        self.assertEqual(
            [(record.label, record.patient) for record in records], [("sick", "sick/case0"), ("well", "well/case1")]
        )
        place = folder / "sick" / "case0"
        self.assertEqual(records[0].image, ImageFiles((place / "flair", place / "t1c")))

    def test_a_csv_names_the_folder(self) -> None:
        (self.folder / "labels.csv").write_text("file,label\na/p1,x\n", encoding="utf-8")
        (record,) = read_folder(self.folder, 3).records
        self.assertEqual((record.name, read_image(self.folder / record.name, 3).shape), ("a/p1", (1, 4, 6, 9)))

    def test_slices_without_a_folder_of_their_own_are_refused(self) -> None:
        """Of several patients in one class folder: there is one image, which cannot be read."""
        save_dicom(self.folder / "a" / "one.dcm", pixels(6, 9, dtype=np.uint16))
        save_series(self.folder / "a", pixels(4, 6, 9, dtype=np.uint16))
        records = read_folder(self.folder, 3).records
        self.assertEqual([record.name for record in records], ["a", "a/p0", "a/p1", "b/p2/s"])
        with self.assertRaisesRegex(ValueError, "more than one DICOM series"):
            read_image(self.folder / "a", 3)

    @unittest.skipUnless(ORIGINALS.is_dir(), NEEDS_DATA)
    def test_originals(self) -> None:
        series = ORIGINALS / "dicom" / "hippocrop_series"
        (record,) = list_images(series, spatial_dims=3)
        self.assertEqual((record.name, record.image), ("hippocrop_series", series))
        self.assertEqual(read_image(series, 3).shape, (1, 40, 50, 34))
        self.assertEqual(len(list_images(series)), 40)


class TestByCsv(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        for name in ("a.png", "in/b.png"):
            picture(self.folder / name)

    def table(self, text: str, name: str = "labels.csv") -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def test_all_columns(self) -> None:
        self.table("file,label,split,patient\na.png,x,train,7\nin/b.png,,Valid,\n")
        one, two = read_folder(self.folder).records
        self.assertEqual((one.name, one.label, one.part, one.patient), ("a.png", "x", "train", "7"))
        self.assertEqual((two.name, two.label, two.part, two.patient), ("in/b.png", "", "val", None))
        self.assertEqual(one.image, self.folder / "a.png")

    def test_optional_columns_may_be_missing_and_a_byte_order_mark_is_no_part_of_a_name(self) -> None:
        (self.folder / "any.csv").write_text("file,label\na.png,0\n", encoding="utf-8-sig")
        (record,) = read_folder(self.folder).records
        self.assertEqual((record.label, record.part, record.patient), ("0", None, None))

    def test_other_names_and_several_label_columns(self) -> None:
        self.table("image,p,q,part\na.png,1,0,test\n")
        (record,) = read_folder(self.folder, 2, "image", "p, q", "part").records
        self.assertEqual((record.label, record.part), (["1", "0"], "test"))
        (record,) = read_folder(self.folder, 2, "image", ["q"], "part").records
        self.assertEqual(record.label, "0")

    @parameterized.expand(
        [
            ("image,label\na.png,0\n", {}, "labels.csv has no column 'file'; it has image, label. Say which"),
            ("file,label\na.png,0\n", {"label_column": "p,q"}, "no column 'p', 'q'"),
            ("file,label\na.png,0\n", {"split_column": "part"}, "no column 'part'"),
            ("file,label\na.png,0\n", {"patient_column": "id"}, "no column 'id'"),
            ("file,label\na.png,0\nc.png,1\nd.png,1\n", {}, "2 files of labels.csv are not in .*: c.png, d.png"),
            ("file,label\na.png,0\n,1\n", {}, "no file in column 'file' of labels.csv, lines 3"),
            ("file,label\n/etc/hosts,1\n", {}, "'/etc/hosts' is an absolute path outside of"),
            ("file,label\n", {}, "no rows in a CSV"),
            ("file,label,split\na.png,0,holdout\n", {}, "'holdout' is no part of a data set"),
            (
                "file,label,fold\na.png,0,train\nin/b.png,0,holdout\n",
                {"split_column": "fold"},
                r"labels.csv, line 3 \(in/b.png\), column 'fold': .*'holdout' is no part of a data set",
            ),
            ("file,label\na.png,0\n./a.png,0\n", {}, "labels.csv lists files more than once: a.png"),
            ("file,label\nin/b.png,0\nin/../in/b.png,0\n", {}, "lists files more than once: in/b.png"),
        ]
    )
    def test_wrong_tables(self, text: str, options: dict[str, str], message: str) -> None:
        self.table(text)
        with self.assertRaisesRegex(ValueError, message):
            read_folder(self.folder, **options)  # type: ignore[arg-type]

    def test_the_same_file_by_its_absolute_path_is_refused(self) -> None:
        self.table(f"file,label\nin/b.png,0\n{self.folder / 'in' / 'b.png'},0\n")
        with self.assertRaisesRegex(ValueError, "labels.csv lists files more than once: in/b.png"):
            read_folder(self.folder)

    def test_absolute_paths_inside_of_the_folder_become_relative_names(self) -> None:
        self.table(f"file,label\n{self.folder / 'in' / 'b.png'},0\n")
        self.assertEqual([record.name for record in read_folder(self.folder).records], ["in/b.png"])

    def test_table_in_another_encoding_is_named(self) -> None:
        (self.folder / "labels.csv").write_bytes("file,label\na.png,Größe\n".encode("latin-1"))
        with self.assertRaisesRegex(ValueError, "cannot read .*labels.csv' as a CSV in UTF-8"):
            read_folder(self.folder)

    def test_several_tables_need_one_called_labels(self) -> None:
        for name in ("one.csv", "two.csv"):
            self.table("file,label\na.png,0\n", name)
        with self.assertRaisesRegex(ValueError, "several CSV files .one.csv, two.csv.; name the right one labels.csv"):
            read_folder(self.folder)
        self.table("file,label\nin/b.png,1\n")
        self.assertEqual([record.name for record in read_folder(self.folder).records], ["in/b.png"])

    def test_one_file_for_each_channel(self) -> None:
        self.table("flair,t1c,label\na.png,in/b.png,x\n")
        for columns in ("flair, t1c", ["flair", "t1c"], ("flair", "t1c")):
            found = read_folder(self.folder, image_column=columns)
            (record,) = found.records
            self.assertEqual(record.image, ImageFiles((self.folder / "a.png", self.folder / "in/b.png")))
            self.assertEqual((record.name, record.label, found.in_channels), ("a.png", "x", 2))

    def test_masks(self) -> None:
        self.table("file,seg,label\na.png,in/b.png,x\nin/b.png,,y\n")
        one, two = read_folder(self.folder, mask_column="seg").records
        self.assertEqual((one.mask, two.mask), (self.folder / "in" / "b.png", None))

    @parameterized.expand(
        [
            ("flair,t1c,label\na.png,,x\n", "no file in column 't1c' of labels.csv, lines 2"),
            ("flair,t1c,label\na.png,c.png,x\n", "1 files of labels.csv are not in .*: c.png"),
            ("flair,t1c,label\na.png,a.png,x\nin/b.png,a.png,x\n", "lists files more than once: a.png"),
            ("flair,label\na.png,x\n", "has no column 't1c'"),
            ("flair,t1c\na.png,in/b.png\n", "has no column 'label'"),
        ]
    )
    def test_wrong_tables_of_several_files(self, text: str, message: str) -> None:
        self.table(text)
        with self.assertRaisesRegex(ValueError, message):
            read_folder(self.folder, image_column="flair,t1c")

    def test_mask_column_that_is_not_there(self) -> None:
        self.table("file,label\na.png,x\n")
        with self.assertRaisesRegex(ValueError, "has no column 'seg'"):
            read_folder(self.folder, mask_column="seg")


class TestByNames(unittest.TestCase):
    """Without a CSV, folders with a file for each channel."""

    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def files(self, *names: str) -> None:
        for name in names:
            picture(self.folder / name)

    def test_files_are_known_by_a_word_of_their_names(self) -> None:
        case = "ill/BraTS_007/BraTS_007"
        self.files(*(f"{case}_{word}.png" for word in ("FLAIR", "t1", "t1ce", "seg")))
        self.files("val/well/x/flair.png", "val/well/x/a-T1ce-b.png", "notes/flairs.png")
        one, two = read_folder(self.folder, image_column="flair,t1ce", mask_column="seg").records
        self.assertEqual(one.image, ImageFiles(tuple(self.folder / f"{case}_{w}.png" for w in ("FLAIR", "t1ce"))))
        self.assertEqual((one.name, one.label, one.part), (f"{case}_FLAIR.png", "ill", None))
        self.assertEqual((one.patient, one.mask), ("ill/BraTS_007", self.folder / f"{case}_seg.png"))
        self.assertEqual((two.label, two.part, two.patient, two.mask), ("well", "val", "val/well/x", None))

    def test_folder_of_a_single_image_has_no_class(self) -> None:
        self.files("flair.png", "t1c.png")
        (record,) = read_folder(self.folder, image_column="flair,t1c").records
        self.assertEqual((record.name, record.label), ("flair.png", None))

    def test_missing_and_ambiguous_files_are_named(self) -> None:
        self.files("x/flair.png")
        with self.assertRaisesRegex(ValueError, "x' has no file with 't1c' in its name"):
            read_folder(self.folder, image_column="flair,t1c")
        self.files("x/t1c_a.png", "x/t1c_b.png")
        with self.assertRaisesRegex(ValueError, "several files with 't1c' in their names: t1c_a.png, t1c_b.png"):
            read_folder(self.folder, image_column="flair,t1c")

    def test_folder_without_such_files_is_refused(self) -> None:
        self.files("x/a.png")
        with self.assertRaisesRegex(ValueError, "no sub-folder with one for each of flair, t1c and no rows"):
            read_folder(self.folder, image_column="flair,t1c")


class TestSlices(unittest.TestCase):
    """Volumes (columns, rows, depth) of 6 x 5 x 8, bright from slice 2 to 6, with a mask in slices 3 and 4."""

    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        mask = np.zeros((6, 5, 8), np.uint8)
        mask[1:5, 1:4, 3], mask[0, 0, 4] = 2, 1
        for n in range(2):
            for name in ("flair", "t1c"):
                volume = np.zeros((6, 5, 8), np.float32)
                volume[..., 2:7] = np.random.default_rng(n).normal(10, 1, (6, 5, 5))
                self.save(f"p{n}/{name}.nii.gz", volume)
            self.save(f"p{n}/seg.nii.gz", mask * (n == 0))

    def save(self, name: str, array: np.ndarray) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), self.folder / name)

    def table(self, header: str, *ends: str) -> None:
        rows = [f"p{n}/flair.nii.gz,p{n}/t1c.nii.gz{end}" for n, end in enumerate(ends)]
        (self.folder / "labels.csv").write_text("\n".join([header, *rows]), encoding="utf-8")

    def test_class_of_the_mask(self) -> None:
        self.table("flair,t1c,seg", ",p0/seg.nii.gz", ",p1/seg.nii.gz")
        rule = SliceRule(0, classes=("well", "ill"))
        found = read_folder(self.folder, 2, "flair,t1c", mask_column="seg", slices=rule)
        labels = {record.name: record.label for record in found.records}
        first = {f"p0/flair.nii.gz#slice_{n:03d}": "ill" if n == 3 else "well" for n in (2, 3, 5, 6)}
        second = {f"p1/flair.nii.gz#slice_{n:03d}": "well" for n in (2, 3, 4, 5, 6)}
        self.assertEqual(labels, {**first, **second})
        self.assertEqual((found.in_channels, found.class_names), (2, ["well", "ill"]))
        files = tuple(self.folder / "p0" / f"{name}.nii.gz" for name in ("flair", "t1c"))
        self.assertEqual(found.records[1].image, ImageFiles(files, 0, 3))
        self.assertEqual(found.records[1].mask, ImageFiles((self.folder / "p0" / "seg.nii.gz",), 0, 3))

    def test_class_of_the_volume_and_its_patient(self) -> None:
        self.table("flair,t1c,label,patient,split", ",a,7,train", ",b,,test")
        found = read_folder(self.folder, 2, "flair,t1c", slices=SliceRule(0, every=2))
        seen = [(record.label, record.patient, record.part) for record in found.records]
        self.assertEqual(seen, [("a", "7", "train")] * 3 + [("b", "p1/flair.nii.gz", "test")] * 3)
        self.assertIsNone(found.class_names)

    def test_without_a_table(self) -> None:
        found = read_folder(self.folder, 2, "flair,t1c", mask_column="seg", slices=SliceRule(0))
        self.assertEqual({record.patient for record in found.records}, {"p0", "p1"})
        self.assertEqual([r.label for r in found.records], ["absent", "present", *["absent"] * 7])

    def test_2d_images_stay_whole(self) -> None:
        folder = temporary_folder(self)
        picture(folder / "a" / "1.png")
        nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 1), np.float32), np.eye(4)), folder / "a" / "2.nii")
        names = [record.name for record in read_folder(folder, slices=SliceRule(0)).records]
        self.assertEqual(names, ["a/1.png", "a/2.nii"])

    def test_all_bad_volumes_are_named(self) -> None:
        self.table("flair,t1c,seg", ",p0/seg.nii.gz", ",p1/seg.nii.gz")
        self.save("p0/seg.nii.gz", np.zeros((6, 5, 7), np.uint8))
        self.save("p1/t1c.nii.gz", np.zeros((5, 5, 8), np.float32))
        with self.assertRaises(ValueError) as caught:
            read_folder(self.folder, 2, "flair,t1c", mask_column="seg", slices=SliceRule(0))
        text = str(caught.exception)
        self.assertIn("2 volumes cannot be cut into slices:", text)
        self.assertRegex(text, r"\n  p0/flair.nii.gz: the shape of its mask '.*seg.nii.gz' is \(7, 5, 6\)")
        self.assertRegex(text, r"\n  p1/flair.nii.gz: .*t1c.nii.gz': its shape is \(8, 5, 5\)")

    def test_list_for_classification(self) -> None:
        rule = SliceRule(0, every=3)
        expected = [f"p{p}/flair.nii.gz#slice_{n:03d}" for p in (0, 1) for n in (3, 6)]
        names = [record.name for record in list_images(self.folder, ["flair", "t1c"], rule)]
        self.assertEqual(names, expected)  # also slices that a mask would leave out
        self.table("flair,t1c,kind", ",a", ",b")
        records = list_images(self.folder, "flair,t1c", rule)
        self.assertEqual([record.name for record in records], expected)
        self.assertEqual({record.label for record in records}, {None})
        single = list_images(self.folder / "p0" / "flair.nii.gz", "file", rule)
        self.assertEqual([record.name for record in single], ["flair.nii.gz#slice_003", "flair.nii.gz#slice_006"])
        whole = list_images(self.folder)
        self.assertEqual(len(whole), 6)
        self.assertEqual(whole[0].image, self.folder / "p0" / "flair.nii.gz")

    def test_list_with_masks(self) -> None:
        """By words of the names, or by a table, also of one channel; each slice has that of its volume."""
        rule = SliceRule(0, every=3)
        expected = [(f"p{p}/flair.nii.gz#slice_{n:03d}", p, n) for p in (0, 1) for n in (3, 6)]
        for columns in ("flair,t1c", "flair"):
            for table in (False, True):
                if table:
                    self.table("flair,t1c,seg", ",p0/seg.nii.gz", ",p1/seg.nii.gz")
                found = list_images(self.folder, columns, rule, "seg")
                self.assertEqual([record.name for record in found], [name for name, _, _ in expected])
                for record, (_, p, n) in zip(found, expected, strict=True):
                    self.assertEqual(record.mask, ImageFiles((self.folder / f"p{p}" / "seg.nii.gz",), 0, n))
            (self.folder / "labels.csv").unlink()

    def test_masks_that_are_missing_are_named(self) -> None:
        (self.folder / "p1" / "seg.nii.gz").unlink()
        with self.assertRaisesRegex(
            ValueError, r"--mask_column seg finds no mask for 1 of 2 images \(p1/flair.nii.gz\)"
        ):
            list_images(self.folder, "flair,t1c", None, "seg")
        with self.assertRaisesRegex(ValueError, "the words file and seg are looked for"):
            list_images(self.folder, mask_column="seg")

    def test_names_of_the_channels(self) -> None:
        self.assertEqual(read_folder(self.folder, 3, "flair,t1c").channel_names, ["flair", "t1c"])
        self.assertIsNone(read_folder(self.folder, 3).channel_names)


if __name__ == "__main__":
    unittest.main()
