import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fid_imagegen.models.features.resnet56 import BasicBlock, FrozenBatchNorm, ResNet56


def test_features_and_logits():
    (features, logits), variables = jax.eval_shape(
        ResNet56().init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3))
    )
    assert features.shape == (2, 64) and logits.shape == (2, 10)
    trained = [x for path, x in jax.tree.leaves_with_path(variables) if path[-1].key not in ("mean", "var")]
    assert sum(x.size for x in trained) == 853_018  # 0.85 M in He et al., table 6


def test_frozen_batch_norm_is_batch_norm_at_inference():
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    scale, bias, mean, var = jax.random.uniform(jax.random.key(1), (4, 4), minval=0.5)
    frozen = FrozenBatchNorm().apply({"params": {"scale": scale, "bias": bias, "mean": mean, "var": var}}, x)
    flax = nn.BatchNorm(use_running_average=True, epsilon=1e-5).apply(
        {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}, x
    )
    np.testing.assert_allclose(frozen, flax, rtol=1e-5, atol=1e-6)


def test_shortcut_takes_every_other_pixel_and_pads_channels_on_both_sides():
    x = jax.random.uniform(jax.random.key(0), (1, 8, 8, 16))
    block = BasicBlock(32, stride=2)
    silent = jax.tree.map(lambda p: jnp.zeros(p.shape), jax.eval_shape(block.init, jax.random.key(1), x))
    y = block.apply(silent, x)
    np.testing.assert_array_equal(y[..., 8:24], x[:, ::2, ::2])
    assert not y[..., :8].any() and not y[..., 24:].any()
