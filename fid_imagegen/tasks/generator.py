"""What the tasks of a generator share: images from bytes, its functions, nets for objectives."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Key, UInt8

from fid_imagegen.diffusion.preconditioning import per_image
from fid_imagegen.models.image_function import (
    ImageFunctions,
    PixelGrid,
    evaluate_rematerialised,
    pixel_cell,
    pixel_grid,
    variational_coordinates,
)


def to_float(images: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def render_native(
    functions: ImageFunctions, *, key: Key[Array, ""] | None, chunk: int
) -> Float[Array, "batch height width channels"]:
    """Values on the training grid; with a `key` at variational coordinates, the same for the whole batch."""
    kind, (height, width), native = functions.kind, functions.grid, functions.native
    # Pixels have no coordinates that could be jittered.
    if isinstance(kind, PixelGrid) or (key is None and hasattr(kind, "evaluate_grid")):
        values = jax.vmap(lambda one: kind.evaluate_grid(functions.shared, one, (height, width)))(functions.per_image)
        return values if native is None else per_image(native.skip) * native.noisy + per_image(native.out) * values
    coords = jnp.asarray(pixel_grid(height, width))
    if key is not None:
        coords = variational_coordinates(coords, key, size=max(height, width))
    values = evaluate_rematerialised(functions, coords, jnp.asarray(pixel_cell(height, width)), chunk=chunk)
    return rearrange(values, "b (h w) c -> b h w c", h=height)


def image_functions(model, params, x, levels_BK, label_B, **settings) -> ImageFunctions:
    """What a generator makes of scaled noisy images: image functions, those of a fixed-size one its pixels."""
    made = model.apply({"params": params}, x, levels_BK, label_B, **settings)
    if isinstance(made, ImageFunctions):
        return made
    return ImageFunctions(kind=PixelGrid(made.shape[-1]), grid=made.shape[1:3], shared={}, per_image={"pixels": made})


def generator_net(model, params, *, training: bool, variational: bool, chunk: int):
    """The generator with `params` bound, as objectives and samplers see it: net(x, levels_BK, labels, key=) -> raw output."""

    def net(x, levels_BK, label_B, *, key: Key[Array, ""] | None = None):
        rngs = {"dropout": key} if training else None
        functions = image_functions(model, params, x, levels_BK, label_B, deterministic=not training, rngs=rngs)
        jitter = jax.random.fold_in(key, 1) if training and variational else None
        return render_native(functions, key=jitter, chunk=chunk)

    return net


def init_generator(model, config, key: Key[Array, ""], *, levels: int):
    """Fresh parameters (a plain dict) of a network that is told `levels` values of the noise level."""
    size, channels = config.grid or config.data.image_size, config.data.channels
    label = jnp.zeros((1,), jnp.int32) if config.model.num_classes else None
    return model.init(key, jnp.zeros((1, size, size, channels)), jnp.zeros((1, levels)), label)["params"]
