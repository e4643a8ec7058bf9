import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fid_imagegen.interop.efficientnet import from_state_dict, to_state_dict
from fid_imagegen.models.wuerstchen.compressor import EfficientNetCompressor
from fid_imagegen.models.wuerstchen.efficientnet import SPECS, EfficientNetV2Features, Spec, Stage

# Every kind of block with and without a change of width, and sizes that halve to odd ones. Widths divide by 8: torchvision
# rounds others.
SMALL = Spec(
    8,
    (
        Stage(True, 1, 8, 2, 1),
        Stage(True, 4, 16, 2, 2),
        Stage(True, 2, 24, 1, 1),
        Stage(False, 4, 24, 2, 2),
        Stage(False, 6, 32, 1, 1),
    ),
    40,
)


def torch_shapes(spec, prefix):
    """Names and shapes of torchvision's tensors, written down block by block."""
    shapes = {}

    def conv_norm(name, *shape):
        shapes[f"{name}.0.weight"] = shape
        shapes.update({f"{name}.1.{leaf}": shape[:1] for leaf in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.1.num_batches_tracked"] = ()

    conv_norm(f"{prefix}.0", spec.stem, 3, 3, 3)
    before = spec.stem
    for number, stage in enumerate(spec.stages, start=1):
        for layer in range(stage.layers):
            name, hidden = f"{prefix}.{number}.{layer}.block", before * stage.ratio
            if stage.fused and stage.ratio == 1:
                conv_norm(f"{name}.0", stage.width, before, 3, 3)
            elif stage.fused:
                conv_norm(f"{name}.0", hidden, before, 3, 3)
                conv_norm(f"{name}.1", stage.width, hidden, 1, 1)
            else:
                conv_norm(f"{name}.0", hidden, before, 1, 1)
                conv_norm(f"{name}.1", hidden, 1, 3, 3)
                shapes[f"{name}.2.fc1.weight"], shapes[f"{name}.2.fc1.bias"] = (
                    (before // 4, hidden, 1, 1),
                    (before // 4,),
                )
                shapes[f"{name}.2.fc2.weight"], shapes[f"{name}.2.fc2.bias"] = (hidden, before // 4, 1, 1), (hidden,)
                conv_norm(f"{name}.3", stage.width, hidden, 1, 1)
            before = stage.width
    conv_norm(f"{prefix}.{len(spec.stages) + 1}", spec.head, before, 1, 1)
    return shapes


def mapper_shapes(spec, channels):
    shapes = {f"mapper.1.{leaf}": (channels,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    return {"mapper.0.weight": (channels, spec.head, 1, 1), "mapper.1.num_batches_tracked": (), **shapes}


def random_tensors(shapes, seed=0):
    """Kernels that keep the scale of what passes, and BatchNorm statistics far from those of an untrained network."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if len(shape) == 4:
            tensors[name] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        else:
            low = -0.5 if name.endswith(("bias", "running_mean")) else 0.5
            tensors[name] = rng.uniform(low, low + 1, shape)
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def abstract(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))


@pytest.mark.parametrize(("variant", "entries"), [("s", 780), ("l", 1546)])
def test_every_tensor_of_torchvisions_features_is_accounted_for(variant, entries):
    model = EfficientNetV2Features(variant)
    ours = jax.eval_shape(lambda v: to_state_dict(model, v), abstract(model))
    theirs = torch_shapes(SPECS[variant], "features")
    assert {name: leaf.shape for name, leaf in ours.items()} == theirs
    assert len(theirs) == entries


def test_every_tensor_of_the_public_compressor_is_accounted_for():
    model = EfficientNetCompressor()
    ours = jax.eval_shape(lambda v: to_state_dict(model, v), abstract(model))
    theirs = torch_shapes(SPECS["s"], "backbone") | mapper_shapes(SPECS["s"], 16)
    assert {name: leaf.shape for name, leaf in ours.items()} == theirs
    assert len(theirs) == 786


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (EfficientNetV2Features(SMALL), torch_shapes(SMALL, "features")),
        (EfficientNetCompressor(SMALL, 5), torch_shapes(SMALL, "backbone") | mapper_shapes(SMALL, 5)),
    ],
    ids=["features", "compressor"],
)
def test_tensors_come_back_as_they_went_in(model, shapes):
    tensors = random_tensors(shapes)
    variables = from_state_dict(model, tensors | {"classifier.1.weight": np.zeros((9, 40))}, "here")
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, abstract(model))
    back = to_state_dict(model, variables)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], 0 if name.endswith("num_batches_tracked") else tensor)


def test_tensors_that_do_not_fit_are_all_listed():
    tensors = random_tensors(torch_shapes(SMALL, "backbone") | mapper_shapes(SMALL, 16))
    del tensors["mapper.1.weight"], tensors["backbone.4.1.block.2.fc1.bias"]
    with pytest.raises(ValueError, match="in here") as error:
        from_state_dict(EfficientNetCompressor(SMALL), tensors | {"backbone.9.0.weight": np.zeros(3)}, "here")
    for name in ("missing: ", "mapper.1.weight", "backbone.4.1.block.2.fc1.bias", "extra: backbone.9.0.weight"):
        assert name in str(error.value)


def torchvision_twin(spec, tensors):
    """torchvision's network, without stochastic depth, with the tensors loaded."""
    torch = pytest.importorskip("torch")
    # Only the binary operators need a torchvision built for the installed torch; convolutions do not.
    with mock.patch("torch.library.register_fake", lambda *args, **kwargs: lambda function: function):
        pytest.importorskip("torchvision")
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    settings, before = [], spec.stem
    for fused, ratio, width, layers, stride in spec.stages:
        settings.append((FusedMBConvConfig if fused else MBConvConfig)(ratio, 3, stride, before, width, layers))
        before = width
    norm = functools.partial(torch.nn.BatchNorm2d, eps=1e-3)
    twin = EfficientNet(settings, 0.2, 0.0, num_classes=2, norm_layer=norm, last_channel=spec.head)
    features = {name.removeprefix("features."): torch.tensor(x) for name, x in tensors.items()}
    twin.features.load_state_dict(features)
    return torch, twin.features


def relative(found, expected):
    expected = expected.detach().numpy()
    expected = expected.transpose(0, 2, 3, 1) if expected.ndim == 4 else expected
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parity
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (51, 37)])
def test_features_match_torchvision(size, train):
    tensors = random_tensors(torch_shapes(SMALL, "features"))
    torch, twin = torchvision_twin(SMALL, tensors)
    model = EfficientNetV2Features(SMALL, drop_rate=0.0)
    variables = from_state_dict(model, tensors, "here")
    images = np.random.default_rng(1).normal(size=(3, *size, 3)).astype(np.float32)
    run = jax.jit(lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"]))
    found, updated = run(variables, images)
    expected = twin.train(train)(torch.tensor(images.transpose(0, 3, 1, 2)))
    errors = [relative(found, expected)]
    theirs = twin.state_dict()
    for name, tensor in to_state_dict(model, {**variables, **updated}).items():
        if name.endswith("running_mean"):
            errors.append(relative(tensor, theirs[name.removeprefix("features.")]))
    print(f"relative errors of the features and, at most, of the running means: {errors[0]}, {max(errors[1:])}")
    assert max(errors) <= 1e-5
