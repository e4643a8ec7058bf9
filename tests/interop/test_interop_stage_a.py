import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.interop.paella_vq import from_state_dict, to_state_dict
from fid_imagegen.models.wuerstchen.stage_a import Discriminator, PaellaVQ

# Two levels and square factors as published; three, one, and odd widths.
CONFIGS = [
    {"levels": (8, 16), "bottleneck_blocks": 2, "codebook_size": 32},
    {"levels": (3, 6, 12), "bottleneck_blocks": 1, "codebook_size": 7, "latent_channels": 3, "patch": 3},
    {"levels": (10,), "bottleneck_blocks": 3, "codebook_size": 11, "latent_channels": 5, "patch": 1},
]


def torch_shapes(model, codebook):
    """Names and shapes of the PyTorch model's tensors, written down block by block."""
    shapes, latents, patch = {}, model.latent_channels, 3 * model.patch**2

    def block(name, width):
        shapes[f"{name}.gammas"] = (6,)
        layers = {
            "depthwise.1": (width, 1, 3, 3),
            "channelwise.0": (4 * width, width),
            "channelwise.2": (width, 4 * width),
        }
        for layer, shape in layers.items():
            convolution(f"{name}.{layer}", *shape)

    def convolution(name, *shape, bias=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (bias or shape[0],)

    convolution("in_block.1", model.levels[0], patch, 1, 1)
    down, up = iter(range(100)), iter(range(100))
    for level, width in enumerate(model.levels):
        if level:
            convolution(f"down_blocks.{next(down)}", width, model.levels[level - 1], 4, 4)
        block(f"down_blocks.{next(down)}", width)
    last = f"down_blocks.{next(down)}"
    shapes[f"{last}.0.weight"] = (latents, model.levels[-1], 1, 1)
    shapes |= {f"{last}.1.{leaf}": (latents,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    shapes[f"{last}.1.num_batches_tracked"] = ()
    shapes[codebook] = (model.codebook_size, latents)
    convolution(f"up_blocks.{next(up)}.0", model.levels[-1], latents, 1, 1)
    for level in reversed(range(len(model.levels))):
        width = model.levels[level]
        if level < len(model.levels) - 1:
            wider = model.levels[level + 1]
            convolution(f"up_blocks.{next(up)}", wider, width, 4, 4, bias=width)
        for _ in range(model.bottleneck_blocks if level == len(model.levels) - 1 else 1):
            block(f"up_blocks.{next(up)}", width)
    convolution("out_block.0", patch, model.levels[0], 1, 1)
    return shapes


def random_tensors(shapes, seed=0):
    """Uniform in [0.1, 0.6] with a random sign; variances positive."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        sign = 1 if name.endswith("running_var") else rng.choice([-1, 1], shape)
        tensors[name] = (sign * rng.uniform(0.1, 0.6, shape)).astype(np.float32)
    return tensors


@pytest.mark.parametrize("authors", [False, True], ids=["diffusers", "authors"])
def test_every_tensor_of_the_public_model_is_accounted_for(authors):
    model = PaellaVQ()
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False))
    ours = jax.eval_shape(lambda v: to_state_dict(model, v, authors=authors), variables)
    theirs = torch_shapes(model, f"vquantizer.{'codebook' if authors else 'embedding'}.weight")
    assert {name: leaf.shape for name, leaf in ours.items()} == theirs
    assert len(theirs) == 122


@pytest.mark.parametrize("authors", [False, True], ids=["diffusers", "authors"])
@pytest.mark.parametrize("config", CONFIGS)
def test_tensors_come_back_as_they_went_in(config, authors):
    model = PaellaVQ(**config)
    shapes = torch_shapes(model, f"vquantizer.{'codebook' if authors else 'embedding'}.weight")
    tensors = random_tensors(shapes)
    variables = from_state_dict(model, tensors, "here")
    template = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, model.stride, model.stride, 3)), train=False)
    )
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, template)
    back = to_state_dict(model, variables, authors=authors)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], 0 if name.endswith("num_batches_tracked") else tensor)


def test_tensors_that_do_not_fit_are_all_listed():
    model = PaellaVQ(**CONFIGS[0])
    tensors = random_tensors(torch_shapes(model, "vquantizer.codebook.weight"))
    del tensors["up_blocks.2.gammas"], tensors["down_blocks.3.1.running_var"]
    with pytest.raises(ValueError, match="in here") as error:
        from_state_dict(model, tensors | {"up_blocks.9.gammas": np.zeros(6)}, "here")
    for name in ("missing: ", "up_blocks.2.gammas", "down_blocks.3.1.running_var", "extra: up_blocks.9.gammas"):
        assert name in str(error.value)


def relative(found, expected):
    """Largest error against the largest value; torch's maps have channels first."""
    expected = expected.detach().numpy()
    if expected.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def diffusers_twin(model, tensors):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    try:
        from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    except ModuleNotFoundError:  # before diffusers 0.38
        from diffusers.pipelines.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    twin = PaellaVQModel(
        up_down_scale_factor=model.patch,
        levels=len(model.levels),
        bottleneck_blocks=model.bottleneck_blocks,
        embed_dim=model.levels[-1],
        latent_channels=model.latent_channels,
        num_vq_embeddings=model.codebook_size,
    )
    twin.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    return torch, twin.eval()


@pytest.mark.parity
@pytest.mark.parametrize("config", CONFIGS)
def test_maps_match_diffusers(config):
    model = PaellaVQ(**config)
    tensors = random_tensors(torch_shapes(model, "vquantizer.embedding.weight"))
    torch, twin = diffusers_twin(model, tensors)
    variables = from_state_dict(model, tensors, "here")
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(2, 3 * model.stride, 2 * model.stride, 3)).astype(np.float32)
    z = rng.normal(size=(2, 3, 5, model.latent_channels)).astype(np.float32)
    to_torch = lambda x: torch.tensor(x.transpose(0, 3, 1, 2))  # noqa: E731
    run = lambda method, x, **kwargs: jax.jit(lambda v, x: model.apply(v, x, method=method, **kwargs))(variables, x)  # noqa: E731

    errors = {
        "encode": relative(run("encode", images, train=False), twin.encode(to_torch(images)).latents),
        "decode": relative(run("decode", z), twin.decode(to_torch(z)).sample),
    }
    codes, indices, codebook_loss, commitment_loss = run("quantise", z)
    their_codes, their_loss, (_, _, their_indices) = twin.vquantizer(to_torch(z))
    np.testing.assert_array_equal(indices.ravel(), their_indices)
    errors["quantise"] = relative(codes, their_codes)
    errors["loss"] = relative(codebook_loss + 0.25 * commitment_loss, their_loss)

    twin.train()
    latents, updated = run("encode", images, train=True, mutable=["batch_stats"])
    errors["encode, training"] = relative(latents, twin.encode(to_torch(images)).latents)
    theirs, ours = twin.down_blocks[-1][1], updated["batch_stats"]["latent_norm"]
    errors["mean"] = relative(ours["mean"], theirs.running_mean)
    # PyTorch tracks the unbiased variance.
    count, before = 2 * 3 * 2, variables["batch_stats"]["latent_norm"]["var"]
    unbiased = 0.9 * before + (ours["var"] - 0.9 * before) * count / (count - 1)
    errors["variance"] = relative(unbiased, theirs.running_var)
    print(errors)
    assert max(errors.values()) <= 1e-5


@pytest.mark.parity
def test_the_quantisers_gradients_match_diffusers():
    model = PaellaVQ(**CONFIGS[0])
    tensors = random_tensors(torch_shapes(model, "vquantizer.embedding.weight"))
    torch, twin = diffusers_twin(model, tensors)
    variables = from_state_dict(model, tensors, "here")
    z, weights = np.random.default_rng(1).normal(size=(2, 2, 3, 5, 4)).astype(np.float32)

    def loss(codebook, z):
        replaced = {**variables, "params": variables["params"] | {"codebook": codebook}}
        codes, _, codebook_loss, commitment_loss = model.apply(replaced, z, method="quantise")
        return jnp.mean(jnp.tanh(codes) * weights) + codebook_loss + 0.25 * commitment_loss

    of_codebook, of_latents = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"]["codebook"], z)
    latents = torch.tensor(z.transpose(0, 3, 1, 2), requires_grad=True)
    codes, vq_loss, _ = twin.vquantizer(latents)
    (torch.mean(torch.tanh(codes) * torch.tensor(weights.transpose(0, 3, 1, 2))) + vq_loss).backward()
    errors = relative(of_codebook, twin.vquantizer.embedding.weight.grad), relative(of_latents, latents.grad)
    print(f"relative errors of the gradients for codebook and latents: {errors}")
    assert max(errors) <= 1e-5


@pytest.mark.parity
def test_the_discriminator_matches_its_torch_twin():
    torch = pytest.importorskip("torch")
    rng, widths = np.random.default_rng(0), (5, 6, 4)
    images = rng.uniform(size=(2, 33, 24, 3)).astype(np.float32)
    layers, params, stats, channels = [], {}, {}, 3
    for index, width in enumerate(widths):
        convolution = torch.nn.Conv2d(channels, width, 3, stride=2, padding=1)
        kernel, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
        params[f"conv_{index}"] = {"kernel": kernel.transpose(2, 3, 1, 0).copy(), "bias": bias.copy()}
        convolution = torch.nn.utils.spectral_norm(convolution)
        key = f"conv_{index}/kernel"
        u = convolution.weight_u.numpy().copy()[None]
        stats[f"spectral_{index}"] = {f"{key}/u": u, f"{key}/sigma": np.ones((), np.float32)}
        layers += [convolution, *([torch.nn.InstanceNorm2d(width)] if index else []), torch.nn.LeakyReLU(0.2)]
        channels = width
    head = torch.nn.Conv2d(channels, 1, 1)
    kernel = head.weight.detach().numpy().transpose(2, 3, 1, 0)
    params["head"] = {"kernel": kernel, "bias": head.bias.detach().numpy()}
    model, variables = Discriminator(widths), {"params": params, "batch_stats": stats}
    logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    expected = torch.nn.Sequential(*layers, head).train()(torch.tensor(images.transpose(0, 3, 1, 2)))[:, 0]
    errors = [relative(logits, expected)]
    for index, convolution in enumerate(layer for layer in layers if hasattr(layer, "weight_u")):
        u = updated["batch_stats"][f"spectral_{index}"][f"conv_{index}/kernel/u"][0]
        errors.append(relative(u, convolution.weight_u))
    print(f"relative errors of the logits and of each u: {errors}")
    assert max(errors) <= 1e-5
