"""A step of easy consistency tuning in PyTorch, as `training.state` and `diffusion.objectives.ect` make ours.

The student at level t, itself without gradient at r on the same noise, pseudo-Huber's distance of both over t - r; fused Adam;
one average of the parameters. What is drawn is of the same laws, from PyTorch's own generator.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fid_imagegen.models.image_function import pixel_grid

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
LOG_MEAN, LOG_DEVIATION, LEARNING_RATE, DECAY = -1.1, 2.0, 1e-4, 0.9999


class Draws(NamedTuple):
    """What a step draws: levels r < t and noise for every image, coordinates [N, 2] for all of them."""

    t_B: Tensor
    r_B: Tensor
    noise_BHWC: Tensor
    coords_N2: Tensor


class TorchTrainer:
    """A network in training, on square images as uint8 [batch, size, size, channels]; `compiled`: by torch.compile."""

    def __init__(self, network: nn.Module, images: Tensor, *, compiled: bool = False, bfloat16: bool = False):
        self.network, self.images = network.train(), images
        self.precision = torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16)
        self.params = list(network.parameters())
        self.average = [param.detach().clone() for param in self.params]
        self.optimizer = torch.optim.Adam(self.params, LEARNING_RATE, fused=True)
        self.steps, size = 0, images.shape[1]
        self.grid = torch.from_numpy(pixel_grid(size, size)).to(images.device)
        self.net = torch.compile(network) if compiled else network

    def draw(self) -> Draws:
        """The levels of ECT's first stage, and variational coordinates."""
        bounds = ((math.log(sigma) - LOG_MEAN) / LOG_DEVIATION for sigma in (SIGMA_MIN, SIGMA_MAX))
        standard = nn.init.trunc_normal_(self.grid.new_empty(len(self.images)), 0.0, 1.0, *bounds)
        t_B = torch.exp(LOG_MEAN + LOG_DEVIATION * standard)
        r_B = torch.clamp_min(t_B * (1 - (1 + 8 * torch.sigmoid(-t_B)) / 2), SIGMA_MIN)
        noise = torch.randn(self.images.shape, device=self.images.device)
        jitter = torch.clamp(0.3 * torch.randn_like(self.grid), -0.5, 0.5) / self.images.shape[1]
        return Draws(t_B, r_B, noise, self.grid + jitter)

    def clean(self, x: Tensor, sigma_B: Tensor, coords: Tensor) -> Tensor:
        """f(x, sigma) = c_skip x + (1 - c_skip) G(c_in x, ln(sigma) / 4)."""
        sigma = sigma_B[:, None, None, None]
        with self.precision:
            made = self.net(x * torch.rsqrt(sigma**2 + SIGMA_DATA**2), torch.log(sigma_B) / 4, coords)
        skip = SIGMA_DATA**2 / ((sigma - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
        return skip * x + (1 - skip) * made.float()

    def loss(self, draws: Draws) -> Tensor:
        """The mean over the batch."""
        x0, (t_B, r_B, z, coords) = self.images.float() / 127.5 - 1, draws
        found = self.clean(x0 + t_B[:, None, None, None] * z, t_B, coords)
        with torch.no_grad():
            wanted = self.clean(x0 + r_B[:, None, None, None] * z, r_B, coords)
        c = 0.00054 * math.sqrt(x0[0].numel())
        distance = torch.sqrt((found - wanted).square().sum(dim=(1, 2, 3)) + c**2 + 1e-12) - c
        return (distance / torch.clamp_min(t_B - r_B, 1e-4)).mean()

    def step(self, draws: Draws | None = None) -> Tensor:
        """Loss, gradient, update, average."""
        loss = self.loss(draws or self.draw())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        decay = min(DECAY, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [param.detach() for param in self.params], 1 - decay)
        self.steps += 1
        return loss.detach()
