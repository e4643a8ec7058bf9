import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.wuerstchen.stage_a import (
    Discriminator,
    MixingBlock,
    PaellaVQ,
    double_by_parity,
    double_by_transpose,
)

SMALL = {"levels": (4, 8), "bottleneck_blocks": 2, "codebook_size": 16}


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract(model, shape):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


def initialised(model, images):
    return jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))


def applied(model, variables, x, method, **kwargs):
    return jax.jit(lambda variables, x: model.apply(variables, x, method=method, **kwargs))(variables, x)


def randomised(variables, seed=1):
    """Every leaf drawn anew: at initialisation gammas are zero and much of the network is not seen."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [jax.random.uniform(k, x.shape, minval=0.1, maxval=0.5) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(0), (2, 16, 24, 3))


@pytest.fixture(scope="module")
def variables(images):
    return randomised(initialised(PaellaVQ(**SMALL), images))


def test_the_public_model_has_the_published_parameters_and_shapes():
    model = PaellaVQ()
    variables = abstract(model, (1, 64, 64, 3))
    params = variables["params"]
    assert size(params) == 18_406_894 and size(params["codebook"]) == 32_768
    down = {k: v for k, v in params.items() if k.startswith(("down", "to_latents", "latent_norm"))}
    up = {k: v for k, v in params.items() if k.startswith(("up", "from_latents", "bottleneck"))}
    assert [size(tree) for tree in (down, up, params["patch_in"], params["patch_out"])] == [
        2_664_788,
        15_704_526,
        2_496,
        2_316,
    ]
    image = jax.ShapeDtypeStruct((1, 1024, 768, 3), jnp.float32)
    encode = lambda v, x: model.apply(v, x, train=False, method="encode")  # noqa: E731
    latents = jax.eval_shape(encode, variables, image)
    assert latents.shape == (1, 256, 192, 4)
    assert jax.eval_shape(lambda v, z: model.apply(v, z, method="decode"), variables, latents).shape == image.shape


def test_a_block_begins_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 3))
    np.testing.assert_array_equal(MixingBlock().init_with_output(jax.random.key(1), x)[0][0], x)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 2)])
def test_doubling_by_parity_is_the_transposed_convolution(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (4, 4, 6, shape[-1]))
    np.testing.assert_allclose(double_by_parity(x, kernel), double_by_transpose(x, kernel), rtol=1e-5, atol=1e-5)


def test_latents_go_to_the_nearest_code(variables):
    model = PaellaVQ(**SMALL)
    z = jax.random.normal(jax.random.key(3), (2, 3, 5, 4))
    codes, indices, codebook_loss, commitment_loss = applied(model, variables, z, "quantise")
    codebook = np.asarray(variables["params"]["codebook"], np.float64)
    distances = np.linalg.norm(np.asarray(z, np.float64)[..., None, :] - codebook, axis=-1)
    np.testing.assert_array_equal(indices, distances.argmin(-1))
    np.testing.assert_allclose(codes, codebook[indices], rtol=1e-6)
    mean_square = (distances.min(-1) ** 2).mean() / 4
    np.testing.assert_allclose([codebook_loss, commitment_loss], mean_square, rtol=1e-5)


def test_gradients_pass_straight_through_and_each_loss_moves_its_side(variables):
    model, params = PaellaVQ(**SMALL), variables["params"]
    z, weights = jax.random.normal(jax.random.key(3), (2, 2, 3, 5, 4))

    def gradients(pick):
        def loss(codebook, z):
            out = model.apply({**variables, "params": params | {"codebook": codebook}}, z, method="quantise")
            return pick(out)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params["codebook"], z)

    of_codebook, of_latents = gradients(lambda out: jnp.sum(out[0] * weights))
    np.testing.assert_array_equal(of_codebook, 0)
    np.testing.assert_array_equal(of_latents, weights)
    of_codebook, of_latents = gradients(lambda out: out[2])
    assert np.any(of_codebook) and not np.any(of_latents)
    of_codebook, of_latents = gradients(lambda out: out[3])
    assert not np.any(of_codebook) and np.all(of_latents)


def test_codes_are_spread_as_latents_are():
    z = jax.random.normal(jax.random.key(1), (8, 16, 16, 4))
    (_, indices, _, _), _ = PaellaVQ(**SMALL | {"codebook_size": 64}).init_with_output(
        jax.random.key(0), z, method="quantise"
    )
    assert len(np.unique(indices)) > 48


def test_training_normalises_by_the_batch_and_tracks_its_statistics(images, variables):
    model = PaellaVQ(**SMALL)
    latents, updated = applied(model, variables, images, "encode", train=True, mutable=["batch_stats"])
    norm, before = variables["params"]["latent_norm"], variables["batch_stats"]["latent_norm"]
    standard = (latents - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(standard.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(standard.std((0, 1, 2)), 1, atol=1e-2)
    tracked = applied(model, {**variables, **updated}, images, "encode", train=False)
    after = updated["batch_stats"]["latent_norm"]
    mean, var = ((after[k] - 0.9 * before[k]) / 0.1 for k in ("mean", "var"))
    raw = (tracked - norm["bias"]) / norm["scale"] * jnp.sqrt(after["var"] + 1e-5) + after["mean"]
    np.testing.assert_allclose(raw.mean((0, 1, 2)), mean, rtol=1e-3)
    np.testing.assert_allclose(raw.var((0, 1, 2)), var, rtol=1e-2)


def test_the_whole_is_its_parts(images, variables):
    model = PaellaVQ(**SMALL)
    z = applied(model, variables, images, "encode", train=False)
    codes, _, *losses = applied(model, variables, z, "quantise")
    found, *found_losses = applied(model, variables, images, "__call__", train=False)
    assert found.shape == images.shape
    np.testing.assert_allclose(found, applied(model, variables, codes, "decode"), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)


def test_scan_unroll_and_remat_agree(variables):
    """In float64: the last bits of a float32 sum differ by processor."""

    def gradients(**changes):
        model, z = PaellaVQ(**SMALL, dtype=jnp.float64, **changes), jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
        loss = lambda variables: jnp.mean(model.apply(variables, z, method="decode"))  # noqa: E731
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        return jax.jit(jax.value_and_grad(loss))({"params": params, "batch_stats": {}})

    with jax.enable_x64(True):
        expected = gradients()
        for changes in ({"unroll": True}, {"remat": True}):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients(**changes), expected
            )


def test_half_precision_computes_inside_alone(images, variables):
    model = PaellaVQ(**SMALL, dtype=jnp.bfloat16)
    z = applied(model, variables, images, "encode", train=False)
    exact = applied(PaellaVQ(**SMALL), variables, images, "encode", train=False)
    assert z.dtype == applied(model, variables, z, "decode").dtype == jnp.float32
    assert 0 < jnp.abs(z - exact).max() < 0.02 * jnp.abs(exact).max()


def test_sizes_off_the_stride_are_refused(variables):
    with pytest.raises(ValueError, match=r"\(1, 16, 18, 3\).*multiples of 4"):
        PaellaVQ(**SMALL).apply(variables, jnp.zeros((1, 16, 18, 3)), train=False, method="encode")


def test_the_discriminator_has_the_authors_layers():
    model = Discriminator()
    variables = abstract(model, (1, 128, 128, 3))
    widths = (3, *model.widths)
    convolutions = sum(9 * a * b + b for a, b in zip(widths, widths[1:], strict=False))
    assert size(variables["params"]) == convolutions + 513 == 6_271_105
    logits = jax.eval_shape(lambda v: model.apply(v, jnp.zeros((4, 128, 256, 3)), train=False), variables)
    assert logits.shape == (4, 2, 4)


def test_spectral_norms_become_one_in_training_and_stay_in_evaluation(images):
    model = Discriminator((4, 8))
    variables = initialised(model, images)

    def step(_, variables):
        return {**variables, **model.apply(variables, images, train=True, mutable=["batch_stats"])[1]}

    variables = jax.jit(lambda variables: jax.lax.fori_loop(0, 400, step, variables))(variables)
    for index in range(2):
        kernel = variables["params"][f"conv_{index}"]["kernel"]
        sigma = variables["batch_stats"][f"spectral_{index}"][f"conv_{index}/kernel/sigma"]
        np.testing.assert_allclose(jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2), sigma, rtol=1e-3)
    _, kept = applied(model, variables, images, "__call__", train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


def test_images_below_the_discriminators_stride_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 64, 64, 3\).*above 64"):
        abstract(Discriminator(), (1, 64, 64, 3))
