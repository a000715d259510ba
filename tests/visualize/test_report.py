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


from __future__ import annotations

import base64
import io
import re
import unittest
from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_jointdiff.metrics import counterfactual_figures
from monai_jointdiff.visualize import CounterfactualCase, counterfactual_report, png_bytes
from tests.visualize.counterfactuals import known_result

pil_image, has_pillow = optional_import("PIL.Image")

# void elements have no end tag
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """A page taken apart: its elements, its texts, and whether every element that was opened was closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: list[str] = []  # of style and script
        self._open: list[str] = []
        self.feed(html)
        self.close()
        if self._open:
            raise AssertionError(f"never closed: {self._open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open.pop() != tag:
            raise AssertionError(f"</{tag}> closes another element")

    def handle_data(self, data: str) -> None:
        (self.code if self._open and self._open[-1] in ("style", "script") else self.texts).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check_self_contained(case: unittest.TestCase, html: str) -> Page:
    """Nothing is loaded from anywhere, pictures are embedded and described, and it is readable on a phone."""
    page = Page(html)
    for attributes in page.all("img"):
        kind, content = (attributes["src"] or "").split(",", 1)
        case.assertEqual(kind, "data:image/png;base64")
        with pil_image.open(io.BytesIO(base64.b64decode(content, validate=True))) as picture:
            case.assertEqual(picture.size, (int(attributes["width"] or 0), int(attributes["height"] or 0)))
        case.assertTrue(attributes["alt"])
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    for forbidden in ("http:", "https:", "//", "url(", "@import", "file:"):
        case.assertNotIn(forbidden, without_pictures)
    for tag in ("link", "iframe", "object", "embed"):
        case.assertEqual(page.all(tag), [])
    case.assertTrue(all("src" not in attributes for attributes in page.all("script")))
    case.assertIn({"name": "viewport", "content": "width=device-width, initial-scale=1"}, page.all("meta"))
    style = "".join(page.code)
    case.assertRegex(style, r"@media \(max-width: 700px\)")
    case.assertIn("@media (prefers-color-scheme: dark)", style)
    return page


def cases(count: int = 3, **options: Any) -> list[CounterfactualCase]:
    images = np.random.default_rng(0).uniform(-1, 1, (count, 1, 8, 8))
    change = np.linspace(0.1, 0.3, count)[:, None, None, None]
    result = known_result(images, change, **options)
    return [CounterfactualCase.of(result, n, ["normal", "effusion"], name=f"left/{n}.png") for n in range(count)]


@unittest.skipUnless(has_pillow, "Pillow is not installed")
class TestReport(unittest.TestCase):
    def test_is_one_page_with_everything_in_it(self) -> None:
        page = check_self_contained(self, counterfactual_report(cases(), settings="rule <x>"))
        self.assertEqual(len(page.all("img")), 3 * 4)
        self.assertEqual(sum(element == "h1" for element, _ in page.elements), 1)
        self.assertEqual(page.all("html"), [{"lang": "en"}])
        for part in ("How to read this page", "When not to trust it", "Not for clinical use", "rule <x>"):
            self.assertIn(part, page.text)

    def test_says_how_many_images_are_not_shown(self) -> None:
        for out_of, expected in ((None, "3 images, "), (500, "3 images of 500, evenly spread")):
            page = check_self_contained(self, counterfactual_report(cases(), out_of=out_of))
            self.assertIn(expected, page.text)

    def test_pictures_are_those_of_the_cases(self) -> None:
        shown = cases(1)
        page = check_self_contained(self, counterfactual_report(shown))
        tiles = shown[0].tiles
        expected = (tiles.image, tiles.reconstruction, tiles.counterfactual, tiles.overlay)
        for attributes, tile in zip(page.all("img"), expected, strict=True):
            content = base64.b64decode((attributes["src"] or "").split(",", 1)[1])
            np.testing.assert_array_equal(np.asarray(pil_image.open(io.BytesIO(content))), tile)

    def test_cards_can_be_sorted(self) -> None:
        shown = cases()
        page = check_self_contained(self, counterfactual_report(shown))
        cards = [a for a in page.all("li") if a.get("class") == "case"]
        self.assertEqual([card["data-name"] for card in cards], ["left/0.png", "left/1.png", "left/2.png"])
        np.testing.assert_allclose([float(card["data-confidence"] or 0) for card in cards], 0.9, atol=1e-6)
        np.testing.assert_allclose([float(card["data-change"] or 0) for card in cards], [0.1, 0.2, 0.3], atol=1e-6)
        keys = [attributes["value"] for attributes in page.all("option")]
        self.assertEqual(keys, ["number", "confidence", "change", "name"])
        for key in keys:
            self.assertTrue(all(f"data-{key}" in card for card in cards))
        self.assertEqual(page.all("button"), [{"type": "button", "id": "turn"}])
        ids = {attributes.get("id") for _, attributes in page.elements}
        self.assertEqual(set(re.findall(r'getElementById\("(\w+)"\)', "".join(page.code))) - ids, set())

    def test_numbers_are_written_out(self) -> None:
        page = check_self_contained(self, counterfactual_report(cases(1, between=[[0.85, 0.15]])))
        for number in (
            "0.900",
            "0.100",
            "0.850",
            "0.150",
            "0.200",
            "0.800",
            "0.1000",
            "0.1100",
            "0.0100",
            "\u22120.10",
        ):
            self.assertIn(number, page.text)
        self.assertIn("normal \u2192 effusion : probability 0.10 \u2192 0.80", page.text)

    def test_summary_has_a_row_for_each_direction(self) -> None:
        one = known_result(np.zeros((3, 1, 8, 8)), 0.2)
        two = known_result(np.zeros((1, 1, 8, 8)), 0.4, [[0.2, 0.8]], [[0.6, 0.4]], target=0, reached=False)
        names = ["normal", "effusion"]
        shown = [CounterfactualCase.of(one, n, names) for n in range(3)] + [CounterfactualCase.of(two, 0, names)]
        page = check_self_contained(self, counterfactual_report(shown))
        self.assertIn("4 images, 3 of 4 with the requested probability reached", page.text)
        self.assertIn("normal \u2192 effusion 3 0 3 0 0.10 \u2192 0.80 0.200 0.010", page.text)
        self.assertIn("effusion \u2192 normal 1 0 0 1 0.20 \u2192 0.60 0.400 0.010", page.text)

    def test_doubtful_cases_are_marked(self) -> None:
        page = check_self_contained(self, counterfactual_report(cases(1, reached=False, between=[[0.3, 0.7]])))
        self.assertIn("not reached", page.text)
        self.assertIn("already change the prediction", page.text)
        trusted = check_self_contained(self, counterfactual_report(cases(1)))
        self.assertFalse([a for a in trusted.all("ul") if a.get("class") == "cautions"])

    def test_texts_are_never_read_as_html(self) -> None:
        evil = '<script>alert("1")</script>\'&amp;.png'
        result = known_result(np.zeros((1, 1, 8, 8)), 0.2)
        shown = CounterfactualCase.of(result, 0, [f"a{evil}", f"b{evil}"], name=evil, label=f"c{evil}")
        page = check_self_contained(self, counterfactual_report([shown], title=f"t{evil}", settings=f"s{evil}"))
        self.assertEqual(len(page.all("script")), 1)
        for letter in ("t", "s", "a", "b", "c", ""):
            self.assertIn(letter + evil, page.text)
        card = next(a for a in page.all("li") if a.get("class") == "case")
        self.assertEqual(card["data-name"], evil)

    def test_volumes_and_outlines_are_explained(self) -> None:
        region = np.ones((1, 1, 4, 8, 8), dtype=bool)
        result = known_result(np.zeros((1, 1, 4, 8, 8)), 0.2, region=region)
        page = check_self_contained(self, counterfactual_report([CounterfactualCase.of(result, 0, mask=region[0])]))
        for part in ("slice 1 of 4", "change was allowed inside", "true finding"):
            self.assertIn(part, page.text)

    def test_what_was_so_before_is_counted_apart(self) -> None:
        asked, before = (known_result(np.zeros((1, 1, 8, 8)), 0.2, already=already) for already in (False, True))
        cases = [CounterfactualCase.of(result) for result in (asked, before, before)]
        page = check_self_contained(self, counterfactual_report(cases))
        self.assertIn("3 images, 1 of 1 with the requested probability reached, 2 with the wanted answer", page.text)
        badges = [a.get("class") for a in page.all("span") if "badge " in (a.get("class") or "")]
        self.assertEqual(badges, ["badge reached", "badge already", "badge already"])
        self.assertIn("0 \u2192 1 1 2 1 0 0.10 \u2192 0.80", page.text)  # cases, before, reached, marked, probability

    def test_targets_stand_side_by_side(self) -> None:
        """One card for each image, whose pictures of image and reconstruction are there once."""
        p, image = [[0.7, 0.2, 0.1]], np.zeros((2, 1, 8, 8))
        results = [known_result(image, change, p, [[0.1, 0.8, 0.1]], target=k) for k, change in ((1, 0.2), (2, -0.4))]
        names = ["normal", "opacity", "effusion"]
        cases = [CounterfactualCase.of_targets(results, n, names, name=f"{n}.png") for n in range(2)]
        page = check_self_contained(self, counterfactual_report(cases))
        self.assertEqual(len(page.all("img")), 2 * (2 + 2 * 2))
        cards = [a for a in page.all("li") if a.get("class") == "case"]
        self.assertEqual([card["data-name"] for card in cards], ["0.png", "1.png"])
        self.assertAlmostEqual(float(cards[0]["data-change"] or 0), 0.2, places=5)  # of the nearest other answer
        self.assertIn("2 images, 4 counterfactuals, 4 of 4 with", page.text)
        for part in ("opacity: target reached", "counterfactual toward effusion", "normal, probability 0.70"):
            self.assertIn(part, page.text)
        self.assertEqual(page.text.count("\u22120.40"), 4)  # one scale of colors for both targets

    def test_certain_of_every_label(self) -> None:
        """Of several labels a card is as certain as the least certain answer on it."""
        p, image = [[0.99, 0.45]], np.zeros((1, 1, 8, 8))
        results = [known_result(image, 0.2, p, [[0.5, 0.5]], target=k) for k in (0, 1)]
        cases = [CounterfactualCase.of_targets(results, 0, ["a", "b"], name="x", multi_label=True)]
        (card,) = [a for a in check_self_contained(self, counterfactual_report(cases)).all("li") if "class" in a]
        self.assertAlmostEqual(float(card["data-confidence"] or 0), 0.55, places=5)

    def test_figures_of_the_run(self) -> None:
        x = torch.linspace(-0.5, 0.5, 2 * 64).reshape(2, 1, 8, 8)

        def judge(images: torch.Tensor) -> torch.Tensor:
            p = images.flatten(1).mean(1).sigmoid()
            return torch.stack([1 - p, p], 1)

        masks = torch.zeros(2, 1, 8, 8)
        masks[..., :4] = 1
        options: dict[str, Any] = {"classify": judge, "masks": masks, "class_names": ["no", "yes"]}
        shown = [CounterfactualCase.of(known_result(x, 0.2), n, ["no", "yes"]) for n in range(2)]
        alone = counterfactual_figures(x, x, x + 0.9 * masks, 1, **options)
        page = check_self_contained(self, counterfactual_report(shown, figures=alone))
        for part in (
            "proves nothing",
            "by the model itself: yes",
            "means over the same cases",
            "pointing game",
            "no -> yes 1",
            f"{alone.to_input.l1.value:.3f}",
        ):
            self.assertIn(part, page.text)
        self.assertNotIn("by the oracle", page.text)
        single = counterfactual_figures(x[:1], x[:1], x[:1] + 0.9, 1, classify=judge, class_names=["no", "yes"])
        page = check_self_contained(self, counterfactual_report(shown, figures=single))
        self.assertIn("encoding alone 0.000 Cases", " ".join(page.text.split()))  # one image has no spread
        judged = counterfactual_figures(x, x, x + 0.9 * masks, 1, oracle=judge, **options)
        page = check_self_contained(self, counterfactual_report(shown, figures=judged))
        self.assertIn("by the oracle: yes", page.text)
        self.assertNotIn("proves nothing", page.text)

    def test_no_case(self) -> None:
        for cases in ([], [[]]):
            with self.assertRaisesRegex(ValueError, "at least one case expected"):
                counterfactual_report(cases)


@unittest.skipUnless(has_pillow, "Pillow is not installed")
class TestPngBytes(unittest.TestCase):
    def test_round_trip(self) -> None:
        for shape in ((5, 7), (5, 7, 3)):
            picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
            np.testing.assert_array_equal(np.asarray(pil_image.open(io.BytesIO(png_bytes(picture)))), picture)


if __name__ == "__main__":
    unittest.main()
