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

"""What every bundle must be: of MONAI's format, described rightly, and told as it is."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import unittest
import warnings
from pathlib import Path
from typing import Any

import monai
from parameterized import parameterized

from monai_jointdiff.data import open_source
from monai_jointdiff.engines import ModelDescription
from tests.bundles.default_model import default_description
from tests.bundles.runs import PHANTOMS, ROOT, TINY, leave_no_trace, temporary_folder, working_directory

BUNDLES = sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/train.json"))
NAMES = [(bundle.name, bundle) for bundle in BUNDLES]
OTHERS = {"metadata", "logging", "default_model", "label_efficiency"}  # the last runs trainings, and has no network
CONFIGS = sorted(ROOT.glob("bundles/*/configs/*.json"))
RUN = [path for path in CONFIGS if path.stem not in ("metadata", "default_model")]
SWITCHES = ("progress", "preflight", "tf32", "amp", "compile", "freeze_encoder")
PROGRAMS = [
    (f"{bundle.name}_{path.stem}", bundle, path.stem)
    for bundle in BUNDLES
    for path in sorted(bundle.glob("configs/*.json"))
    if path.stem not in OTHERS and "train" not in path.stem.split("_")  # overlays of train.json are no programs
]


def setUpModule() -> None:
    leave_no_trace()


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


class TestUsualColumns(unittest.TestCase):
    @parameterized.expand([(f"{path.parts[-3]}_{path.stem}", path) for path in CONFIGS])
    def test_are_the_columns_which_the_program_names(self, _: str, path: Path) -> None:
        """Data without columns are refused only if the user named one."""
        options, usual = content(path), inspect.signature(open_source).parameters
        if not str(options.get("source", {}).get("_target_", "")).endswith(".open_source"):
            return
        named = {name: value for name, value in options.items() if name in usual and name.endswith("_column")}
        expected = {name: value for name, value in named.items() if value != usual[name].default}
        self.assertEqual(options["source"].get("usual_columns", {}), expected)


class TestPrograms(unittest.TestCase):
    @parameterized.expand([*[(f"{name}_train", bundle, "train") for name, bundle in NAMES], *PROGRAMS])
    def test_has_every_property_that_monai_checks(self, _: str, bundle: Path, program: str) -> None:
        folder = temporary_folder(self)
        options: dict[str, Any] = {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / "output")}
        few = {**TINY, **PHANTOMS, "balance": "none"}  # too few to hold every class of every bundle
        options |= few if program == "train" else {"progress": False, "allow_untrained": True}
        with working_directory(ROOT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            workflow = monai.bundle.create_workflow(
                config_file=str(bundle / "configs" / f"{program}.json"),
                workflow_type="train" if program == "train" else "infer",
                logging_file=False,
                **options,
            )
            self.assertEqual(workflow.check_properties(), [])

    @parameterized.expand([(f"{path.parent.parent.name}_{path.stem}", path) for path in CONFIGS])
    def test_false_on_the_command_line_is_false(self, _: str, path: Path) -> None:
        """`monai.bundle run` hands on `--progress false` as a text, which an expression by itself finds true."""
        raw = rf"(?<!json_word\()@({'|'.join(SWITCHES)})\b"
        self.assertEqual(re.findall(raw, path.read_text(encoding="utf-8")), [])

    @parameterized.expand([(f"{path.parent.parent.name}_{path.stem}", path) for path in RUN])
    def test_null_on_the_command_line_is_null(self, _: str, path: Path) -> None:
        """As a text it would be the name of a file, or a number that cannot be compared."""
        overlaid = content(path.with_name("train.json")) if "train" in path.stem.split("_") else {}
        names = {name for name, value in {**overlaid, **content(path)}.items() if value is None}
        self.assertTrue(names)
        raw = rf"(?<!json_word\()@({'|'.join(names)})\b"
        self.assertEqual(re.findall(raw, path.read_text(encoding="utf-8")), [])

    @parameterized.expand(NAMES)
    def test_several_processes_check_what_one_does(self, _: str, bundle: Path) -> None:
        one, several = (
            re.findall(r"engines\.(\w+)", " ".join(content(bundle / "configs" / f"{name}.json")["initialize"]))
            for name in ("train", "multi_gpu_train")
        )
        self.assertIn("check_channels", one)
        self.assertEqual(several, one)

    @parameterized.expand(NAMES)
    def test_judges_of_counterfactuals_take_batches_of_the_size_asked_for(self, _: str, bundle: Path) -> None:
        handlers = content(bundle / "configs" / "counterfactual.json")["handlers"]
        (writer,) = (one for one in handlers if one["_target_"].endswith("CounterfactualWriter"))
        self.assertEqual(writer["batch_size"], "@batch_size")

    def test_a_switch_that_is_off(self) -> None:
        parser = monai.bundle.ConfigParser(content(BUNDLES[0] / "configs" / "train.json"))
        parser["progress"] = "false"
        handlers = parser["train"]["handlers"]
        bar = next(n for n, one in enumerate(handlers) if one["_target_"].endswith("ProgressBar"))
        self.assertIs(parser.get_parsed_content(f"train#handlers#{bar}#_disabled_"), True)

    @parameterized.expand(PROGRAMS)
    def test_untrained_network_is_as_metadata_says(self, _: str, bundle: Path, program: str) -> None:
        with working_directory(ROOT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monai.bundle.verify_net_in_out(
                net_id="network_def",
                meta_file=str(bundle / "configs" / "metadata.json"),
                config_file=str(bundle / "configs" / f"{program}.json"),
                device="cpu",
                ckpt_dir=str(temporary_folder(self)),
            )


class TestDescription(unittest.TestCase):
    def test_there_are_bundles(self) -> None:
        self.assertLessEqual({"chest_xray", "brain_mri", "skin_lesion"}, {bundle.name for bundle in BUNDLES})

    @parameterized.expand(NAMES)
    def test_metadata_follow_monais_schema(self, _: str, bundle: Path) -> None:
        schema = os.environ.get("JOINTDIFF_META_SCHEMA")
        if schema is None:
            self.skipTest("JOINTDIFF_META_SCHEMA does not say where MONAI's meta_schema_20240725.json is")
        copy = temporary_folder(self) / "schema.json"
        shutil.copy(schema, copy)
        monai.bundle.verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(copy))

    @parameterized.expand(NAMES)
    def test_metadata_have_the_required_keys(self, name: str, bundle: Path) -> None:
        metadata = content(bundle / "configs" / "metadata.json")
        required = ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "task"]
        required += ["required_packages_version", "description", "authors", "copyright", "network_data_format"]
        required += ["name", "changelog"]
        self.assertEqual([key for key in required if not metadata.get(key)], [])
        self.assertIn(metadata["version"], metadata["changelog"])
        self.assertEqual(metadata["name"], name)

    @parameterized.expand(NAMES)
    def test_metadata_describe_the_default_model(self, _: str, bundle: Path) -> None:
        default = ModelDescription.load(bundle / "configs" / "default_model.json")
        formats = content(bundle / "configs" / "metadata.json")["network_data_format"]
        image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
        self.assertEqual((image["num_channels"], *image["spatial_shape"]), default.image_shape)
        self.assertEqual([pred["channel_def"][str(k)] for k in range(pred["num_channels"])], default.class_names)

    @parameterized.expand(NAMES)
    def test_default_model_is_what_train_json_gives(self, _: str, bundle: Path) -> None:
        default = default_description(bundle)
        stored = ModelDescription.load(bundle / "configs" / "default_model.json")
        remedy = "configs/default_model.json is not what train.json gives; python -m tests.bundles.default_model"
        for part in ("network", "scheduler", "data", "decision", "trained"):
            one, two = (json.loads(json.dumps(vars(d)[part], default=vars)) for d in (stored, default))
            self.assertEqual(one, two, f"{remedy} writes it anew: '{part}' differs")

    @parameterized.expand(NAMES)
    def test_short_paths_are_links_to_the_configurations(self, _: str, bundle: Path) -> None:
        configs = {path.name for path in (bundle / "configs").iterdir()} - {"default_model.json"}
        self.assertEqual({path.name for path in bundle.iterdir() if path.is_symlink()}, configs)
        for name in configs:
            self.assertEqual(os.readlink(bundle / name), os.path.join("configs", name))

    @parameterized.expand(NAMES)
    def test_every_option_of_the_readme_is_one_of_the_programs(self, _: str, bundle: Path) -> None:
        table = (bundle / "docs" / "README.md").read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
        known = {key for path in bundle.glob("configs/*.json") for key in content(path)}
        first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
        named = {part.strip(" `-") for cell in first_cells for part in cell.split(",")}
        self.assertTrue(named)
        self.assertEqual(named - known, set())


if __name__ == "__main__":
    unittest.main()
