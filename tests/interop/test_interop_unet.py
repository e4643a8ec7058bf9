import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from small_public import converted

from configs import imagenet64_cm_unet
from fid_imagegen import ImageFunctionPipeline, tasks
from fid_imagegen.diffusion import samplers
from fid_imagegen.diffusion.noise import NoiseRange, karras_sigma
from fid_imagegen.diffusion.preconditioning import c_noise, c_skip, consistency_function, preconditioning
from fid_imagegen.interop import unet
from fid_imagegen.interop.state_dict import convert_state_dict
from fid_imagegen.interop.unet import (
    WEIGHTS,
    abstract_params,
    diffusers_config,
    from_state_dict,
    load_unet,
    public_unet,
    to_state_dict,
    torch_name,
)
from fid_imagegen.models.rendering import render
from fid_imagegen.models.unets.adm import ADM
from fid_imagegen.models.unets.presets import build_unet
from fid_imagegen.models.unets.score import ScoreBlock
from fid_imagegen.tasks.borrowed import check_shared
from fid_imagegen.training import warm_start

SMALL = {"channels": 3, "widths": (8, 16), "blocks": 1, "attention_levels": (1,), "head_width": 4, "groups": 4}
ODD = {"channels": 1, "widths": (6, 18, 12), "blocks": 2, "attention_levels": (0, 2), "head_width": 6, "groups": 3}


def random_params(model, seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, abstract_params(model))


def diffusers_unet(diffusers, model: ADM):
    """The UNet2DModel that `model` stands for."""
    return diffusers.UNet2DModel(**diffusers_config(model)).eval()


def randomised(torch, module):
    """All weights drawn, so that neither a zero initialisation nor an identity hides an error."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            fan_in = tensor[0].numel() if tensor.ndim > 1 and "class" not in name else 4
            tensor.copy_(torch.randn_like(tensor) / math.sqrt(fan_in) + ("norm" in name and "weight" in name))
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def exact_levels(torch, theirs):
    """theirs with its sin-cos in float64: diffusers rounds phases of a thousand to float32 whatever the network's type."""
    frequencies = torch.from_numpy(10000.0 ** -np.linspace(0, 1, theirs.time_proj.num_channels // 2, endpoint=False))

    def features(timesteps):
        phases = timesteps.double()[:, None] * frequencies
        return torch.cat([torch.cos(phases), torch.sin(phases)], dim=-1)

    theirs.time_proj.forward = features
    return theirs.double()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_params_come_back_from_a_file(tmp_path):
    model = ADM(**ODD, num_classes=3)
    params = random_params(model)
    tensors = to_state_dict(params)
    assert tensors["time_embedding.linear_1.weight"].shape == (24, 6)
    assert tensors["class_embedding.weight"].shape == (3, 24)
    assert tensors["down_blocks.0.downsamplers.0.time_emb_proj.weight"].shape == (12, 24)
    assert tensors["mid_block.attentions.0.to_out.0.weight"].shape == (12, 12)
    assert tensors["up_blocks.2.resnets.2.conv_shortcut.weight"].shape == (6, 12, 1, 1)
    kernel = params["conv_in"]["kernel"]  # [rows, columns, in, out]
    np.testing.assert_array_equal(tensors["conv_in.weight"], kernel.transpose(3, 2, 0, 1))
    safetensors.numpy.save_file(tensors, tmp_path / "unet.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_unet(model, tmp_path / "unet.safetensors"), params)


def test_what_does_not_fit_is_listed(tmp_path):
    tensors = to_state_dict(random_params(ADM(**SMALL, num_classes=5)))
    with pytest.raises(
        ValueError, match=r"(?s)missing: .*up_blocks\.2.*extra: class_emb.*strange.*misshapen: .*conv_in"
    ):
        from_state_dict(ADM(**ODD), tensors | {"strange": np.zeros(1)}, "here")
    with pytest.raises(FileNotFoundError, match="found no file .*a UNet2DModel of diffusers.*the folder unet"):
        load_unet(ADM(**SMALL), tmp_path / "no.safetensors")


def write_public(folder, model, **changes):
    """A folder under diffusers' names."""
    folder.mkdir(exist_ok=True)
    fields = {"sample_size": 8, "_class_name": "UNet2DModel", **diffusers_config(model)} | changes
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(to_state_dict(random_params(model)), folder / WEIGHTS)
    return folder


def test_a_public_model_is_converted_and_sampled(tmp_path):
    """Of one step: f of the network at sigma_max and of its label, whatever the config of the recipe."""
    model = ADM(**SMALL, num_classes=5)
    converted(tmp_path / "out", f"--unet={write_public(tmp_path / 'unet', model)}")
    pipe = ImageFunctionPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.config.data.image_size, pipe.config.model.num_classes, pipe.config.preconditioning) == (8, 5, "edm")
    functions = pipe.generate(3, labels=[4, 0, 2]).functions
    x, sigma = functions.native.noisy, jnp.full(3, 80.0)
    net = jax.jit(lambda x, levels, cond, key: model.apply({"params": random_params(model)}, x, levels, cond))
    f = consistency_function(
        net, x, sigma, jnp.asarray([4, 0, 2]), key=None, noise=NoiseRange(), form=preconditioning("edm")
    )
    found = render(functions, 8, 8)
    assert relative(found, f) <= 2e-2  # bfloat16
    # Training with that network starts from it.
    recipe = imagenet64_cm_unet.get_config().copy_and_resolve_references().unlock()
    recipe.update_from_flattened_dict({"data.image_size": 8, "model.num_classes": 5})
    recipe.model.unet.update(
        {name: SMALL[name] for name in ("widths", "blocks", "attention_levels", "head_width", "groups")}
    )
    task = tasks.build(recipe)
    abstract = {"generator": jax.eval_shape(task.init, jax.random.key(0))[0]["generator"]}
    begun = warm_start.fill(abstract, {"generator": "../out"}, tmp_path / "run", task.borrowed)
    jax.tree.map(np.testing.assert_array_equal, begun["generator"], random_params(model))
    with pytest.raises(FileNotFoundError, match="found no file .*config.json.*the folder unet of openai"):
        public_unet(tmp_path, pipe.config)
    other = write_public(tmp_path / "other", model, resnet_time_scale_shift="default", freq_shift=1)
    with pytest.raises(ValueError, match="(?s)freq_shift 1, expected 0.*scale_shift 'default', expected 'scale_shift'"):
        public_unet(other, pipe.config)


def test_training_by_the_recipe_may_start_from_the_public_model(tmp_path, monkeypatch):
    """Without the weights: its config says of the network what the recipe says."""
    monkeypatch.setattr(unet, "load_unet", lambda model, path: {})
    public = diffusers_config(build_unet("adm_64", channels=3, num_classes=1000)) | {"sample_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(public))
    recipe = imagenet64_cm_unet.get_config()
    config, _ = public_unet(tmp_path, recipe)
    check_shared("generator", recipe, json.loads(config.to_json()), "out")
    assert not any(config.model.unet.values())
    (tmp_path / "config.json").write_text(json.dumps({name: public[name] for name in ("sample_size", "in_channels")}))
    with pytest.raises(ValueError, match="found no block_out_channels, .*, expected the config of a UNet2DModel"):
        public_unet(tmp_path, recipe)


@pytest.mark.parity
def test_the_public_model_is_accounted_for():
    """Names and shapes of openai/diffusers-cd_imagenet64_l2, without its weights."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model = build_unet("adm_64", channels=3, num_classes=1000)
    with torch.device("meta"):
        theirs = diffusers_unet(diffusers, model)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    zero = np.zeros((), np.float32)  # one number, seen as all the weights
    tensors = {name: np.broadcast_to(zero, shape) for name, shape in expected.items()}
    shapes = jax.eval_shape(lambda: from_state_dict(model, tensors, "meta"))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 295_899_267
    assert sum(math.prod(shape) for shape in expected.values()) == 295_899_267


@pytest.mark.parity
@pytest.mark.parametrize("num_classes", [0, 5], ids=["unconditional", "conditional"])
@pytest.mark.parametrize(("config", "size"), [(SMALL, (10, 8)), (ODD, (12, 20))], ids=["small", "odd"])
def test_raw_outputs_are_those_of_diffusers(config, size, num_classes):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model = ADM(**config, num_classes=num_classes)
    theirs = diffusers_unet(diffusers, model)
    tensors = randomised(torch, theirs)
    params = from_state_dict(model, tensors, "diffusers")

    images = np.random.default_rng(1).standard_normal((3, *size, config["channels"]))
    levels = np.asarray(
        [-1.5, -0.0625, 1.09375]
    )  # a thousand times as much is exact in float32, which diffusers rounds to
    labels = np.asarray([4, 0, 2]) if num_classes else None
    for dtype, bound in ((np.float32, 1e-4), (np.float64, 1e-9)):
        theirs = exact_levels(torch, theirs) if dtype == np.float64 else theirs
        with torch.no_grad(), jax.enable_x64(dtype == np.float64):
            reference = theirs(
                torch.from_numpy(images.astype(dtype)).permute(0, 3, 1, 2),
                torch.from_numpy(1000 * levels),
                class_labels=torch.from_numpy(labels) if num_classes else None,
            ).sample
            reference = reference.permute(0, 2, 3, 1).numpy()
            found = jax.jit(model.clone(dtype=dtype).apply)({"params": params}, images, levels[:, None], labels)
            error = relative(found, reference)
            print(f"\n{dtype.__name__}: relative {error:.1e}, largest {np.abs(reference).max():.2f}")
            assert error <= bound

    again = to_state_dict(params)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)
    theirs.float().load_state_dict({name: torch.from_numpy(tensor) for name, tensor in again.items()}, strict=True)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2])
def test_samples_are_those_of_the_scheduler(steps, monkeypatch):
    """One and two steps by diffusers' consistency scheduler and by ours, from one network and one noise."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_consistency_models

    theirs = diffusers_unet(diffusers, ADM(**SMALL))
    params = from_state_dict(ADM(**SMALL), randomised(torch, theirs), "diffusers")
    theirs, model = exact_levels(torch, theirs), ADM(**SMALL, dtype=np.float64)
    noise, shape = NoiseRange(), (8, 8, 3)
    draws = np.random.default_rng(2).standard_normal(
        (3, 2, *shape)
    )  # the start's, the second step's, and one of no weight

    def torch_image(image):
        return torch.from_numpy(image).permute(0, 3, 1, 2)

    drawn = iter(draws)
    monkeypatch.setattr(scheduling_consistency_models, "randn_tensor", lambda *_, **__: torch_image(next(drawn)))
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    indices = [0, 22][:steps]  # the public model's, counted from sigma_max
    scheduler.set_timesteps(timesteps=indices[::-1])
    x = scheduler.init_noise_sigma * torch_image(next(drawn))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            raw = theirs(scheduler.scale_model_input(x, timestep), timestep).sample
            x = scheduler.step(raw, timestep, x).prev_sample
    reference = x.permute(0, 2, 3, 1).numpy()

    with jax.enable_x64(True):
        sigmas = np.asarray(karras_sigma(jnp.arange(40.0), 40, noise))[indices]
        ours = iter(draws)
        monkeypatch.setattr(samplers, "example_normal", lambda keys, shape: next(ours))
        monkeypatch.setattr(samplers, "sampling_sigmas", lambda steps, noise: sigmas)
        form = preconditioning("edm")

        def net(x, levels_BK, cond, *, key):
            return model.apply({"params": params}, x, levels_BK)

        f = jax.jit(lambda x, sigma_B: consistency_function(net, x, sigma_B, None, key=None, noise=noise, form=form))
        found = f(
            *samplers.consistency_input(f, jax.random.split(jax.random.key(0), 2), shape, steps=steps, noise=noise)
        )
        error = relative(found, reference)
        print(f"\n{steps} steps at {sigmas}: relative {error:.1e}, largest {np.abs(reference).max():.2f}")
        assert error <= 1e-5

        np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1], rtol=1e-6)
        # The scheduler's timesteps are the level times the model's own scale.
        np.testing.assert_allclose(model.level_scale * c_noise(sigmas, noise), scheduler.timesteps, rtol=1e-9)
        skip, out = scheduler.get_scalings_for_boundary_condition(torch.from_numpy(sigmas))
        np.testing.assert_allclose(c_skip(sigmas, noise), skip, rtol=1e-9)
        np.testing.assert_allclose(form.c_out(sigmas, noise), out, rtol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("resampling", ["box", "fir"])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_score_blocks_are_those_of_diffusers(resampling, resample):
    """DDPM++ and NCSN++ have no peer installed as wholes; their block has, and its attention."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.models import attention_processor, resnet

    ours = ScoreBlock(12, resample, True, resampling, 0.0, jnp.float32)
    residual = resnet.ResnetBlock2D(
        in_channels=8,
        out_channels=12,
        temb_channels=5,
        groups=2,
        groups_out=3,
        skip_time_act=True,
        kernel=resampling,
        output_scale_factor=math.sqrt(2),
        up=resample == "up",
        down=resample == "down",
    )
    attention = attention_processor.Attention(
        12,
        heads=1,
        dim_head=12,
        norm_num_groups=3,
        eps=1e-6,
        rescale_output_factor=math.sqrt(2),
        residual_connection=True,
        bias=True,
        _from_deprecated_attn_block=True,
    )
    tensors = randomised(torch, residual)
    tensors |= {f"attention.{name}": tensor for name, tensor in randomised(torch, attention).items()}
    generator = np.random.default_rng(3)
    x, condition = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 6, 8), (2, 5)))
    template = jax.eval_shape(ours.init, jax.random.key(0), x, condition, True)["params"]
    name = lambda path: torch_name(path).replace("level", "time_emb_proj")  # noqa: E731
    params = convert_state_dict(tensors, template, name, "diffusers")
    with torch.no_grad():
        reference = attention(residual(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(condition)))
    found = jax.jit(ours.apply, static_argnums=3)({"params": params}, x, condition, True)
    error = relative(found, reference.permute(0, 2, 3, 1).numpy())
    print(f"\n{resampling} {resample}: relative {error:.1e}")
    assert error <= 1e-5
