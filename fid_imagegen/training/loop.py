"""The training loop, one story in fixed order:

    mesh -> data -> abstract state -> shardings -> jitted init or restore -> compile -> writers -> loop

In the loop: evaluate, checkpoint, THEN fetch the next batch, dispatch the step, look at the previous step's metrics. The order
matters: a checkpoint's step is its position in the data, so nothing may be fetched before it is written.
"""

import hashlib
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from tqdm import tqdm

from fid_imagegen import tasks
from fid_imagegen.data import buckets, pipeline, sources
from fid_imagegen.data.features import Features
from fid_imagegen.interop.safetensors_io import save_tree
from fid_imagegen.models.rendering import quantise
from fid_imagegen.parallel import mesh as meshes
from fid_imagegen.parallel import sharding
from fid_imagegen.tasks import text
from fid_imagegen.training import ema, optimizer, runs, state, warm_start, writers
from fid_imagegen.training.averaging import save_snapshot
from fid_imagegen.training.checkpoint import Checkpoints
from fid_imagegen.training.features import feature_key
from fid_imagegen.training.preemption import Preemption

Evaluator = Callable[[object, dict], Mapping[str, float]]


class NonFiniteLossError(RuntimeError):
    """A step gave a loss, gradient or parameter that is not finite; the checkpoint before it is whole."""


class Run:
    """Everything a run needs before its first step; `train` is the loop over it."""

    def __init__(self, config, workdir: epath.PathLike):
        self.config, self.workdir = config, epath.Path(workdir)
        self.mesh = meshes.make_mesh(**config.mesh)
        meshes.check_batch(config.batch_size, config.accumulate, self.mesh)
        self.task = tasks.build(config)
        self.optimizers = optimizer.build_all(config, self.task.trained)
        self.source = sources.make_source(config.data)
        # Records too small for their bucket should show before anything is written.
        buckets.assigned(self.source, config.data)
        self.tokenizer = self.task.tokenizer(self.source, self._saved_tokenizer())
        self._check_labels()
        self.key = jax.random.key(config.seed)
        with jax.set_mesh(self.mesh):
            self._lay_out()

    def write_config(self) -> None:
        """Puts `config.json`, the tokenizer and the frozen groups into the work directory: the first things written there."""
        runs.write_config(self.workdir, self.config)
        if self.tokenizer and jax.process_index() == 0:
            runs.write_whole(self.workdir / runs.TOKENIZER, self.tokenizer.json())
        for name, digest in self.frozen_hashes.items():
            tree = (self.frozen | self.idle)[name]
            _save_frozen(self.workdir / "frozen" / f"{name}-{digest[:16]}.safetensors", tree)

    def _saved_tokenizer(self) -> epath.Path:
        """The run's own, or that of the run which its text encoder starts from: it knows no other numbers for words."""
        own, start = self.workdir / runs.TOKENIZER, self.config.init.get(text.GROUP, "")
        if own.exists() or not start or text.GROUP not in self.task.trained:
            return own
        theirs = warm_start.inside(start, self.workdir) / runs.TOKENIZER
        if not theirs.exists():
            raise FileNotFoundError(
                f"found no {theirs}, expected the tokenizer of the text encoder that is there; change config.init.{text.GROUP}"
            )
        return theirs

    def _check_labels(self):
        classes = self.task.num_classes
        if classes and self.source.num_classes != classes:
            raise ValueError(
                f"found {self.source.num_classes} classes in {self.source.name}, expected {classes}; "
                "change config.model.num_classes"
            )

    def _lay_out(self):
        init, frozen = dict(self.config.init), self.task.frozen()
        warm_start.check_names(init, frozen | dict.fromkeys(self.task.trained))
        filled = warm_start.fill(frozen, init, self.workdir, getattr(self.task, "borrowed", None))
        self.frozen = jax.device_put(warm_start.whole(filled), meshes.replicated(self.mesh))
        self.frozen_hashes = {name: _hash(tree) for name, tree in self.frozen.items()}
        self.features, self.idle = None, {}  # idle: frozen groups that no step needs, on the host
        if self.config.data.features:
            self._use_features()
        averages = ema.averages(self.config)
        self.abstract = jax.eval_shape(lambda key: state.create(self.task, self.optimizers, averages, key), self.key)
        self.shardings = sharding.resolve(
            self.config.sharding.rules, self.abstract, self.mesh, min_size=self.config.sharding.min_size
        )
        self.batch_sharding = meshes.batch_sharding(self.mesh)
        self.step = state.compile_step(
            self.task, self.optimizers, self.config, self.mesh, self.shardings, self.batch_sharding
        )

    def _use_features(self):
        """Opens the cached features. A text encoder whose work they hold makes room: only previews still need it."""
        wanted, self.features = feature_key(self), Features(self.config.data.features)
        self.features.check(wanted)
        if self.features.empty_text is not None:
            self.idle[text.GROUP] = jax.tree.map(np.asarray, self.frozen.pop(text.GROUP))
            empty = {"tokens": jnp.asarray(self.features.empty_text)}
            self.frozen[text.EMPTY] = jax.device_put(empty, meshes.replicated(self.mesh))

    @property
    def meta(self) -> dict:
        """What a checkpoint must agree with: the data set and the frozen weights."""
        return {"data": self.source.fingerprint, "frozen": self.frozen_hashes}

    def restore(self, checkpoints: Checkpoints) -> state.TrainState | None:
        """The newest readable checkpoint on this mesh; ValueError if it was made with other data or frozen weights."""
        layout = jax.tree.map(
            lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
            self.abstract,
            self.shardings,
        )
        restored = checkpoints.restore(layout)
        if restored is None:
            return None
        saved, meta = restored
        if meta != self.meta:
            differing = [name for name in self.meta if meta.get(name) != self.meta[name]]
            raise ValueError(
                f"found a checkpoint in {self.workdir} made with other {' and '.join(differing)}: {meta}, expected {self.meta}; "
                "give the same data and weights, or choose a new --workdir"
            )
        return saved

    def initial(self) -> state.TrainState:
        """The state of step 0: jitted init into its shardings, groups filled from other runs and public weights."""
        init = jax.jit(self.task.init, out_shardings=(self.shardings.params, self.shardings.model_state))
        made = init(self.key)
        borrowed = getattr(self.task, "borrowed", None)
        groups = warm_start.fill(made[0] | made[1], dict(self.config.init), self.workdir, borrowed)
        if hasattr(self.task, "pretrained"):
            groups = warm_start.overlay(groups, self.task.pretrained())
        params, model_state = ({name: groups[name] for name in part} for part in made)
        build = jax.jit(
            lambda params, model_state: state.from_params(
                self.task, self.optimizers, ema.averages(self.config), params, model_state
            ),
            out_shardings=self.shardings,
        )
        return build(params, model_state)

    def batches(self, start: int):
        """Global batches from step `start` on, this process's rows read here."""
        rows = pipeline.batches(
            self.source,
            self.config.data,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            tokenize=self._tokenize if self.tokenizer else None,
            features=self.features,
        )
        for batch in rows:
            arrays = {name: rows for name, rows in batch.items() if name not in ("index", "caption")}
            yield pipeline.to_global(arrays, self.batch_sharding)

    def _tokenize(self, captions: list[str]) -> dict[str, np.ndarray]:
        return dict(zip(("tokens", "mask"), self.tokenizer(captions), strict=True))

    def examples(self) -> dict[str, jax.Array]:
        """A small batch for previews: held out where there is anything held out."""
        data = self.config.data
        source = sources.make_source(data, held_out=True) if data.holdout_every else self.source
        indices = range(min(self.config.log.num_samples, len(source)))
        batch = {
            "image": pipeline.examples(source, data, indices),
            "label": np.stack([source[i]["label"] for i in indices]),
        }
        if self.tokenizer:
            batch |= self._tokenize([source.captions(index)[0] for index in indices])
        if text.GROUP in self.idle:
            encode = jax.jit(self.task.text.encode, out_shardings=meshes.replicated(self.mesh))
            batch["text"] = encode(self.idle, batch.pop("tokens"), batch.pop("mask"))
        return jax.tree.map(jnp.asarray, batch)


def train(config, workdir: epath.PathLike, *, evaluators: tuple[Evaluator, ...] = ()) -> bool:
    """Trains to `config.num_steps`, resuming what `workdir` holds. False if asked to stop on the way (it has saved).

    evaluators: called with (task, evaluation groups) every `config.log.sample_every` steps; their scalars are logged.
    Raises NonFiniteLossError at the first step whose loss, gradient or new parameters are not finite.
    """
    run = Run(config, workdir)
    run.write_config()
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    with jax.set_mesh(run.mesh), Preemption() as preemption:
        current = run.restore(checkpoints) or run.initial()
        start = int(current.step)
        writer = writers.Writer(workdir, start=start, tensorboard=config.log.tensorboard)
        if start == 0 and jax.process_index() == 0:
            overview = parameter_overview.get_parameter_overview(run.abstract.params, include_stats=False)
            (run.workdir / "parameters.txt").write_text(overview + "\n")
        meter = Meter(config, writer, start)
        # Replicated: a sheet is read by a process that need not hold all of it otherwise.
        preview = jax.jit(run.task.preview, out_shardings=meshes.replicated(run.mesh))
        examples = run.examples()
        batches = run.batches(start)
        profile = Profile(config.profile, run.workdir / "profile")
        stopped = False
        try:
            for step in range(start, config.num_steps + 1):
                stopped = preemption.reached(step)
                last = step == config.num_steps or stopped
                if step > start and (step % config.log.sample_every == 0 or step == config.num_steps):
                    params = current.ema[ema.name(config.ema_decays[-1])] if config.ema_decays else current.params
                    groups = params | current.model_state | run.frozen
                    writer.write_images(step, _sheets(preview(groups, examples)))
                    for evaluate in evaluators:
                        meter.extra |= evaluate(run.task, groups)
                if step > start and config.ema_snapshots and step % config.ema_snapshots == 0:
                    meter.settle(step)
                    save_snapshot(run, step, current)
                if step > start and (step % config.checkpoint.every == 0 or last):
                    meter.settle(step)
                    writer.flush()
                    checkpoints.save(step, current, run.meta)
                if last:
                    break
                profile.before(step, current)
                batch = next(batches)
                current, metrics = run.step(current, run.frozen, batch, run.key)
                meter.dispatched(step + 1, metrics)
            meter.settle(step)
        finally:
            profile.stop(current)
            batches.close()
            writer.close()
            checkpoints.close()
            meter.close()
    if stopped:
        logging.warning("asked to stop: saved step %d in %s; run the same command again to go on", step, workdir)
    return not stopped


class Meter:
    """Progress, logs and the finite check, one step behind the device so that the host never holds it up."""

    def __init__(self, config, writer: writers.Writer, start: int):
        self.config, self.writer = config, writer
        self.extra: dict[str, float] = {}
        self._pending = self._last_finite = None
        self._since, self._since_step = time.monotonic(), start
        visible = jax.process_index() == 0
        self._bar = tqdm(total=config.num_steps, initial=start, desc=config.task, disable=not visible, mininterval=1.0)

    def dispatched(self, step: int, metrics) -> None:
        """Notes the metrics of a step just dispatched and reads those of the one before."""
        pending, self._pending = self._pending, (step, metrics)
        if pending:
            self._read(*pending)

    def settle(self, step: int) -> None:
        """Reads what is pending; after it the state of `step` is known to be finite."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._read(*pending)

    def _read(self, step: int, metrics) -> None:
        if not bool(metrics["finite"]):
            self._log(step, metrics)
            before = self._last_finite
            raise NonFiniteLossError(
                f"found a loss, gradient or parameter that is not finite at step {step} ({_brief(metrics)}), expected finite "
                f"ones; the last finite values: {f'step {before[0]}, {_brief(before[1])}' if before else 'none yet'}; the "
                "checkpoint before it is whole: lower the learning rate, clip gradients, or compute in float32"
            )
        self._last_finite = step, metrics
        self._bar.update(1)
        if step % self.config.log.every == 0 or step == self.config.num_steps:
            self._log(step, metrics)

    def _log(self, step: int, metrics) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != "finite"}
        now = time.monotonic()
        rate = (step - self._since_step) * self.config.batch_size / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        self._bar.set_postfix_str(f"loss {values['loss']:.4g}, {rate:.0f} images/s")
        self.writer.write_scalars(step, values | {"images_per_second": rate} | self.extra)
        self.extra = {}

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()


class Profile:
    """Traces steps window.start .. window.start + window.steps - 1 into `folder`, or those of them that this start does."""

    def __init__(self, window, folder: epath.Path):
        self.steps, self.folder = range(window.start, window.start + window.steps), folder
        self._tracing = False

    def before(self, step: int, current) -> None:
        """Starts or ends the trace; `current` is what the last step gives, waited for so that its work is in the trace."""
        if step in self.steps and not self._tracing:
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True
        elif step not in self.steps:
            self.stop(current)

    def stop(self, current) -> None:
        """Writes the trace, if one is being taken."""
        if self._tracing:
            self._tracing = False
            jax.block_until_ready(current)
            jax.profiler.stop_trace()


def _brief(metrics) -> str:
    return f"loss {float(metrics['loss']):.6g}, gradient norm {float(metrics['gradient_norm']):.6g}"


def _sheets(previews: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: writers.tile(np.asarray(quantise(images))) for name, images in previews.items()}


def _hash(tree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _save_frozen(path: epath.Path, tree) -> None:
    """Writes a frozen group once; its file is named by its content."""
    if jax.process_index() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tree(path, jax.tree.map(np.asarray, tree), {})
