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

"""The noise schedule, its parametrizations, and the grid of timesteps that every sampler walks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from monai.networks.schedulers import Scheduler
from torch import Tensor, nn

from .logsnr import logsnr_timesteps

CLEAN = -1
"""The timestep after the last grid point: no noise, alpha_bar = 1."""

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("linspace", "logsnr")


class NoiseLevel(NamedTuple):
    """Amplitudes of signal and noise at one timestep, ``x_t = alpha x_0 + sigma epsilon``.

    Attributes:
        alpha: ``sqrt(alpha_bar)``, in (0, 1].
        sigma: ``sqrt(1 - alpha_bar)``, in [0, 1); 0 at the clean end.
    """

    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """``lambda = log(alpha / sigma)``; infinite at the clean end."""
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


class GridScheduler(Scheduler):
    """Variance-preserving noise schedule, its parametrizations, and a grid whose steps land on the grid.

    Base of the samplers of this package; it can be used wherever MONAI takes a
    :class:`monai.networks.schedulers.Scheduler`. Four things differ from the schedulers of MONAI 1.6.1:

    - the next timestep is looked up in :attr:`timesteps`, never computed from a stride;
    - the table is kept in float64 and nothing casts it: no call, and neither ``.to(dtype)`` nor ``.half()``;
    - table and grid stay on the CPU, ``.to(device)`` or not; coefficients go to the device of the sample at each
      call, so one scheduler serves every device;
    - the table is in ``state_dict()``.

    Args:
        num_train_timesteps: T, number of timesteps the network is trained on.
        schedule: a name in :class:`monai.networks.schedulers.NoiseSchedules`; this package adds ``"shifted_logsnr"``.
        prediction_type: what the network predicts: ``"epsilon"`` (the noise), ``"sample"`` (x_0) or
            ``"v_prediction"`` (``alpha epsilon - sigma x_0``, Salimans and Ho, https://arxiv.org/abs/2202.00512).
        clip_sample: whether a step clips the prediction of x_0. The noise is then taken to be what the clipped
            x_0 leaves over, so that both still add up to the sample.
        clip_sample_min: lower bound of x_0.
        clip_sample_max: upper bound of x_0.
        spacing: rule of :meth:`set_timesteps`: ``"linspace"`` (uniform in t) or ``"logsnr"`` (uniform in log-SNR).
        **schedule_args: further arguments of the schedule, such as ``beta_start``.

    Attributes:
        betas: (T,) float64.
        alphas: (T,) float64, ``1 - betas``.
        alphas_cumprod: (T,) float64, alpha_bar, strictly decreasing in (0, 1).
        timesteps: the grid, int64 on the CPU, strictly decreasing; all T timesteps until it is set.
        num_inference_steps: length of the grid.

    Raises:
        ValueError: for an unknown schedule, prediction type or spacing, an empty clipping range, or a schedule whose
            alpha_bar is not strictly decreasing within (0, 1).
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_min: float = -1.0,
        clip_sample_max: float = 1.0,
        spacing: str = "linspace",
        **schedule_args: float,
    ) -> None:
        super().__init__(num_train_timesteps, schedule, **schedule_args)
        name = type(self).__name__
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"{name}: prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        if spacing not in SPACINGS:
            raise ValueError(f"{name}: spacing must be one of {SPACINGS}, got {spacing!r}.")
        if not clip_sample_min < clip_sample_max:
            raise ValueError(
                f"{name}: clip_sample_min must be below clip_sample_max, got {clip_sample_min} and {clip_sample_max}."
            )
        self.prediction_type = prediction_type
        self.clip_sample = clip_sample
        self.clip_sample_min = clip_sample_min
        self.clip_sample_max = clip_sample_max
        self.spacing = spacing
        self._keep_tables(schedule)
        self.set_timesteps(num_train_timesteps)

    def _keep_tables(self, schedule: str) -> None:
        """Turn MONAI's float32 tables into float64 buffers, rebuilt from the betas."""
        betas = self.betas.detach().cpu().double()
        alphas = 1.0 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        inside = bool(((alphas_cumprod > 0) & (alphas_cumprod < 1)).all())
        if not inside or not bool((alphas_cumprod.diff() < 0).all()):
            raise ValueError(
                f"{type(self).__name__}: schedule {schedule!r} must give alpha_bar strictly decreasing within (0, 1), "
                f"got a table from {float(alphas_cumprod[0])} to {float(alphas_cumprod[-1])}."
            )
        for table_name, table in (("betas", betas), ("alphas", alphas), ("alphas_cumprod", alphas_cumprod)):
            delattr(self, table_name)
            self.register_buffer(table_name, table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Ignore ``.to``, ``.half``, ``.cuda`` and the like: the tables stay in float64 on the CPU."""
        return self

    # ---- the grid -----------------------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set a grid of so many points by the rule ``spacing``, from the noisy end to timestep 0.

        Args:
            num_inference_steps: number of network calls of a chain, 1 to T.
            device: accepted because MONAI passes it; the grid stays on the CPU.

        Raises:
            ValueError: when the number is not a whole number in [1, T].
        """
        if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"{type(self).__name__}: num_inference_steps must be a whole number from 1 to "
                f"{self.num_train_timesteps}, the number of training timesteps; got {num_inference_steps!r}."
            )
        if self.spacing == "logsnr":
            grid = logsnr_timesteps(self.alphas_cumprod, num_inference_steps)
        else:
            last = float(self.num_train_timesteps - 1)
            grid = torch.linspace(last, 0.0, num_inference_steps, dtype=torch.float64).round().long()
        self.set_grid(grid.tolist())

    def set_grid(self, timesteps: Sequence[int]) -> None:
        """Set the grid itself, for instance one that starts at an intermediate time.

        Args:
            timesteps: strictly decreasing timesteps in [0, T), at least one. The step after the last one goes to the
                clean sample, whatever the last one is.

        Raises:
            ValueError: when the timesteps are empty, outside [0, T) or not strictly decreasing.
        """
        grid = torch.as_tensor(timesteps).detach().cpu()
        valid = grid.ndim == 1 and len(grid) > 0 and not grid.is_floating_point()
        if not valid or grid[0] >= self.num_train_timesteps or grid[-1] < 0 or not bool((grid.diff() < 0).all()):
            raise ValueError(
                f"{type(self).__name__}: a grid is a non-empty, strictly decreasing sequence of integers in "
                f"[0, {self.num_train_timesteps}), got {timesteps}."
            )
        self.timesteps = grid.long()
        self.num_inference_steps = len(grid)

    def next_timestep(self, timestep: int | Tensor) -> int:
        """The grid point after this one, in the order of sampling.

        Args:
            timestep: a point of the grid.

        Returns:
            The next smaller timestep of :attr:`timesteps`, or -1 (the clean sample) after the last.

        Raises:
            ValueError: when the timestep is not one number or not in the grid.
        """
        current = self._scalar(timestep)
        position = (self.timesteps == current).nonzero()
        if len(position) == 0:
            raise ValueError(
                f"{type(self).__name__}: timestep {current} is not in the grid of {len(self.timesteps)} points from "
                f"{int(self.timesteps[0])} to {int(self.timesteps[-1])}; see set_timesteps and set_grid."
            )
        following = int(position[0]) + 1
        return int(self.timesteps[following]) if following < len(self.timesteps) else CLEAN

    def _scalar(self, timestep: int | Tensor) -> int:
        """One timestep as an int; MONAI's inferer passes a 0-dimensional tensor."""
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise ValueError(
                f"{type(self).__name__}: a step takes one timestep for the whole batch, got shape "
                f"{tuple(timestep.shape)}."
            )
        value = timestep.item() if isinstance(timestep, Tensor) else timestep
        if value != int(value):
            raise ValueError(f"{type(self).__name__}: a timestep must be a whole number, got {value}.")
        return int(value)

    # ---- noise levels -------------------------------------------------------------------------------------------

    def level(self, timestep: int) -> NoiseLevel:
        """Noise level at one timestep, in double precision.

        Args:
            timestep: in [0, T), or -1 for the clean sample.

        Returns:
            alpha and sigma as Python floats.

        Raises:
            ValueError: when the timestep is outside [-1, T).
        """
        self._check_range(timestep, timestep, CLEAN)
        alpha_bar = float(self.alphas_cumprod[timestep]) if timestep != CLEAN else 1.0
        return NoiseLevel(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar))

    def alpha_sigma(self, timesteps: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes of signal and noise, ready to multiply a sample.

        Args:
            timesteps: an int, a scalar tensor, or (N,) integers, in [-1, T); -1 gives (1, 0).
            like: a sample (N, C, *spatial); gives dtype, device and number of dimensions.

        Returns:
            ``(alpha, sigma)``, each of shape (N or 1, 1, ...), with ``alpha**2 + sigma**2 = 1``.

        Raises:
            TypeError: when the sample is not of a floating type or the timesteps are not integers.
            ValueError: when a timestep is outside [-1, T) or their number is neither 1 nor N.
        """
        return self._amplitudes(timesteps, like, CLEAN)

    def snr(self, timesteps: int | Tensor) -> Tensor:
        """Signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)``.

        Args:
            timesteps: an int or a tensor of integers in [-1, T); -1 gives infinity.

        Returns:
            float64, of the shape and on the device of the timesteps.

        Raises:
            TypeError: when the timesteps are not integers.
            ValueError: when a timestep is outside [-1, T).
        """
        alpha_bar = self._alpha_bar(timesteps, CLEAN)
        ratio = alpha_bar / (1.0 - alpha_bar)
        return ratio.to(timesteps.device) if isinstance(timesteps, Tensor) else ratio

    def _amplitudes(self, timesteps: int | Tensor, like: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
        if not like.is_floating_point():
            raise TypeError(f"{type(self).__name__}: samples must be of a floating type, got {like.dtype}.")
        alpha_bar = self._alpha_bar(timesteps, lowest).reshape(-1)
        if len(alpha_bar) not in (1, len(like)):
            raise ValueError(
                f"{type(self).__name__}: {len(alpha_bar)} timesteps for a batch of {len(like)}; give one or "
                f"{len(like)}."
            )
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = alpha_bar.sqrt().reshape(shape), (1.0 - alpha_bar).sqrt().reshape(shape)
        # the type changes first: not every device has float64
        return alpha.to(like.dtype).to(like.device), sigma.to(like.dtype).to(like.device)

    def _alpha_bar(self, timesteps: int | Tensor, lowest: int) -> Tensor:
        """alpha_bar in float64 on the CPU, of the shape of the timesteps; 1 where the timestep is -1."""
        index = torch.as_tensor(timesteps).detach().cpu()
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"{type(self).__name__}: timesteps must be integers, got {index.dtype}.")
        self._check_range(int(index.min()), int(index.max()), lowest)
        return torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)])[index.long()]

    def _check_range(self, smallest: int, largest: int, lowest: int) -> None:
        if smallest < lowest or largest >= self.num_train_timesteps:
            raise ValueError(
                f"{type(self).__name__}: timesteps must lie in [{lowest}, {self.num_train_timesteps}), "
                f"got {smallest}{'' if smallest == largest else f' to {largest}'}."
            )

    # ---- training -----------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy sample ``x_t = alpha x_0 + sigma epsilon`` (Ho et al., https://arxiv.org/abs/2006.11239, equation 4).

        Args:
            original_samples: x_0, (N, C, *spatial).
            noise: epsilon, same shape.
            timesteps: (N,) integers or one, in [-1, T).

        Returns:
            x_t, same shape and type as ``original_samples``.

        Raises:
            TypeError: when the samples are not of a floating type or the timesteps are not integers.
            ValueError: when shapes differ or a timestep is out of range.
        """
        self._check_shapes(original_samples, noise, "noise")
        alpha, sigma = self.alpha_sigma(timesteps, original_samples)
        return alpha * original_samples + sigma * noise.to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity ``v = alpha epsilon - sigma x_0`` (Salimans and Ho, https://arxiv.org/abs/2202.00512).

        Args:
            sample: x_0, (N, C, *spatial): the clean sample, as in MONAI.
            noise: epsilon, same shape.
            timesteps: (N,) integers or one, in [-1, T).

        Returns:
            v, same shape and type as ``sample``.

        Raises:
            TypeError: when the samples are not of a floating type or the timesteps are not integers.
            ValueError: when shapes differ or a timestep is out of range.
        """
        self._check_shapes(sample, noise, "noise")
        alpha, sigma = self.alpha_sigma(timesteps, sample)
        return alpha * noise.to(sample.dtype) - sigma * sample

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network has to predict: epsilon, x_0 or v, by ``prediction_type``.

        Args:
            original_samples: x_0, (N, C, *spatial).
            noise: epsilon, same shape.
            timesteps: (N,) integers or one, in [-1, T).

        Returns:
            The target, (N, C, *spatial).

        Raises:
            ValueError: when shapes differ or a timestep is out of range.
        """
        self._check_shapes(original_samples, noise, "noise")
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return original_samples
        return self.get_velocity(original_samples, noise, timesteps)

    # ---- parametrizations: each of the two predictions has its inverse ------------------------------------------

    def predict_original(self, model_output: Tensor, timesteps: int | Tensor, sample: Tensor) -> Tensor:
        """Prediction of x_0 from the network's output; not clipped.

        Args:
            model_output: the network's prediction at the sample, (N, C, *spatial).
            timesteps: an int, a scalar tensor, or (N,) integers, in [0, T).
            sample: x_t, same shape.

        Returns:
            x_0, in the type of ``sample``.

        Raises:
            TypeError: when the sample is not of a floating type or the timesteps are not integers.
            ValueError: when shapes differ or a timestep is out of range.
        """
        alpha, sigma, output = self._parametrization(model_output, timesteps, sample)
        if self.prediction_type == "epsilon":
            return (sample - sigma * output) / alpha
        if self.prediction_type == "sample":
            return output
        return alpha * sample - sigma * output

    def predict_epsilon(self, model_output: Tensor, timesteps: int | Tensor, sample: Tensor) -> Tensor:
        """Prediction of the noise from the network's output.

        Args:
            model_output: the network's prediction at the sample, (N, C, *spatial).
            timesteps: an int, a scalar tensor, or (N,) integers, in [0, T).
            sample: x_t, same shape.

        Returns:
            epsilon, in the type of ``sample``.

        Raises:
            TypeError: when the sample is not of a floating type or the timesteps are not integers.
            ValueError: when shapes differ or a timestep is out of range.
        """
        alpha, sigma, output = self._parametrization(model_output, timesteps, sample)
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "sample":
            return (sample - alpha * output) / sigma
        return alpha * output + sigma * sample

    def model_output_from_original(self, original: Tensor, timesteps: int | Tensor, sample: Tensor) -> Tensor:
        """The network output for which :meth:`predict_original` gives this x_0; arguments and errors as there."""
        alpha, sigma, x_0 = self._parametrization(original, timesteps, sample)
        if self.prediction_type == "epsilon":
            return (sample - alpha * x_0) / sigma
        if self.prediction_type == "sample":
            return x_0
        return (alpha * sample - x_0) / sigma

    def model_output_from_epsilon(self, epsilon: Tensor, timesteps: int | Tensor, sample: Tensor) -> Tensor:
        """The network output for which :meth:`predict_epsilon` gives this noise; arguments and errors as there."""
        alpha, sigma, noise = self._parametrization(epsilon, timesteps, sample)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return (sample - sigma * noise) / alpha
        return (noise - sigma * sample) / alpha

    def _parametrization(
        self, prediction: Tensor, timesteps: int | Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Amplitudes and the prediction in the type of the sample, so that a bf16 network costs no precision here."""
        self._check_shapes(sample, prediction, "prediction")
        alpha, sigma = self._amplitudes(timesteps, sample, lowest=0)
        return alpha, sigma, prediction.to(sample.dtype)

    def _check_shapes(self, sample: Tensor, other: Tensor, name: str) -> None:
        if sample.shape != other.shape:
            raise ValueError(
                f"{type(self).__name__}: {name} of shape {tuple(other.shape)} does not fit the sample's shape "
                f"{tuple(sample.shape)}."
            )

    # ---- sampling -----------------------------------------------------------------------------------------------

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step of the sampler, from a grid point to the next; every sampler defines its own.

        Args:
            model_output: the network's prediction at (sample, timestep), (N, C, *spatial).
            timestep: a point of the grid, one for the whole batch.
            sample: x_t, same shape.
            generator: source of the noise, where the sampler has any; may live on another device than the sample.

        Returns:
            ``(prev_sample, x0_hat)``: the sample at ``next_timestep(timestep)`` and the (clipped) prediction of x_0,
            both of the shape and type of ``sample``.

        Raises:
            ValueError: when the timestep is not in the grid or shapes differ.
        """
        raise NotImplementedError(f"{type(self).__name__} is a noise schedule without a sampler; use a subclass.")

    def _denoise(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        """Prediction of x_0, clipped if the scheduler clips."""
        original = self.predict_original(model_output, timestep, sample)
        return original.clamp(self.clip_sample_min, self.clip_sample_max) if self.clip_sample else original

    def _move(self, sample: Tensor, original: Tensor, timestep: int, target: int, noise_std: float = 0.0) -> Tensor:
        """``alpha' x_0 + sqrt(sigma'^2 - noise_std^2) epsilon`` with ``epsilon = (x - alpha x_0) / sigma``.

        Song et al., DDIM (https://arxiv.org/abs/2010.02502), equation 12 without its noise. With ``noise_std = 0`` it
        is the exact solution of the probability flow between the two times for a constant x_0: the step of DDIM, and
        with an extrapolated x_0 that of DPM-Solver++ (https://arxiv.org/abs/2211.01095, equation 9).
        """
        now, then = self.level(timestep), self.level(target)
        kept = math.sqrt(max(then.sigma**2 - noise_std**2, 0.0)) / now.sigma
        return kept * sample + (then.alpha - kept * now.alpha) * original

    @staticmethod
    def _noise_like(sample: Tensor, generator: torch.Generator | None) -> Tensor:
        """Standard normal noise, drawn on the generator's device."""
        device = sample.device if generator is None else generator.device
        return torch.randn(sample.shape, generator=generator, dtype=sample.dtype, device=device).to(sample.device)
