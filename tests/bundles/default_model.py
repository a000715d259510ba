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

"""`configs/default_model.json` of a bundle: the untrained network that its `train.json` describes without any option.

`python -m tests.bundles.default_model` in the root of the repository writes those of all bundles anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from monai.bundle import ConfigParser

from monai_jointdiff.engines import ModelDescription

BUNDLES = Path(__file__).parents[2] / "bundles"
BUNDLE = BUNDLES / "chest_xray"


def default_description(bundle: Path = BUNDLE) -> ModelDescription:
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "train.json")
    return replace(parser.get_parsed_content("description"), trained=False)


if __name__ == "__main__":
    for config in sorted(BUNDLES.glob("*/configs/train.json")):
        default_description(config.parents[1]).save(config.with_name("default_model.json"))
