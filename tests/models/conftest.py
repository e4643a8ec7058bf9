"""Image functions with random weights, and their values in float64 by plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.image_function import ImageFunctions, NativeTerm


def _make(kind, batch, grid, *, native=False, seed=0):
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(generator.standard_normal(shape), jnp.float32)

    sizes = zip(kind.layer_sizes, kind.columns, strict=True)
    per_image = {f"columns_{i}": draw(batch, fan_in, count) for i, ((fan_in, _), count) in enumerate(sizes)}
    shared = {"gain": 1 + 0.1 * draw(kind.channels)}
    for i, (fan_in, fan_out) in enumerate(kind.layer_sizes):
        shared |= {f"kernel_{i}": draw(fan_in, fan_out) / np.sqrt(3 * fan_in), f"bias_{i}": 0.1 * draw(fan_out)}
        if kind.weight_update == "low_rank":
            shared[f"factor_{i}"] = draw(kind.columns[i], fan_out)
    term = NativeTerm(noisy=draw(batch, *grid, kind.channels), skip=0.1 * draw(batch), out=1 + 0.1 * draw(batch))
    return ImageFunctions(kind=kind, grid=grid, shared=shared, per_image=per_image, native=term if native else None)


def _lanczos(coords, cell, samples):
    """Lanczos-3 weights [coordinates, samples] from the definition, one pair at a time."""
    weights = np.zeros((len(coords), samples))
    for n, x in enumerate(coords):
        for sample in range(samples):
            offset = (((x + 1) * samples - 1) / 2 - sample) / max(1.0, cell * samples / 2)
            weights[n, sample] = np.sinc(offset) * np.sinc(offset / 3) if abs(offset) < 3 else 0.0
    return weights / weights.sum(axis=1, keepdims=True)


def _reference(functions, rows, columns, cell=(0.0, 0.0)):
    """Values [batch, rows, columns, channels] on the product of two float64 axes."""
    kind, shared, native = functions.kind, functions.shared, functions.native
    coords = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    images = []
    for image in range(len(functions)):
        x = coords
        if kind.activation == "relu":
            phases = np.concatenate(
                [np.pi * coords[:, :1] * kind.frequencies, np.pi * coords[:, 1:] * kind.frequencies], 1
            )
            x = np.concatenate([np.cos(phases), np.sin(phases)], axis=1)
        for layer in range(kind.depth):
            base = np.asarray(shared[f"kernel_{layer}"], np.float64)
            predicted = np.asarray(functions.per_image[f"columns_{layer}"][image], np.float64)
            matrix = np.empty_like(base)
            if kind.weight_update == "low_rank":
                matrix = base * (1 + np.tanh(predicted @ np.asarray(shared[f"factor_{layer}"], np.float64)))
            for j in range(base.shape[1] * (kind.weight_update != "low_rank")):
                column = predicted[:, j % predicted.shape[1]]
                if kind.weight_update == "scale":
                    matrix[:, j] = base[:, j] * (1 + column)
                else:
                    matrix[:, j] = base[:, j] * column / np.linalg.norm(base[:, j] * column)
            x = x @ matrix + np.asarray(shared[f"bias_{layer}"], np.float64)
            if layer < kind.depth - 1:
                x = np.maximum(x, 0) if kind.activation == "relu" else np.sin(kind.omega * x)
        values = (x * np.asarray(shared["gain"], np.float64)).reshape(len(rows), len(columns), -1)
        if native is not None:
            noisy = np.asarray(native.noisy[image], np.float64)
            down, across = _lanczos(rows, cell[0], noisy.shape[0]), _lanczos(columns, cell[1], noisy.shape[1])
            resampled = np.einsum("yh,hwc,xw->yxc", down, noisy, across)
            values = float(native.skip[image]) * resampled + float(native.out[image]) * values
        images.append(values)
    return np.stack(images)


@pytest.fixture(scope="session")
def make_functions():
    """make_functions(kind, batch, grid, native=, seed=) -> ImageFunctions with random weights."""
    return _make


@pytest.fixture(scope="session")
def reference():
    """reference(functions, rows, columns, cell) -> values, written from the papers in float64."""
    return _reference


@pytest.fixture(scope="session")
def lanczos():
    """lanczos(coords, cell, samples) -> weights, in float64."""
    return _lanczos
