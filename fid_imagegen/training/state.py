"""The training state, and the one step that changes it."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh

from fid_imagegen.parallel.mesh import ACTIVATION_RULES
from fid_imagegen.training import ema


@flax.struct.dataclass
class TrainState:
    """All that a step changes. Checkpoints hold it whole.

    step: updates done. params: trained groups. tracked: groups that follow trained ones (targets). ema: by name, averages
    of all trained groups for evaluation. opt_state: per group. model_state: statistics that are not trained.
    """

    step: jax.Array
    params: dict[str, Any]
    tracked: dict[str, Any]
    ema: dict[str, Any]
    opt_state: dict[str, Any]
    model_state: dict[str, Any]


def create(task, optimizers: dict[str, optax.GradientTransformation], averages, key) -> TrainState:
    """The state before the first step; tracked groups and EMAs start as copies of the parameters."""
    params, model_state = task.init(key)
    return from_params(task, optimizers, averages, params, model_state)


def from_params(task, optimizers, averages, params, model_state) -> TrainState:
    """The state of step 0 for given parameters; averages: the names of `ema.averages`."""
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731  donated buffers must not be shared
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        tracked={name: copy(params[group]) for name, (group, _) in task.tracked.items()},
        ema={name: copy(params) for name in averages},
        opt_state={group: tx.init(params[group]) for group, tx in optimizers.items()},
        model_state=model_state,
    )


def make_step(task, optimizers, config):
    """step(state, frozen, batch, key) -> (state, metrics). The key of a step is fold_in(key, step): resuming needs no history."""

    averages = ema.averages(config)

    def gradients(state, frozen, batch, key):
        def loss(params):
            return task.loss(params | state.tracked | frozen, state.model_state, batch, key, state.step)

        return jax.value_and_grad(loss, has_aux=True)(state.params)

    def step(state: TrainState, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        batch = batch | {"row": jnp.arange(config.batch_size)}
        (loss, (model_state, metrics)), grads = _accumulate(gradients, state, frozen, batch, key, config.accumulate)
        params, opt_state = {}, {}
        for group, tx in optimizers.items():
            updates, opt_state[group] = tx.update(grads[group], state.opt_state[group], state.params[group])
            params[group] = optax.apply_updates(state.params[group], updates)
        metrics |= {"loss": loss, "gradient_norm": optax.global_norm(grads)}
        # The new parameters count too: an update that overflows shows in no loss before the next step, after a checkpoint.
        norms = [metrics["loss"], metrics["gradient_norm"], optax.global_norm(params)]
        metrics["finite"] = jnp.isfinite(jnp.stack(norms)).all()
        new = TrainState(
            step=state.step + 1,
            params=params,
            tracked={
                name: ema.update(state.tracked[name], params[group], decay(state.step))
                for name, (group, decay) in task.tracked.items()
            },
            ema={name: ema.update(state.ema[name], params, decay(state.step)) for name, decay in averages.items()},
            opt_state=opt_state,
            model_state=model_state,
        )
        return new, metrics

    return step


def _accumulate(gradients, state, frozen, batch, key, parts: int):
    """Loss, metrics and gradients of the whole batch as means over `parts` micro-batches of equal size.

    Rows are dealt out in turn ("(b a)"), so that each device keeps its own rows in every micro-batch. Noise follows the row's
    number in the whole batch: the mean is the same whatever the number of parts, but for the statistics that BatchNorm takes.
    """
    if parts == 1:
        return gradients(state, frozen, batch, key)
    dealt = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=parts), batch)

    def add(total, part):
        return jax.tree.map(lambda t, g: t + g / parts, total, gradients(state, frozen, part, key)), None

    shapes = jax.eval_shape(gradients, state, frozen, jax.tree.map(lambda x: x[0], dealt), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, dealt)[0]


def compile_step(task, optimizers, config, mesh: Mesh, shardings: TrainState, batch_shardings):
    """The step jitted onto a mesh, its state donated."""
    step = make_step(task, optimizers, config)

    def named(state, frozen, batch, key):
        # The mesh is entered here: without one the models' constraints would silently do nothing, whoever calls.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(ACTIVATION_RULES):
            return step(state, frozen, batch, key)

    return jax.jit(
        named, donate_argnums=0, in_shardings=(shardings, None, batch_shardings, None), out_shardings=(shardings, None)
    )
