import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fid_imagegen.interop.autoencoder_kl import abstract_params, from_state_dict, load_autoencoder_kl, to_state_dict
from fid_imagegen.models.autoencoder_kl import STABLE_DIFFUSION, AutoencoderKL

SMALL = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
ODD = {
    "in_channels": 1,
    "latent_channels": 3,
    "block_out_channels": (6, 9, 15),
    "layers_per_block": 2,
    "norm_num_groups": 3,
}


def random_params(model, seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, abstract_params(model))


def test_stable_diffusion_has_its_parameters_under_their_names():
    shapes = abstract_params(AutoencoderKL(**STABLE_DIFFUSION))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863
    small = to_state_dict(random_params(AutoencoderKL(**SMALL)))
    assert small["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"].shape == (8, 16, 1, 1)
    assert small["encoder.mid_block.attentions.0.to_out.0.weight"].shape == (16, 16)
    assert small["encoder.down_blocks.0.downsamplers.0.conv.weight"].shape == (8, 8, 3, 3)
    assert small["quant_conv.bias"].shape == (8,)


def test_kernels_keep_their_rows_and_columns():
    params = random_params(AutoencoderKL(**SMALL))
    tensors = to_state_dict(params)
    kernel = params["encoder"]["conv_in"]["kernel"]  # [rows, columns, in, out]
    np.testing.assert_array_equal(tensors["encoder.conv_in.weight"], kernel.transpose(3, 2, 0, 1))
    matrix = params["decoder"]["mid_block"]["attentions_0"]["to_q"]["kernel"]
    np.testing.assert_array_equal(tensors["decoder.mid_block.attentions.0.to_q.weight"], matrix.T)


def test_params_come_back_from_a_file_of_new_or_old_names(tmp_path):
    model = AutoencoderKL(**ODD)
    params = random_params(model)
    tensors = to_state_dict(params)
    old = {}
    for name, tensor in tensors.items():
        for ours, theirs in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f"attentions.0.{ours}", f"attentions.0.{theirs}")
        is_matrix = "attentions.0" in name and tensor.ndim == 2
        old[name] = tensor[:, :, None, None] if is_matrix else tensor
    assert set(old) != set(tensors)
    for file, content in {"new": tensors, "old": old}.items():
        safetensors.numpy.save_file(content, tmp_path / f"{file}.safetensors")
        loaded = load_autoencoder_kl(model, tmp_path / f"{file}.safetensors")
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_what_does_not_fit_is_listed(tmp_path):
    tensors = to_state_dict(random_params(AutoencoderKL(**SMALL)))
    with pytest.raises(ValueError, match=r"(?s)missing: .*up_blocks\.2.*extra: .*misshapen: .*quant_conv"):
        from_state_dict(AutoencoderKL(**ODD), tensors | {"strange": np.zeros(1)}, "here")
    with pytest.raises(FileNotFoundError, match="found no file .*an AutoencoderKL of diffusers.*the folder vae"):
        load_autoencoder_kl(AutoencoderKL(**SMALL), tmp_path / "no.safetensors")


@pytest.mark.parity
@pytest.mark.parametrize(("config", "size"), [(SMALL, (10, 8)), (ODD, (12, 20))], ids=["small", "odd"])
def test_images_and_latents_are_those_of_diffusers(config, size):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    levels = len(config["block_out_channels"])
    theirs = diffusers.AutoencoderKL(
        **config | {"out_channels": config["in_channels"]},
        down_block_types=levels * ("DownEncoderBlock2D",),
        up_block_types=levels * ("UpDecoderBlock2D",),
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 4
            tensor.copy_(torch.randn_like(tensor) / math.sqrt(fan_in) + ("norm" in name and "weight" in name))
    model = AutoencoderKL(**config)
    params = from_state_dict(model, {k: v.numpy() for k, v in theirs.state_dict().items()}, "diffusers")

    generator = np.random.default_rng(1)
    images = generator.uniform(-1, 1, (2, *size, config["in_channels"])).astype(np.float32)
    small = [side // 2 ** (levels - 1) for side in size]
    latents = generator.standard_normal((2, *small, config["latent_channels"])).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        expected = [
            posterior.mean,
            posterior.logvar,
            theirs.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample,
        ]
    found = [
        *model.apply({"params": params}, jnp.asarray(images), method="encode"),
        model.apply({"params": params}, jnp.asarray(latents), method="decode"),
    ]
    for name, ours, reference in zip(("mean", "log variance", "images"), found, expected, strict=True):
        reference = reference.permute(0, 2, 3, 1).numpy()
        error = np.abs(ours - reference).max() / np.abs(reference).max()
        print(f"\n{name}: relative {error:.1e}, largest {np.abs(reference).max():.2f}")
        assert error <= 1e-5

    again = to_state_dict(params)
    assert set(again) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(again[name], tensor.numpy())
    theirs.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in again.items()}, strict=True)
