"""Pre-training of the function predictor: the function of a clean image, by patch embedding and predictor alone.

The input is x0 c_in(sigma_min), what the generator sees of a clean image. The trunk takes no part and gets no gradient, so
it leaves pre-training as it was initialised: the identity. With `edm` the network's output stands for x0 / sigma_data.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int, Key

from fid_imagegen.diffusion.distances import l2
from fid_imagegen.diffusion.noise import NoiseRange
from fid_imagegen.diffusion.preconditioning import per_image, preconditioning
from fid_imagegen.models.image_function import ImageFunctions, NativeTerm
from fid_imagegen.tasks.generator import init_generator, render_native, to_float
from fid_imagegen.tasks.networks import build_generator
from fid_imagegen.tasks.windows import check_windows, draw_windows, on_grid


class ReconstructionTask:
    """Group `generator` is trained by mean squared error on the rendered image."""

    trained = ("generator",)
    tracked: dict = {}

    def __init__(self, config):
        check_windows(config)
        self.config = config
        self.model = build_generator(config)
        if not hasattr(self.model, "reconstruct"):
            raise ValueError(
                f"found pre-training of network {config.model.network!r}, expected 'function': others have no predictor; set "
                "config.pretrain.num_steps=0"
            )
        self.noise = NoiseRange(**config.noise)
        self.form = preconditioning(config.preconditioning, config.time)
        self.clean_scale = self.form.clean_scale(self.noise)

    @property
    def num_classes(self) -> int:
        """Classes the data must have; 0 if labels are not used."""
        return self.config.model.num_classes

    def tokenizer(self, source, path) -> None:
        """No text."""

    def frozen(self) -> dict:
        """No frozen groups."""
        return {}

    def init(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """(trained groups, model state)."""
        return {"generator": init_generator(self.model, self.config, key, levels=len(self.form.times))}, {}

    def loss(self, groups, model_state, batch, key: Key[Array, ""], step: Int[Array, ""]):
        """Mean squared error of a batch {"image": uint8 NHWC}: (loss, (model_state, metrics))."""
        images, chunk = to_float(batch["image"]), self.config.render_chunk
        x0 = self.seen(images)
        functions = self._functions(groups["generator"], x0)
        if self.config.grid:
            windows = draw_windows(self.config, key)
            x0, rendered = windows.clean(images), windows.render(functions, chunk=chunk)
        else:
            rendered = render_native(functions, key=key if self.config.variational else None, chunk=chunk)
        loss = jnp.mean(l2(self.clean_scale * rendered, x0))
        # Peak-to-peak 2: images are in [-1, 1].
        return loss, (model_state, {"psnr": 10 * jnp.log10(4 / loss)})

    def seen(self, images: Array) -> Array:
        """Images as the network is given them: on its grid."""
        return on_grid(images, self.config.grid) if self.config.grid else images

    def reconstruct(self, params, x0: Array, *, trunk: bool = False) -> ImageFunctions:
        """The functions of clean images in [-1, 1]. With `trunk` the features pass through the noise-conditioned trunk."""
        functions = self._functions(params["generator"], x0, trunk=trunk)
        batch = x0.shape[0]
        return functions.replace(
            native=NativeTerm(noisy=x0, skip=jnp.zeros((batch,)), out=jnp.full((batch,), self.clean_scale))
        )

    def preview(self, groups, batch) -> dict[str, Array]:
        """Each image beside its function on the native grid: {"reconstructions": [2 count, height, width, channels]}."""
        x0 = self.seen(to_float(batch["image"]))
        values = render_native(self.reconstruct(groups, x0), key=None, chunk=self.config.render_chunk)
        return {"reconstructions": rearrange([x0, values], "pair b h w c -> (b pair) h w c")}

    def sample(self, params, key, index_B, *, steps: int | None = None, label_B=None, guidance=None) -> ImageFunctions:
        """A predictor cannot sample."""
        raise ValueError(
            "found a reconstruction run, expected a generator: train the consistency task, or call reconstruct()"
        )

    def _functions(self, params, x0, *, trunk: bool = False) -> ImageFunctions:
        sigma_B = jnp.full((x0.shape[0],), self.noise.sigma_min)
        scaled = per_image(self.form.c_in(sigma_B, self.noise)) * x0
        if not trunk:
            return self.model.apply({"params": params}, scaled, method=self.model.reconstruct)
        label_B = jnp.zeros((x0.shape[0],), jnp.int32) if self.model.num_classes else None
        return self.model.apply({"params": params}, scaled, self.form.levels(sigma_B, self.noise), label_B)


def rendered_psnr(task: ReconstructionTask, params, images, *, trunk: bool = False) -> float:
    """Mean PSNR in dB of reconstructions of uint8 images on the native grid, each image's own, averaged."""
    x0 = task.seen(to_float(jnp.asarray(images)))

    @jax.jit
    def measure(params, x0):
        values = render_native(task.reconstruct(params, x0, trunk=trunk), key=None, chunk=task.config.render_chunk)
        return jnp.mean(10 * jnp.log10(4 / l2(values, x0)))

    return float(measure(params, x0))
