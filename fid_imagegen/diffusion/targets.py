"""Prediction forms: what the (a, b) output of Stage B and Stage C stands for, its loss, and the sampler's step.

A form has a path from clean x0 (t = 0) to noise (t = 1), and a target that is affine in x0 and eps along it. One loop
trains and one loop samples every form:

    t_B = form.times(keys_B);  x_t = form.add_noise(x0, eps, t_B);  output = net(form.scale_input(x_t, t_B), t_B, cond)
    loss_B = form.loss(output, x0, eps, t_B)

    x = form.initial_deviation * noise(0);  predict(x, t_B) = form.predict(net(form.scale_input(x, t_B), t_B, cond), x, t_B)
    x = cosine.sample(predict, form.step, x, cosine.sampling_times(steps), noise)

The network always sees t in [0, 1] as its noise level. `eps_ab` is the published parameterisation, whose division is
ill-conditioned; the others read the target from `a` and leave `b`, the half of the head that public weights need, untrained.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fid_imagegen.diffusion import cosine
from fid_imagegen.diffusion.distances import l2
from fid_imagegen.diffusion.noise import RHO, NoiseRange, karras_sigma, lognormal_sigmas
from fid_imagegen.diffusion.preconditioning import c_in, per_image

Images = Float[Array, "batch height width channels"]
Levels = Float[Array, "batch"]
Output = tuple[Images, Images]


class Form:
    """What the forms share: the loss on the target, and an input and start of unit variance."""

    initial_deviation = 1.0

    def loss(self, output: Output, x0: Images, eps: Images, t_B: Levels) -> Levels:
        """Weighted mean squared error of the prediction, one an example."""
        prediction = self.predict(output, self.add_noise(x0, eps, t_B), t_B)
        return self.weight(t_B) * l2(prediction, self.target(x0, eps, t_B))

    def weight(self, t_B: Levels) -> Levels:
        """Weight of the loss at a level."""
        return jnp.ones_like(t_B)

    def scale_input(self, x: Images, t_B: Levels) -> Images:
        """What the network is given in the place of x_t."""
        return x

    def predict(self, output: Output, x: Images, t_B: Levels) -> Images:
        """The network's output as an estimate of `target`; guidance mixes two of these, `step` takes one."""
        return output[0]


class Cosine(Form):
    """Würstchen's path, training levels and DDPM steps."""

    times = staticmethod(cosine.training_times)
    add_noise = staticmethod(cosine.add_noise)

    def step(self, x: Images, prediction: Images, t_B: Levels, next_B: Levels, noise: Images) -> Images:
        """One ancestral step."""
        return cosine.ddpm_step(x, self.to_eps(prediction, x, t_B), t_B, next_B, noise)


@dataclasses.dataclass(frozen=True)
class EpsAB(Cosine):
    """eps = (x - a) / divisor(b), weighted by p2: the form of the public weights."""

    divisor: Callable[[Images], Images]

    weight = staticmethod(cosine.p2_weight)

    def predict(self, output: Output, x: Images, t_B: Levels) -> Images:
        """Estimate of eps."""
        a, b = output
        return (x - a) / self.divisor(b)

    def target(self, x0: Images, eps: Images, t_B: Levels) -> Images:
        """The noise."""
        return eps

    def to_eps(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The noise in x_t."""
        return prediction

    def to_x0(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The clean image in x_t."""
        signal = per_image(cosine.alpha_bar(t_B))
        return (x - jnp.sqrt(1 - signal) * prediction) / jnp.sqrt(signal)


class Velocity(Cosine):
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, arXiv 2202.00512, App. D) on the cosine path."""

    def target(self, x0: Images, eps: Images, t_B: Levels) -> Images:
        """The velocity along the circle from x0 to eps."""
        signal = per_image(cosine.alpha_bar(t_B))
        return jnp.sqrt(signal) * eps - jnp.sqrt(1 - signal) * x0

    def to_eps(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The noise in x_t."""
        signal = per_image(cosine.alpha_bar(t_B))
        return jnp.sqrt(1 - signal) * x + jnp.sqrt(signal) * prediction

    def to_x0(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The clean image in x_t."""
        signal = per_image(cosine.alpha_bar(t_B))
        return jnp.sqrt(signal) * x - jnp.sqrt(1 - signal) * prediction


class Jump(Velocity):
    """A consistency function (Song et al. 2023, Alg. 1): v names the end of the path. Every step goes there and back, with fresh
    noise, to the next level."""

    def step(self, x: Images, prediction: Images, t_B: Levels, next_B: Levels, noise: Images) -> Images:
        """A jump to x0; at next = 0 that is all."""
        x0 = self.to_x0(prediction, x, t_B)
        return jnp.where(per_image(next_B) > 0, self.add_noise(x0, noise, next_B), x0)


class Flow(Form):
    """Rectified flow (Liu et al. 2023, arXiv 2209.03003): x_t = (1 - t) x0 + t eps, target eps - x0, Euler steps.

    Levels are logit-normal (0, 1), the best of Esser et al. 2024 (arXiv 2403.03206, Sec. 3.1).
    """

    def times(self, keys_B: Key[Array, "batch"]) -> Levels:
        """Training levels, one key an example."""
        return jax.nn.sigmoid(jax.vmap(jax.random.normal)(keys_B))

    def add_noise(self, x0: Images, eps: Images, t_B: Levels) -> Images:
        """x_t on the straight line from x0 to eps."""
        return (1 - per_image(t_B)) * x0 + per_image(t_B) * eps

    def target(self, x0: Images, eps: Images, t_B: Levels) -> Images:
        """The line's direction."""
        return eps - x0

    def to_eps(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The noise in x_t."""
        return x + (1 - per_image(t_B)) * prediction

    def to_x0(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The clean image in x_t."""
        return x - per_image(t_B) * prediction

    def step(self, x: Images, prediction: Images, t_B: Levels, next_B: Levels, noise: Images) -> Images:
        """Euler's step; `noise` is not used."""
        return x + per_image(next_B - t_B) * prediction


@dataclasses.dataclass(frozen=True)
class EDM(Form):
    """Karras et al. 2022 (arXiv 2206.00364, Tables 1 and 2): x_t = x0 + sigma(t) eps, F of unit variance, Euler steps.

    t is the place in the Karras grid: sigma(t)^(1/7) is linear in t from sigma_min to sigma_max, and sigma(0) = 0, so that
    equal steps in t are the paper's levels (but for the last, which ends at sigma(1/steps)) and t is the network's input.
    ln sigma ~ N(mean, deviation^2) in training.
    """

    noise: NoiseRange
    mean: float
    deviation: float

    @property
    def initial_deviation(self) -> float:
        return self.noise.sigma_max

    def sigma(self, t_B: Levels) -> Levels:
        """Noise deviation at t; 0 at t = 0, where sampling ends."""
        return jnp.where(t_B > 0, karras_sigma(1 - t_B, 2, self.noise), 0)

    def times(self, keys_B: Key[Array, "batch"]) -> Levels:
        """Training levels, one key an example."""
        sigma_B = lognormal_sigmas(keys_B, self.mean, self.deviation, self.noise)
        low, high = self.noise.sigma_min ** (1 / RHO), self.noise.sigma_max ** (1 / RHO)
        return (sigma_B ** (1 / RHO) - low) / (high - low)

    def add_noise(self, x0: Images, eps: Images, t_B: Levels) -> Images:
        """x_t of clean x0 and standard normal eps."""
        return x0 + per_image(self.sigma(t_B)) * eps

    def scale_input(self, x: Images, t_B: Levels) -> Images:
        """x_t at unit variance."""
        return per_image(c_in(self.sigma(t_B), self.noise)) * x

    def _angle(self, t_B: Levels) -> tuple[Array, Array, Array]:
        """(sine, cosine, radius) of the triangle of sigma and sigma_data: c_skip = cosine^2, c_out = sigma_data sine."""
        sigma, data = per_image(self.sigma(t_B)), self.noise.sigma_data
        radius = jnp.sqrt(sigma**2 + data**2)
        return sigma / radius, data / radius, radius

    def target(self, x0: Images, eps: Images, t_B: Levels) -> Images:
        """F of x0 = c_skip x_t + c_out F, without the division by c_out, which is 0 at sigma = 0."""
        sine, cosine, _ = self._angle(t_B)
        return sine / self.noise.sigma_data * x0 - cosine * eps

    def to_eps(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The noise in x_t."""
        sine, cosine, radius = self._angle(t_B)
        return sine / radius * x - cosine * prediction

    def to_x0(self, prediction: Images, x: Images, t_B: Levels) -> Images:
        """The clean image in x_t."""
        sine, cosine, _ = self._angle(t_B)
        return cosine**2 * x + self.noise.sigma_data * sine * prediction

    def step(self, x: Images, prediction: Images, t_B: Levels, next_B: Levels, noise: Images) -> Images:
        """Euler's step on dx / dsigma = eps; `noise` is not used."""
        return x + per_image(self.sigma(next_B) - self.sigma(t_B)) * self.to_eps(prediction, x, t_B)


FORMS: dict[str, Form] = {
    "eps_ab": EpsAB(divisor=lambda b: jnp.abs(1 - b) + 1e-5),  # Stage C
    "eps_ab_sigmoid": EpsAB(divisor=lambda b: b),  # Stage B, whose network puts b in (0, 1)
    "v": Velocity(),
    "jump": Jump(),
    "flow": Flow(),
    # The paper's levels, made for a data deviation of 0.5, times two: latents are scaled to a deviation of 1.
    "edm": EDM(NoiseRange(sigma_min=0.004, sigma_max=160.0, sigma_data=1.0), mean=-1.2 + math.log(2), deviation=1.2),
}


def form(name: str) -> Form:
    """The named form; ValueError lists the known names."""
    if name not in FORMS:
        raise ValueError(f"found prediction form {name!r}, expected one of {sorted(FORMS)}; change config.form")
    return FORMS[name]
