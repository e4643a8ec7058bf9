"""What a run whose weights another one reads must have in common with it."""

# Group -> (what it is, what must be shared, what to do). Heads, level_scale, weight_update, norm and rotary show in no shape; a
# student also asks its teacher about its own noisy images at its own levels.
SHARED = {
    "generator": (
        "a generator",
        ("data.channels", "noise.sigma_data", "preconditioning", "time", "model."),
        "start from another with config.init.generator, or change this config",
    ),
    "teacher": (
        "a teacher",
        ("data.image_size", "grid", "data.channels", "noise.", "preconditioning", "time", "model."),
        "train one with this config and objective edm, or change this config",
    ),
    "augmentation_net": (
        "an augmentation net",
        ("data.image_size", "data.channels"),
        "train one on these images with configs/augmentation_net.py",
    ),
}
OWN = ("model.dropout", "model.dtype", "model.remat", "model.unroll")  # a student's own


def check_shared(group: str, config, theirs, folder: str) -> None:
    """ValueError where `theirs`, the config of the run in `folder`, does not fit `config` as its `group`."""
    if group == "teacher":
        _check_denoiser(theirs, folder)
    name, keys, advice = SHARED[group]
    ours, theirs = (dict(_flat(each)) for each in (config, theirs))
    pairs = {key: (theirs.get(key), ours[key]) for key in ours if key.startswith(keys) and key not in OWN}
    differing = [f"{key}: {there!r} there, {here!r} here" for key, (there, here) in pairs.items() if there != here]
    if differing:
        raise ValueError(f"found {name} in {folder} with another {'; '.join(differing)}; expected the same; {advice}")


def _check_denoiser(theirs, folder: str) -> None:
    found = theirs.task, theirs.get("objective", {}).get("name")
    if found != ("consistency", "edm"):
        raise ValueError(
            f"found a run of task {found[0]!r} and objective {found[1]!r} in {folder}, expected a teacher, of task "
            "'consistency' and objective 'edm'; change config.init.teacher"
        )


def _flat(config, prefix: str = ""):
    """(key, value) of every leaf; a tuple as the list that it is in a work directory."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
