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

import dataclasses
import unittest
from typing import Any

import torch
from parameterized import parameterized
from scipy import stats
from torch import nn

from monai_jointdiff.inferers import (
    DRAWS,
    DiffusionClassifierInferer,
    DiffusionClassifierResult,
    NoiseDraws,
    aggregate,
    count_votes,
    flip_probability,
    replay,
)
from monai_jointdiff.inferers.diffusion_classifier import smallest_set
from monai_jointdiff.schedulers import DDIMGridScheduler
from tests.inferers.utils import Recorder, tiny_unet

SCHEDULER = DDIMGridScheduler(num_train_timesteps=100, prediction_type="v_prediction", schedule="scaled_linear_beta")
SIZES = {2: (4, 1, 8, 8), 3: (2, 1, 4, 4, 4)}


class TwoMeans(nn.Module):
    """The optimal prediction for classes whose pixels are N(mean_c, std^2), in closed form; a head that can be set."""

    class_conditional = True
    multi_label = False

    def __init__(self, means: tuple[float, ...], std: float = 0.5) -> None:
        super().__init__()
        self.means, self.std, self.num_classes = torch.tensor(means), std, len(means)
        self.head = torch.zeros(len(means))

    def forward(self, x: torch.Tensor, timesteps: Any = None, class_labels: Any = None) -> torch.Tensor:
        if timesteps is None:
            return self.head.expand(len(x), -1)
        mean = self.means[class_labels].reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma = SCHEDULER.alpha_sigma(timesteps, x)
        epsilon = sigma * (x - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)
        return SCHEDULER.model_output_from_epsilon(epsilon, timesteps, x)


def images(spatial_dims: int = 2, seed: int = 0, **_: Any) -> torch.Tensor:
    return torch.rand(SIZES[spatial_dims], generator=torch.Generator().manual_seed(seed)) * 2 - 1


def between(count: int = 40, spread: float = 0.5, seed: int = 5) -> torch.Tensor:
    """Images of two classes with means -.2 and .2, some of them hard to tell."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor([-0.2, 0.2])[torch.arange(count) % 2].reshape(-1, 1, 1, 1)
    return mean + spread * torch.randn(count, 1, 4, 4, generator=generator)


class TestErrors(unittest.TestCase):
    @parameterized.expand([(2, "stratified"), (2, "random"), (3, "stratified")])
    def test_errors_by_independent_recomputation(self, spatial_dims, draws):
        """One image, one class and one draw at a time, with the network's equation written out."""
        net, x, seeds = tiny_unet(spatial_dims), images(spatial_dims), [11, 7, 3, 5][: SIZES[spatial_dims][0]]
        result = DiffusionClassifierInferer(SCHEDULER, 6, draws=draws, max_batch=5)(x, net, seed=seeds)
        for i, seed in enumerate(seeds):
            drawn = NoiseDraws([seed], x.shape[1:], 6, 0, 99, draws)
            for n, t in enumerate(drawn.timesteps[0].tolist()):
                noise = drawn.noise(0)
                alpha, sigma = SCHEDULER.level(t)
                for c in range(3):
                    with torch.no_grad():
                        v = net((alpha * x[i] + sigma * noise)[None], torch.tensor([t]), class_labels=torch.tensor([c]))
                    epsilon = sigma * (alpha * x[i] + sigma * noise) + alpha * v[0]
                    expected = float(((epsilon - noise) ** 2).sum())
                    self.assertAlmostEqual(float(result.draw_errors[i, c, n]), expected, delta=1e-4 * expected)
        self.assertTrue(torch.equal(result.votes, count_votes(result.draw_errors)))
        self.assertTrue(torch.equal(result.prediction, aggregate(result.draw_errors, "majority").argmax(1)))
        self.assertEqual(result.network_calls.tolist(), [18.0] * len(x))
        torch.testing.assert_close(result.probabilities, result.votes / 6)

    def test_batching_changes_nothing_and_fills_the_batches(self):
        net, x = tiny_unet(), images()
        seen = Recorder(net)
        small = DiffusionClassifierInferer(SCHEDULER, 7, max_batch=1)(x, net)
        large = DiffusionClassifierInferer(SCHEDULER, 7, max_batch=50)(x, seen)
        torch.testing.assert_close(small.draw_errors, large.draw_errors, rtol=1e-4, atol=1e-4)
        self.assertEqual([len(call["x"]) for call in seen.calls], [50, 34])  # 4 images x 7 draws x 3 classes

    def test_an_image_does_not_feel_the_others(self):
        net, x = tiny_unet(), images()
        inferer = DiffusionClassifierInferer(SCHEDULER, 5, error_rate=0.3, min_draws=2)
        together = inferer(x, net, seed=[4, 5, 6, 7])
        alone = inferer(x[2:3], net, seed=6)
        torch.testing.assert_close(together.draw_errors[2:3], alone.draw_errors, equal_nan=True, rtol=1e-4, atol=1e-4)

    @parameterized.expand([("majority",), ("mean",)])
    def test_finds_the_class_of_gaussian_images(self, rule):
        """With the optimal denoiser the answer is that of the likelihood ratio, the sign of the mean pixel."""
        x = between(60, spread=0.3)
        result = DiffusionClassifierInferer(SCHEDULER, 101, rule=rule, temperature=2.0)(x, TwoMeans((-0.2, 0.2), 0.3))
        bayes = (x.mean(dim=(1, 2, 3)) > 0).long()
        self.assertGreaterEqual(float((result.prediction == bayes).double().mean()), 0.95)
        self.assertTrue(torch.equal(result.prediction, result.probabilities.argmax(dim=1)))

    def test_restores_the_mode(self):
        net = tiny_unet().train()
        DiffusionClassifierInferer(SCHEDULER, 2)(images(), net)
        self.assertTrue(net.training)


class TestStopping(unittest.TestCase):
    @parameterized.expand([("majority",), ("mean",)])
    def test_saves_calls_and_keeps_the_answers(self, rule):
        net, x = TwoMeans((-0.2, 0.2)), between(100)
        full = DiffusionClassifierInferer(SCHEDULER, 101, rule=rule)(x, net)
        short = DiffusionClassifierInferer(SCHEDULER, 101, rule=rule, error_rate=0.02)(x, net)
        self.assertLess(float(short.network_calls.mean()), 0.5 * float(full.network_calls.mean()))
        self.assertGreaterEqual(float((short.prediction == full.prediction).double().mean()), 0.95)
        made = ~short.draw_errors.isnan()
        torch.testing.assert_close(short.draw_errors[made], full.draw_errors[made], rtol=1e-4, atol=1e-4)
        self.assertEqual(short.network_calls.tolist(), made.flatten(1).sum(1).double().tolist())
        self.assertTrue(torch.equal(short.decided, short.num_draws < 101))

    def test_a_vote_keeps_all_classes_until_the_end(self):
        """Shares .45, .35, .20, and who prefers the third prefers the second to the first: no run-off is asked for.

        If the third class were dropped, its votes would go to the second, which would win.
        """
        generator = torch.Generator().manual_seed(0)
        u = torch.rand(200, 501, generator=generator)
        preference = torch.where(u < 0.45, 0, torch.where(u < 0.8, 1, 2))
        ranks = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [2.0, 1.0, 0.0]])  # of the classes, by preference
        errors = ranks[preference].movedim(2, 1)  # (races, classes, draws)
        inferer = DiffusionClassifierInferer(SCHEDULER, 501, error_rate=0.01)
        final, answer = aggregate(errors, "majority").argmax(1), torch.full((200,), -1)
        for look in inferer.looks():
            running = inferer.still_running(errors[:, :, :look])
            self.assertEqual(sorted({int(n) for n in running.sum(dim=1)} - {1, 3}), [])
            stop = (running.sum(dim=1) == 1) & (answer < 0)
            answer = torch.where(stop, running.int().argmax(dim=1), answer)
        self.assertGreater(int((answer >= 0).sum()), 150)
        self.assertLessEqual(float((answer != final)[answer >= 0].double().mean()), 0.03)

    def test_looks(self):
        inferer = DiffusionClassifierInferer(SCHEDULER, 20, error_rate=0.1, min_draws=5, stages=[(7, 2)])
        self.assertEqual(inferer.looks(), [5, 6, 7, 8, 10, 12, 15, 18, 20])
        self.assertEqual(DiffusionClassifierInferer(SCHEDULER, 20).looks(), [20])

    def test_stages_keep_the_best(self):
        net, x = tiny_unet(), images()
        full = DiffusionClassifierInferer(SCHEDULER, 12, rule="mean")(x, net)
        staged = DiffusionClassifierInferer(SCHEDULER, 12, rule="mean", stages=[(4, 2)])(x, net)
        worst = full.draw_errors[:, :, :4].mean(dim=2).argmax(dim=1)
        made = (~staged.draw_errors.isnan()).sum(dim=2)
        self.assertEqual(made.gather(1, worst[:, None]).flatten().tolist(), [4] * 4)
        self.assertEqual(made.sum(dim=1).tolist(), [28] * 4)
        expected = full.errors.scatter(1, worst[:, None], torch.inf).argmin(dim=1)
        self.assertEqual(staged.prediction.tolist(), expected.tolist())


class TestStoppingOfStratifiedDraws(unittest.TestCase):
    """Recorded races with a strong profile: the difference falls by 4 over the noise levels, with noise of 1."""

    def setUp(self):
        generator = torch.Generator().manual_seed(7)
        self.options = {"error_rate": 0.02, "timestep_range": (0.1, 0.9)}
        timesteps = DiffusionClassifierInferer(SCHEDULER, 101, **self.options).shared_timesteps
        mean = torch.randn(300, 1, generator=generator)
        d = mean + 2 - 0.05 * (timesteps - 10) + torch.randn(300, 101, generator=generator)
        self.errors = torch.stack([torch.zeros_like(d), d], dim=1)

    def stopped(self, errors: torch.Tensor, **options: Any) -> DiffusionClassifierResult:
        return replay(errors, DiffusionClassifierInferer(SCHEDULER, 101, **self.options, **options))

    @parameterized.expand([("majority",), ("mean",)])
    def test_fewer_calls_than_of_independent_draws(self, rule):
        spread, independent = (self.stopped(self.errors, rule=rule, draws=kind) for kind in DRAWS)
        full = aggregate(self.errors, rule).argmax(dim=1)
        self.assertLess(float(spread.network_calls.mean()), 0.8 * float(independent.network_calls.mean()))
        self.assertGreaterEqual(float((spread.prediction == full).double().mean()), 0.98)

    @parameterized.expand([(rule, kind) for rule in ("majority", "mean") for kind in DRAWS])
    def test_the_test_is_told_the_timesteps_of_stratified_draws_alone(self, rule, kind):
        inferer = DiffusionClassifierInferer(SCHEDULER, 101, rule=rule, draws=kind, **self.options)
        drawn = NoiseDraws([0], (1,), 101, *inferer.timesteps, kind)
        self.assertEqual(inferer.timesteps, (10, 89))
        timesteps = drawn.timesteps[0] if kind == "stratified" else None
        flips = flip_probability(self.errors[:, :, :12], 101, rule, timesteps)
        keep = (flips.amin(dim=1, keepdim=True) > 0.02) | (flips == 1)
        self.assertTrue(torch.equal(inferer.still_running(self.errors[:, :, :12]), keep))
        self.assertTrue(0 < int(keep.all(dim=1).sum()) < 300)

    @parameterized.expand([("majority",), ("mean",)])
    def test_several_labels_are_races_of_their_own(self, rule):
        labels = self.stopped(self.errors.reshape(100, 3, 2, 101), rule=rule)
        classes = self.stopped(self.errors, rule=rule)
        self.assertEqual(labels.num_draws.flatten().tolist(), classes.num_draws.tolist())
        self.assertEqual(labels.prediction.flatten().tolist(), classes.prediction.tolist())

    def test_classes_are_dropped_on_the_way(self):
        hopeless = torch.cat([self.errors, self.errors.amax(dim=1, keepdim=True) + 3 + torch.rand(300, 1, 101)], dim=1)
        three, two = self.stopped(hopeless, rule="mean"), self.stopped(self.errors, rule="mean", min_draws=8)
        self.assertLess(float((~three.draw_errors[:, 2].isnan()).sum(dim=1).double().mean()), 12)
        self.assertGreater(float((three.prediction == two.prediction).double().mean()), 0.98)


class TestReplay(unittest.TestCase):
    """What is read off recorded errors is what the inferer does."""

    @parameterized.expand(
        [
            ("majority", {"error_rate": 0.2, "min_draws": 3}),
            ("mean", {"error_rate": 0.2, "min_draws": 3}),
            ("mean", {"stages": [(4, 2)]}),
            ("majority", {"head": "nominate", "trust": 0.6, "error_rate": 0.2}),
            ("mean", {"head": "prior", "temperature": 30.0, "head_temperature": 2.0}),
        ]
    )
    def test_equals_a_run(self, rule, options):
        net, x = tiny_unet(), images()
        inferer = DiffusionClassifierInferer(SCHEDULER, 31, rule=rule, **options)
        recorded = DiffusionClassifierInferer(SCHEDULER, 31)(x, net).draw_errors
        with torch.no_grad():
            head = net.eval()(x)
        expected, found = inferer(x, net), replay(recorded, inferer, head)
        if "prior" not in options.values():
            self.assertTrue(bool(expected.draw_errors.isnan().any()))  # something was stopped
        for name in ("prediction", "num_draws", "network_calls", "decided"):
            self.assertEqual(getattr(found, name).tolist(), getattr(expected, name).tolist(), name)
        for name in ("draw_errors", "probabilities", "logits"):
            one, other = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-4)

    def test_several_labels(self):
        net, x = tiny_unet(multi_label=True, num_classes=2), images()
        inferer = DiffusionClassifierInferer(SCHEDULER, 15, error_rate=0.3, min_draws=2)
        recorded = DiffusionClassifierInferer(SCHEDULER, 15)(x, net).draw_errors
        expected, found = inferer(x, net), replay(recorded, inferer)
        torch.testing.assert_close(found.draw_errors, expected.draw_errors, equal_nan=True, rtol=1e-4, atol=1e-4)
        self.assertEqual(found.network_calls.tolist(), expected.network_calls.tolist())

    def test_the_first_draws_count(self):
        errors = torch.rand(5, 2, 9, generator=torch.Generator().manual_seed(0))
        found = replay(errors, DiffusionClassifierInferer(SCHEDULER, 4))
        self.assertTrue(torch.equal(found.draw_errors, errors[:, :, :4]))
        self.assertEqual(found.votes.tolist(), count_votes(errors[:, :, :4]).tolist())

    @parameterized.expand(
        [
            (torch.ones(3, 4), {}, r"draw_errors must have shape.*got \(3, 4\)"),
            (torch.ones(3, 2, 3, 4), {}, "draw_errors must have shape"),
            (torch.ones(3, 2, 3), {}, "3 draws were recorded, the inferer makes 4"),
            (torch.ones(3, 2, 4), {"head": "prior"}, r"head='prior' needs head_logits of shape \(3, 2\), got None"),
            (torch.full((3, 2, 4), torch.nan), {}, r"images \[0, 1, 2\] of the batch are not finite"),
        ]
    )
    def test_wrong_input(self, errors, options, message):
        with self.assertRaisesRegex(ValueError, message):
            replay(errors, DiffusionClassifierInferer(SCHEDULER, 4, **options))


class TestCalibrated(unittest.TestCase):
    def test_shares_with_one_vote_more(self):
        result = DiffusionClassifierInferer(SCHEDULER, 7)(images(), tiny_unet())
        shares = (result.votes + 1) / 10
        torch.testing.assert_close(result.calibrated(1.0), shares)
        powers = shares**0.5
        torch.testing.assert_close(result.calibrated(2.0), powers / powers.sum(dim=1, keepdim=True))

    def test_mean_is_the_softmax_of_the_errors(self):
        result = DiffusionClassifierInferer(SCHEDULER, 7, rule="mean", temperature=2.0)(images(), tiny_unet())
        torch.testing.assert_close(result.calibrated(1.0), result.probabilities)
        torch.testing.assert_close(result.calibrated(15.0), (-result.errors / 30).softmax(dim=1))

    def test_a_class_that_was_dropped_is_compared_on_its_draws(self):
        errors = torch.tensor([[[1.0, 1.0, 1.0], [3.0, 5.0, torch.nan], [1.5, 2.5, 3.5]]])
        inferer = DiffusionClassifierInferer(SCHEDULER, 3, rule="mean", stages=[(2, 2)])
        result = replay(errors.nan_to_num(nan=0.0), inferer)  # which would win, were it looked at
        torch.testing.assert_close(result.logits, torch.tensor([[0.0, -3.0, -1.5]]).double())

    def test_classes_left_out_by_the_head_keep_its_probability(self):
        net = TwoMeans((-0.2, 0.2, 0.0))
        net.head = torch.tensor([0.45, 0.5, 0.05]).log()
        result = DiffusionClassifierInferer(SCHEDULER, 9, head="nominate", trust=0.9)(between(6), net)
        found = result.calibrated(3.0)
        torch.testing.assert_close(found[:, 2], torch.full((6,), 0.05).double())
        powers = ((result.votes[:, :2] + 1) / 11) ** (1 / 3)
        torch.testing.assert_close(found[:, :2], 0.95 * powers / powers.sum(dim=1, keepdim=True))
        alone = DiffusionClassifierInferer(SCHEDULER, 9, head="nominate", trust=0.4)(between(6), net)
        torch.testing.assert_close(alone.calibrated(3.0), alone.head_probabilities)

    @parameterized.expand([("ignore", "majority"), ("prior", "majority"), ("prior", "mean"), ("nominate", "mean")])
    def test_answers_stay_and_rows_sum_to_one(self, head, rule):
        net = TwoMeans((-0.2, 0.2, 0.0))
        net.head = torch.tensor([0.3, 0.4, 0.3]).log()
        result = DiffusionClassifierInferer(SCHEDULER, 15, rule=rule, head=head, trust=0.6)(between(20), net)
        for temperature in (0.3, 10.0):
            found = result.calibrated(temperature)
            torch.testing.assert_close(found.sum(dim=1), torch.ones(20).double())
            clear = found.sort(dim=1, descending=True).values
            clear = clear[:, 0] > clear[:, 1] + 1e-9  # equal votes: the mean error decides
            self.assertTrue(torch.equal(found.argmax(dim=1)[clear], result.prediction[clear]))

    def test_several_labels(self):
        inferer = DiffusionClassifierInferer(SCHEDULER, 5, head="nominate", trust=0.5 + 1e-9)
        result = inferer(images(), tiny_unet(multi_label=True, num_classes=2))
        self.assertEqual(tuple(result.logits.shape), (4, 2, 2))
        torch.testing.assert_close(result.calibrated(2.0), result.head_probabilities)  # which answered alone
        drawn = DiffusionClassifierInferer(SCHEDULER, 5)(images(), tiny_unet(multi_label=True, num_classes=2))
        torch.testing.assert_close(drawn.calibrated(1.0), (drawn.votes + 1) / 7)

    def test_wrong_temperature(self):
        result = DiffusionClassifierInferer(SCHEDULER, 2)(images(), tiny_unet())
        with self.assertRaisesRegex(ValueError, "temperature must be positive, got 0"):
            result.calibrated(0)


class TestHead(unittest.TestCase):
    def test_its_temperature(self):
        """The head's probabilities are what its logits divided by the temperature give, wherever they are used."""
        net, x = TwoMeans((-0.2, 0.2)), between(10)
        net.head = torch.tensor([0.0, 4.0])
        warm = {"head_temperature": 4.0}
        expected = torch.tensor([0.0, 1.0]).double().softmax(dim=0)
        nominated = DiffusionClassifierInferer(SCHEDULER, 5, head="nominate", trust=0.9, **warm)(x, net)
        self.assertEqual(nominated.num_draws.tolist(), [5] * 10)  # .98 without the temperature, which answers alone
        torch.testing.assert_close(nominated.head_probabilities, expected.expand(10, 2))
        both = DiffusionClassifierInferer(SCHEDULER, 5, head="prior", **warm)(x, net)
        product = (both.votes + 1) * expected
        torch.testing.assert_close(both.probabilities, product / product.sum(dim=1, keepdim=True))

    def test_smallest_set(self):
        p = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [0.4, 0.35, 0.25]])
        sets = [[True, True, False], [False, False, True], [True, True, True]]
        self.assertEqual(smallest_set(p, 0.8).tolist(), sets)
        self.assertEqual(smallest_set(p, 1e-9).sum(dim=1).tolist(), [1, 1, 1])

    def test_nominates(self):
        net, x = TwoMeans((-0.2, 0.2, 0.0)), between(6)
        net.head = torch.tensor([0.45, 0.54, 0.01]).log()
        result = DiffusionClassifierInferer(SCHEDULER, 9, head="nominate", trust=0.98)(x, net)
        self.assertTrue(bool(result.draw_errors[:, 2].isnan().all()))
        self.assertEqual(result.network_calls.tolist(), [19.0] * 6)
        two = DiffusionClassifierInferer(SCHEDULER, 9)(x, TwoMeans((-0.2, 0.2)))
        self.assertTrue(torch.equal(result.prediction, two.prediction))

    def test_answers_alone_where_it_is_sure(self):
        net = TwoMeans((-0.2, 0.2))
        net.head = torch.tensor([0.001, 0.999]).log()
        result = DiffusionClassifierInferer(SCHEDULER, 9, head="nominate", trust=0.99)(between(4), net, maps=True)
        self.assertEqual(result.prediction.tolist(), [1] * 4)
        self.assertEqual(result.network_calls.tolist(), [1.0] * 4)
        self.assertTrue(bool(result.decided.all()))
        torch.testing.assert_close(result.probabilities[0].float(), torch.tensor([0.001, 0.999]))
        torch.testing.assert_close(result.confidence, torch.full((4,), 0.999).double(), rtol=0, atol=1e-6)
        for name in ("vote_share", "uncertainty"):  # there were no votes
            self.assertTrue(bool(getattr(result, name).isnan().all()), name)
        self.assertTrue(bool(result.margin.isnan().all()))
        self.assertEqual(float(result.evidence.abs().max()), 0.0)

    @parameterized.expand([("majority",), ("mean",)])
    def test_prior_is_bayes(self, rule):
        net, x = TwoMeans((-0.2, 0.2)), between(10)
        net.head = torch.tensor([0.9, 0.1]).log()
        alone = DiffusionClassifierInferer(SCHEDULER, 9, rule=rule, temperature=3.0)(x, net)
        both = DiffusionClassifierInferer(SCHEDULER, 9, rule=rule, temperature=3.0, head="prior")(x, net)
        likelihood = (alone.votes + 1) / 11 if rule == "majority" else alone.probabilities
        expected = likelihood * torch.tensor([0.9, 0.1])
        torch.testing.assert_close(both.probabilities, expected / expected.sum(dim=1, keepdim=True), check_dtype=False)
        self.assertTrue(torch.equal(both.prediction, both.probabilities.argmax(dim=1)))


class TestUncertainty(unittest.TestCase):
    def test_figures_by_hand(self):
        result = DiffusionClassifierInferer(SCHEDULER, 11)(between(8), TwoMeans((-0.2, 0.2)))
        p = result.votes.amax(dim=1) / 11
        torch.testing.assert_close(result.vote_share, p)
        torch.testing.assert_close(result.confidence, p)
        torch.testing.assert_close(result.uncertainty, p * (1 - p))
        torch.testing.assert_close(result.entropy, torch.distributions.Categorical(result.probabilities).entropy())
        rows = torch.arange(8)
        errors = result.draw_errors.double()
        difference = errors[rows, 1 - result.prediction] - errors[rows, result.prediction]
        torch.testing.assert_close(result.margin, difference.mean(dim=1))
        low, high = result.margin_interval(0.9)
        steps = difference[:, result.timesteps.argsort()].diff(dim=1)
        std = (steps.square().sum(dim=1) / 20).sqrt()
        torch.testing.assert_close(high - low, 2 * stats.t.ppf(0.95, 2 * 100 / 29) * std / 11**0.5)
        torch.testing.assert_close((high + low) / 2, result.margin)
        independent = dataclasses.replace(result, timesteps=None)
        low, high = independent.margin_interval(0.9)
        torch.testing.assert_close(high - low, 2 * 1.8124611 * difference.std(dim=1) / 11**0.5)  # t, 10 degrees
        torch.testing.assert_close((high + low) / 2, result.margin)

    def test_margin_interval_covers_the_mean_over_the_noise_levels(self):
        """Recorded differences with a known mean at each level; 2,000 images, three standard errors are .015."""
        generator = torch.Generator().manual_seed(0)
        inferer = DiffusionClassifierInferer(SCHEDULER, 51, timestep_range=(0.2, 1.0))
        mean = 6 - 0.08 * inferer.shared_timesteps.double()
        d = mean + torch.randn(2000, 51, generator=generator).double()
        errors = torch.stack([torch.zeros_like(d), d], dim=1)
        result = replay(errors, inferer)
        self.assertEqual(result.prediction.sum(), 0)
        low, high = result.margin_interval(0.9)
        covered = ((low <= mean.mean()) & (mean.mean() <= high)).double().mean()
        self.assertAlmostEqual(float(covered), 0.9, delta=0.02)
        independent = replay(errors, DiffusionClassifierInferer(SCHEDULER, 51, draws="random"))
        self.assertIsNone(independent.timesteps)
        wide = torch.stack(independent.margin_interval(0.9)).diff(dim=0)[0]
        self.assertGreater(float((wide / (high - low)).mean()), 1.5)

    def test_margin_interval_of_images_with_different_numbers_of_draws(self):
        """Each as if it were alone, and NaN with fewer than two."""
        errors = torch.rand(3, 2, 9, generator=torch.Generator().manual_seed(1))
        result = replay(errors, DiffusionClassifierInferer(SCHEDULER, 9))
        some = errors.clone()
        some[0, :, 5:], some[1, :, 1:] = torch.nan, torch.nan
        prediction = torch.tensor([int(errors[0, :, :5].mean(dim=1).argmin()), 0, int(result.prediction[2])])
        low, high = dataclasses.replace(result, draw_errors=some, prediction=prediction).margin_interval()
        d = (errors[0, 0, :5] - errors[0, 1, :5]).double()
        std = (d[result.timesteps[:5].argsort()].diff().square().sum() / 8).sqrt()
        torch.testing.assert_close((high - low)[0], 2 * stats.t.ppf(0.975, 2 * 16 / 11) * std / 5**0.5)
        self.assertTrue(bool(low[1].isnan() & high[1].isnan()))
        torch.testing.assert_close(low[2], result.margin_interval()[0][2])

    @parameterized.expand([(2, None), (3, None), (2, 0.3)])
    def test_evidence_adds_up_to_the_margin(self, spatial_dims, error_rate):
        inferer = DiffusionClassifierInferer(SCHEDULER, 7, error_rate=error_rate, min_draws=2)
        result = inferer(images(spatial_dims), tiny_unet(spatial_dims), maps=True)
        self.assertEqual(result.evidence.shape, SIZES[spatial_dims])
        total = result.evidence.flatten(1).sum(dim=1).double()
        torch.testing.assert_close(total, result.margin, rtol=1e-3, atol=1e-3)

    def test_evidence_lies_where_the_classes_differ(self):
        """Classes that differ in the left half only: the right half says nothing."""

        class LeftHalf(TwoMeans):
            def forward(self, x: torch.Tensor, timesteps: Any = None, class_labels: Any = None) -> torch.Tensor:
                both = super().forward(x, timesteps, class_labels)
                neither = super().forward(x, timesteps, torch.zeros_like(class_labels))
                return torch.where(torch.arange(x.shape[-1]) < x.shape[-1] // 2, both, neither)

        evidence = DiffusionClassifierInferer(SCHEDULER, 9)(between(5), LeftHalf((-0.2, 0.2)), maps=True).evidence
        self.assertEqual(float(evidence[..., 2:].abs().max()), 0.0)
        self.assertGreater(float(evidence[..., :2].abs().min()), 0.0)


class TestMultiLabel(unittest.TestCase):
    def setUp(self):
        self.net, self.x = tiny_unet(multi_label=True, num_classes=2), images()

    def test_one_binary_question_per_label(self):
        result = DiffusionClassifierInferer(SCHEDULER, 5)(self.x, self.net, maps=True)
        for name, shape in {
            "prediction": (4, 2),
            "probabilities": (4, 2),
            "votes": (4, 2),
            "errors": (4, 2, 2),
            "confidence": (4, 2),
            "num_draws": (4, 2),
            "decided": (4, 2),
            "draw_errors": (4, 2, 2, 5),
            "evidence": (4, 2, 8, 8),
            "vote_share": (4, 2),
            "entropy": (4, 2),
        }.items():
            self.assertEqual(tuple(getattr(result, name).shape), shape, name)
        self.assertEqual(result.network_calls.tolist(), [20.0] * 4)
        present = (result.draw_errors[:, :, 1] < result.draw_errors[:, :, 0]).sum(dim=-1)
        self.assertEqual(result.votes.tolist(), present.double().tolist())
        self.assertEqual(result.prediction.tolist(), (present > 2).long().tolist())
        torch.testing.assert_close(result.probabilities, present / 5, check_dtype=False)

    def test_errors_and_head(self):
        inferer = DiffusionClassifierInferer(SCHEDULER, 3, head="nominate", trust=0.5 + 1e-9)
        result = inferer(self.x, self.net, seed=[9, 8, 7, 6])
        self.assertTrue(bool((result.num_draws == 0).any()))  # the head is surer than 50 % of something
        with torch.no_grad():
            torch.testing.assert_close(result.head_probabilities, self.net(self.x).sigmoid(), check_dtype=False)
        full = DiffusionClassifierInferer(SCHEDULER, 3)(self.x, self.net, seed=[9, 8, 7, 6])
        noise = NoiseDraws([8], self.x.shape[1:], 3, 0, 99)
        t = int(noise.timesteps[0, 0])
        noisy = SCHEDULER.add_noise(self.x[1:2], noise.noise(0)[None], torch.tensor([t]))
        with torch.no_grad():
            v = self.net(noisy, torch.tensor([t]), class_labels=torch.tensor([[-1.0, 1.0]]))
        alpha, sigma = SCHEDULER.level(t)
        again = NoiseDraws([8], self.x.shape[1:], 3, 0, 99).noise(0)
        expected = float(((alpha * v[0] + sigma * noisy[0] - again) ** 2).sum())
        self.assertAlmostEqual(float(full.draw_errors[1, 1, 1, 0]), expected, delta=1e-4 * expected)

    def test_prior_of_a_sure_head_stays_a_number(self):
        """In float32 a probability of 1 - sigmoid(20) is 0, and with errors that say the opposite 0 / 0 is near."""
        self.net.classifier = nn.Identity()
        self.net.head = lambda features: torch.full((len(features.middle), 2), 20.0)
        result = DiffusionClassifierInferer(SCHEDULER, 3, rule="mean", head="prior")(self.x, self.net)
        self.assertTrue(bool(result.probabilities.isfinite().all()))


class TestLatent(unittest.TestCase):
    def test_works_on_latents(self):
        class Halving:
            def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return nn.functional.avg_pool2d(x, 2), torch.zeros(())

        net, x = tiny_unet(), images()
        through = DiffusionClassifierInferer(SCHEDULER, 3, autoencoder=Halving(), scale_factor=2.0)(x, net)
        direct = DiffusionClassifierInferer(SCHEDULER, 3)(2 * nn.functional.avg_pool2d(x, 2), net)
        self.assertTrue(torch.equal(through.draw_errors, direct.draw_errors))


class TestWrongInput(unittest.TestCase):
    @parameterized.expand(
        [
            ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
            ({"draws": "sobol"}, "draws must be one of .*got 'sobol'"),
            ({"rule": "median"}, "rule must be one of .*got 'median'"),
            ({"head_temperature": 0.0}, "head_temperature must be positive, got 0.0"),
            ({"head": "follow"}, "head must be one of .*got 'follow'"),
            ({"timestep_range": (0.5, 0.5)}, "timestep_range must be"),
            ({"error_rate": 1.0}, "error_rate must lie in"),
            ({"min_draws": 0}, "min_draws must be at least 1"),
            ({"trust": 1.0}, "trust must lie in"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"max_batch": 0}, "max_batch must be at least 1"),
            ({"head": "prior", "error_rate": 0.1}, "head='prior' needs all draws"),
            ({"stages": [(9, 3), (5, 2)]}, "stages must be pairs"),
            ({"stages": [(5, 2), (9, 2)]}, "stages must be pairs"),
            ({"stages": [(51, 2)]}, "stages must be pairs"),
            ({"stages": [5, 2]}, r"stages must be pairs.*got \[5, 2\]"),
            ({"stages": "[[5, 2]]"}, "stages must be pairs"),
        ]
    )
    def test_arguments(self, arguments, message):
        with self.assertRaisesRegex(ValueError, f"DiffusionClassifierInferer: {message}"):
            DiffusionClassifierInferer(SCHEDULER, **arguments)

    def test_not_finite(self):
        x = images()
        x[2, 0, 3, 3] = float("nan")
        with self.assertRaisesRegex(ValueError, r"the errors of images \[2\] of the batch are not finite"):
            DiffusionClassifierInferer(SCHEDULER, 3)(x, tiny_unet())

    def test_network_without_condition(self):
        with self.assertRaisesRegex(TypeError, "must be class-conditional.*JointDiffusionUNet"):
            DiffusionClassifierInferer(SCHEDULER)(images(), tiny_unet(class_conditional=False))

    def test_inputs(self):
        inferer = DiffusionClassifierInferer(SCHEDULER, 3, stages=[(1, 2)])
        with self.assertRaisesRegex(ValueError, r"inputs must have shape .*got \(8, 8\)"):
            inferer(torch.zeros(8, 8), tiny_unet())
        with self.assertRaisesRegex(ValueError, r"inputs must have shape .*got \(0, 1, 8, 8\)"):
            inferer(torch.zeros(0, 1, 8, 8), tiny_unet())
        with self.assertRaisesRegex(ValueError, "2 seeds for 4 images"):
            inferer(images(), tiny_unet(), seed=[1, 2])
        with self.assertRaisesRegex(ValueError, "maps need the same draws"):
            inferer(images(), tiny_unet(), maps=True)
        with self.assertRaisesRegex(ValueError, "confidence must lie in"):
            DiffusionClassifierInferer(SCHEDULER, 3)(images(), tiny_unet()).margin_interval(1.0)


if __name__ == "__main__":
    unittest.main()
