import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.models.uvit import UVITS, UViT

MODEL = UViT(image_size=(4, 6), channels=3, patch=2, width=16, heads=2, depth=4, num_classes=3)
LEVELS = jnp.asarray([[-1.0], [0.7]])
LABELS = jnp.asarray([2, 0])


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(MODEL.init)(jax.random.key(0), images, LEVELS, LABELS)["params"]


@pytest.fixture(scope="module")
def trained(params):
    """Every parameter moved."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * generator.standard_normal(x.shape), jnp.float32), params)


@jax.jit
def call(params, x, levels=LEVELS, labels=LABELS):
    return MODEL.apply({"params": params}, x, levels, labels)


# The authors' models; those with labels have a row more than theirs, the null class.
@pytest.mark.parametrize(
    ("preset", "size", "patch", "classes", "parameters"),
    [
        ("S", 32, 2, 0, 44_255_328),  # CIFAR-10
        ("S", 64, 4, 0, 44_292_228),  # CelebA
        # ImageNet; the authors' have no null class.
        ("M", 64, 4, 1000, 130_940_292 + 768),
        ("L", 64, 4, 1000, 286_827_652 + 1024),
    ],
)
def test_parameters_of_the_presets(preset, size, patch, classes, parameters):
    model = UViT((size, size), channels=3, patch=patch, num_classes=classes, **UVITS[preset])
    image, label = jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, jnp.zeros((1, 1)), label)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_blocks_are_stacked(params):
    """The encoder's last block is the one in the middle; only the decoder joins skips."""
    for name, layers in {"encoder": 3, "decoder": 2}.items():
        assert {x.shape[0] for x in jax.tree.leaves(params[name])} == {layers}
        kernels = params[name]["attention"]["query"]["kernel"]
        assert not np.allclose(kernels[0], kernels[1])  # each drawn by itself
    assert "join" not in params["encoder"] and params["decoder"]["join"]["kernel"].shape == (2, 32, 16)


def test_skips_are_taken_in_reverse(trained, images):
    """A decoder block that takes its skip alone returns the tokens of its counterpart, if its branches are closed."""
    encoder = trained["encoder"]

    def closed(block, layers):
        """The blocks whose residual branches' last layers are zero."""
        silent = {"out": block["attention"]["out"], "down": block["mlp"]["down"]}
        silent = jax.tree.map(lambda x: x.at[layers].set(0.0), silent)
        return block | {
            "attention": block["attention"] | {"out": silent["out"]},
            "mlp": block["mlp"] | {"down": silent["down"]},
        }

    take = jnp.concatenate([jnp.zeros((16, 16)), jnp.eye(16)])
    join = {"kernel": jnp.stack([take, take]), "bias": jnp.zeros((2, 16))}
    decoder = closed(trained["decoder"], jnp.arange(2)) | {"join": join}
    # The last decoder block takes the first encoder block's output, so later encoder blocks do not matter ...
    base = trained | {"decoder": decoder}
    first = call(base, images)
    for later in (1, 2):
        np.testing.assert_allclose(call(base | {"encoder": closed(encoder, later)}, images), first, atol=1e-6)
    assert np.abs(call(base | {"encoder": closed(encoder, 0)}, images) - first).max() > 1e-2
    # ... and where it keeps what the first decoder block made, that is the second encoder block's output.
    keep = jnp.concatenate([jnp.eye(16), jnp.zeros((16, 16))])
    base = base | {"decoder": decoder | {"join": join | {"kernel": jnp.stack([take, keep])}}}
    second = call(base, images)
    np.testing.assert_allclose(call(base | {"encoder": closed(encoder, 2)}, images), second, atol=1e-6)
    assert np.abs(call(base | {"encoder": closed(encoder, 1)}, images) - second).max() > 1e-2


def test_scan_unrolled_and_rematerialised_are_equal(trained, images):
    """In values and gradients, on one tree of parameters."""

    def run(**flags):
        model = MODEL.clone(**flags)
        loss = lambda p: (y := model.apply({"params": p}, images, LEVELS, LABELS), jnp.sum(y**2))[::-1]  # noqa: E731
        text = str(jax.make_jaxpr(lambda p: loss(p)[0])(trained))
        assert ("unroll=3" in text, "unroll=2" in text) == (bool(flags), bool(flags))
        assert text.count("prevent_cse") == 2 * bool(flags)
        return jax.jit(jax.grad(loss, has_aux=True))(trained)

    for found, expected in zip(jax.tree.leaves(run(unroll=True, remat=True)), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "shape", "labels", "message"),
    [
        ({"image_size": (4, 5)}, (1, 4, 5, 3), True, "found images of 4x5, expected multiples of the patch, 2; resize"),
        ({}, (1, 6, 4, 3), True, "found images of 6x4, expected 4x6; resize them or change the model's image_size"),
        ({}, (1, 4, 6, 1), True, "found images of 1 channels, expected 3; change"),
        ({}, (1, 4, 6, 3), False, r"found no labels, expected one of 0\.\.3 an image; give label_B"),
        ({"depth": 5}, (1, 4, 6, 3), True, "found depth 5, expected an even number; change"),
    ],
)
def test_what_does_not_fit(changes, shape, labels, message):
    labels = jnp.zeros(1, jnp.int32) if labels else None
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MODEL.clone(**changes).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros((1, 1)), labels)


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"num_classes": 0, "channels": 1, "image_size": (9, 3), "patch": 3, "depth": 2, "heads": 4},
    ],
)
def test_a_torch_twin_returns_the_same(changes):
    """The twin is written from the paper's figure: a list of skips, and a convolution for patches."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    model = MODEL.clone(**changes)
    generator = np.random.default_rng(2)
    image = generator.standard_normal((2, *model.image_size, model.channels)).astype(np.float32)
    level, label = np.asarray([-1.5, 0.9], np.float32), np.asarray([3, 1])
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, level[:, None], label)["params"]
    fan_in = lambda x: np.sqrt(np.prod(x.shape[-x.ndim + 1 : -1])) if x.ndim > 2 else 4.0  # noqa: E731
    params = jax.tree.map(lambda x: (generator.standard_normal(x.shape) / fan_in(x)).astype(np.float32), shapes)
    p = jax.tree.map(torch.from_numpy, params)
    dense = lambda q, x: x @ q["kernel"] + q.get("bias", 0)  # noqa: E731
    norm = lambda q, x: F.layer_norm(x, x.shape[-1:], q["scale"], q["bias"], eps=1e-5)  # noqa: E731

    def block(stacked, i, x, skip=None):
        q = jax.tree.map(lambda leaf: leaf[i], stacked)
        if skip is not None:
            x = dense(q["join"], torch.cat([x, skip], dim=-1))
        h = norm(q["norm_attention"], x)
        heads = [
            dense(q["attention"][name], h).unflatten(-1, (model.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        if model.qk_norm:
            scales = (q["attention"][name]["scale"] for name in ("query_norm", "key_norm"))
            heads[:2] = (F.rms_norm(x, x.shape[-1:], s, eps=1e-6) for x, s in zip(heads, scales, strict=False))
        h = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + dense(q["attention"]["out"], h)
        return x + dense(q["mlp"]["down"], F.gelu(dense(q["mlp"]["up"], norm(q["norm_mlp"], x))))

    filters = p["patches"]["kernel"].reshape(model.patch, model.patch, model.channels, -1).permute(3, 2, 0, 1)
    x = F.conv2d(torch.from_numpy(image).permute(0, 3, 1, 2), filters, p["patches"]["bias"], stride=model.patch)
    rows, columns = x.shape[2:]
    frequencies = torch.exp(-np.log(10000.0) * torch.arange(model.width // 2) / (model.width // 2))
    phases = 1000 * torch.from_numpy(level)[:, None] * frequencies
    extras = [torch.cat([torch.cos(phases), torch.sin(phases)], dim=-1)]
    if model.num_classes:
        extras = [p["label"]["embedding"][label], *extras]
    x = torch.cat([torch.stack(extras, dim=1), x.flatten(2).transpose(1, 2)], dim=1) + p["positions"]
    skips = []
    for i in range(model.depth // 2):
        x = block(p["encoder"], i, x)
        skips.append(x)
    x = block(p["encoder"], model.depth // 2, x)
    for i in range(model.depth // 2):
        x = block(p["decoder"], i, x, skips.pop())
    x = dense(p["head"], norm(p["norm"], x))[:, len(extras) :]
    x = x.unflatten(1, (rows, columns)).unflatten(-1, (model.patch, model.patch, model.channels))
    x = x.permute(0, 5, 1, 3, 2, 4).reshape(2, model.channels, *model.image_size)
    x = F.conv2d(x, p["smooth"]["kernel"].permute(3, 2, 0, 1), p["smooth"]["bias"], padding=1)
    expected = x.permute(0, 2, 3, 1).numpy()

    found = jax.jit(model.apply)({"params": params}, image, level[:, None], label)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"\nrelative {error:.1e}, largest {np.abs(expected).max():.2f}")
    assert error <= 1e-5
