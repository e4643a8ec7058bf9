"""The user's API: load a trained generator, generate image functions, render them at any size.

pipe = ImageFunctionPipeline.from_pretrained("runs/a")
functions = pipe.generate(num=16, seed=0)                  # one network evaluation
images = functions.render(height=512, width=768)           # uint8 [16, 512, 768, 3]
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from fid_imagegen import tasks
from fid_imagegen.interop.safetensors_io import load_tree, save_tree
from fid_imagegen.models import rendering
from fid_imagegen.models.coordinate_mlp import CoordinateMLP
from fid_imagegen.models.image_function import Guided, ImageFunctions, NativeTerm, PixelGrid
from fid_imagegen.models.local_function import LocalMLP
from fid_imagegen.models.patch_function import PatchMLP
from fid_imagegen.models.pixel_function import PixelMLP
from fid_imagegen.pipelines import edits
from fid_imagegen.tasks.generator import to_float
from fid_imagegen.tasks.networks import grid_size
from fid_imagegen.training.runs import read_params

BATCH = 64
MAX_NUM = 1_000_000
READ = {int: int, float: float, str: str, bool: "True".__eq__}
KINDS = {kind.__name__: kind for kind in (CoordinateMLP, LocalMLP, PatchMLP, PixelMLP, PixelGrid)}


class RenderableFunctions:
    """A batch of generated image functions, detached from the network that made them."""

    def __init__(self, functions: ImageFunctions):
        self.functions = functions

    def __len__(self) -> int:
        return len(self.functions)

    def __getitem__(self, images: slice) -> "RenderableFunctions":
        """The functions of a slice of the batch."""
        return RenderableFunctions(self.functions[images])

    @property
    def nbytes(self) -> int:
        """Bytes of everything needed to render."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.functions))

    def render(
        self,
        height: int,
        width: int,
        window: rendering.Window | None = None,
        filter: Literal["area", "point"] = "area",
    ) -> UInt8[np.ndarray, "batch height width channels"]:
        """uint8 images of any size. window: (top, left, bottom, right) in [0, 1], the part of the image to show.

        A window aligned with the pixels of a larger render equals that render's crop bit for bit. Raises ValueError for sizes
        below 1 or beyond `rendering.MAX_PIXELS`, and for windows outside [0, 1].
        """
        return rendering.render(self.functions, height, width, window=window, filter=filter, dtype=np.uint8)

    def save(self, path: str | Path) -> None:
        """Writes the functions to one safetensors file that renders without the generator."""
        functions, kind = self.functions, self.functions.kind
        metadata = {"guided": str(isinstance(kind, Guided))}
        kind = kind.kind if isinstance(kind, Guided) else kind
        tree = {"per_image": functions.per_image} | ({"shared": functions.shared} if functions.shared else {})
        if functions.native is not None:
            tree["native"] = {name: getattr(functions.native, name) for name in ("noisy", "skip", "out")}
        metadata |= {name: str(value) for name, value in dataclasses.asdict(kind).items()}
        metadata |= {"format": "fid_imagegen.image_functions.1", "kind": type(kind).__name__}
        metadata["grid"] = "x".join(map(str, functions.grid))
        save_tree(path, jax.tree.map(np.asarray, tree), metadata)

    @classmethod
    def load(cls, path: str | Path) -> "RenderableFunctions":
        """Reads a file of `save`. ValueError if it is another kind of file."""
        tree, metadata = load_tree(path)
        if metadata.get("format") != "fid_imagegen.image_functions.1":
            raise ValueError(
                f"found format {metadata.get('format')!r} in {path}, expected a file of RenderableFunctions.save"
            )
        kind = KINDS[metadata.get("kind", "CoordinateMLP")]
        fields = {field.name: READ[field.type](metadata[field.name]) for field in dataclasses.fields(kind)}
        made = kind(**fields)
        height, width = map(int, metadata["grid"].split("x"))
        native = NativeTerm(**tree["native"]) if "native" in tree else None
        return cls(
            ImageFunctions(
                kind=Guided(made) if metadata.get("guided") == "True" else made,
                grid=(height, width),
                shared=tree.get("shared", {}),
                per_image=tree["per_image"],
                native=native,
            )
        )


class ImageFunctionPipeline:
    """A trained generator of image functions."""

    def __init__(self, config, params: dict[str, Any]):
        self.config = config
        self.task = tasks.build(config)
        self.params = params

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageFunctionPipeline":
        """Loads a work directory (its last evaluation EMA) or an exported folder.

        Raises FileNotFoundError naming what is not there, ValueError for a run of another kind.
        """
        config, params = read_params(folder)
        if config.task not in ("consistency", "reconstruction"):
            raise ValueError(
                f"found a run of task {config.task!r} in {folder}, expected a generator of image functions; "
                "stages of Würstchen are loaded together, by WuerstchenPipeline"
            )
        return cls(config, params)

    @functools.cached_property
    def _sample(self):
        return jax.jit(self.task.sample, static_argnames="steps")

    def generate(
        self, num: int, seed: int = 0, steps: int | None = None, labels=None, guidance: float | None = None
    ) -> RenderableFunctions:
        """`num` image functions. Function i depends on (seed, i) alone: generating more repeats the first ones.

        steps: of the sampler; default: 1, for a diffusion model 18 of Heun, whose samples are pixels and not functions: at other
        sizes they are interpolated. labels: one class an image where the generator has classes (default: all in turn).
        guidance: scale of classifier-free guidance, where labels were dropped in training; it takes two evaluations a step.

        Raises ValueError for counts below 1, wrong labels, and what a generator cannot do.
        """
        if not 1 <= num <= MAX_NUM:
            raise ValueError(f"found num={num}, expected 1 to {MAX_NUM:,}")
        labels = self._check_labels(num, labels)
        # Whole batches keep one compiled shape; what is beyond `num` is dropped.
        batch, parts = min(num, BATCH), []
        for start in range(0, num, batch):
            index = np.arange(start, start + batch)
            chosen = None if labels is None else jnp.asarray(labels[np.minimum(index, num - 1)])
            asked = {"steps": steps, "label_B": chosen, "guidance": guidance}
            made = self._sample(self.params, jax.random.key(seed), jnp.asarray(index), **asked)
            parts.append(made)
        return RenderableFunctions(_concatenate(parts, num))

    def edit(
        self,
        images: UInt8[np.ndarray, "batch height width channels"],
        edit: Literal["inpaint", "colourise", "super_resolve"],
        *,
        mask: np.ndarray | None = None,
        factor: int | None = None,
        steps: int = 40,
        seed: int = 0,
        labels=None,
    ) -> RenderableFunctions:
        """Functions of images of which a part is known, on the training grid: zero-shot edits of consistency models.

        inpaint: where `mask` [height, width] is 0 the images are not looked at. colourise: only their luma is; super_resolve:
        only the means of blocks of `factor` x `factor` pixels. On the training grid what is known stays as it was.

        Raises ValueError for images of another size and for what an edit lacks or has no use for.
        """
        if not hasattr(self.task, "edit"):
            raise ValueError(
                f"found a run of task {self.config.task!r}, expected a generator: train the consistency task"
            )
        images, size, channels = np.asarray(images), grid_size(self.config), self.config.data.channels
        edits.check(images, edit, size, channels, mask=mask, factor=factor)
        labels = self._check_labels(len(images), labels)
        mask = None if mask is None else jnp.asarray(mask, jnp.float32)
        asked = {"edit": edit, "factor": factor, "steps": steps, "label_B": labels}
        return RenderableFunctions(self._edit(self.params, jax.random.key(seed), jnp.asarray(images), mask, **asked))

    @functools.cached_property
    def _edit(self):
        """Compiled once for each edit, number of images and number of steps."""

        def run(params, key, images, mask, *, edit, factor, steps, label_B):
            project, x = edits.projection(edit, mask, factor), to_float(images)
            index_B = jnp.arange(len(images))
            return self.task.edit(params, key, index_B, project(x), project, steps=steps, label_B=label_B)

        return jax.jit(run, static_argnames=("edit", "factor", "steps"))

    def _check_labels(self, num: int, labels):
        if labels is None:
            return None
        classes, labels = self.config.model.num_classes, np.asarray(labels)
        if not classes:
            raise ValueError(
                "found labels for a model without classes; leave labels out, or train with model.num_classes"
            )
        whole = labels.shape == (num,) and np.issubdtype(labels.dtype, np.integer)
        if not whole or labels.min() < 0 or labels.max() >= classes:
            found = f"from {labels.min()} to {labels.max()}" if whole else f"{labels.dtype} of shape {labels.shape}"
            raise ValueError(f"found labels {found}, expected {num} integers from 0 to {classes - 1}; change labels")
        return labels.astype(np.int32)


def _concatenate(parts: list[ImageFunctions], num: int) -> ImageFunctions:
    per_image, native = (
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num], *[getattr(part, name) for part in parts])
        for name in ("per_image", "native")
    )
    return parts[0].replace(per_image=per_image, native=native)
