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

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data.folder import find_images, read_folder
from monai_jointdiff.visualize import save_png
from tests.bundles.runs import temporary_folder


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
        ]
    )
    def test_wrong_tables(self, text: str, options: dict[str, str], message: str) -> None:
        self.table(text)
        with self.assertRaisesRegex(ValueError, message):
            read_folder(self.folder, **options)  # type: ignore[arg-type]

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


if __name__ == "__main__":
    unittest.main()
