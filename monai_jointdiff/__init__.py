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

"""Joint diffusion models for medical images: one network that generates, classifies and explains, on MONAI.

The subpackages follow the theory: :mod:`networks <monai_jointdiff.networks>` (what is learned),
:mod:`schedulers <monai_jointdiff.schedulers>` (noise over time), :mod:`losses <monai_jointdiff.losses>` (what is
minimised), :mod:`inferers <monai_jointdiff.inferers>` (what is asked). Around them stand ``data``, ``transforms``,
``metrics``, ``engines``, ``handlers`` and ``visualize``. Importing this module alone imports none of them.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
