"""What every config of an image-function generator holds, spelled out once. Values are JSON types only.

A config file calls `base()` and writes down what it changes; `runlocal(config)` shrinks any of them to a minute on 2 cores.
None (a placeholder) means "the preset's value".
"""

from ml_collections import ConfigDict, config_dict

OBJECTIVES = {
    # Song et al. 2023, CIFAR-10: the settings the function generator's paper copies.
    "ct": {"s0": 2, "s1": 150, "mu0": 0.9},
    # Song & Dhariwal 2023.
    "ict": {"s0": 10, "s1": 1280, "log_mean": -1.1, "log_deviation": 2.0},
    # Geng et al. 2024.
    "ect": {"q": 2.0, "stages": 8, "k": 8.0, "b": 1.0, "log_mean": -1.1, "log_deviation": 2.0},
    # Song et al. 2023, CIFAR-10: from a teacher that `edm` trained.
    "cd": {"levels": 18, "mu": 0.0},
    # Karras et al. 2022: diffusion, the teacher.
    "edm": {"log_mean": -1.2, "log_deviation": 1.2},
    # Geng et al. 2025 and, its network of clean images, Lu et al. 2026.
    "meanflow": {"logit_mean": -0.4, "logit_deviation": 1.0, "instant": 0.75, "power": 1.0, "offset": 0.01},
    # Lu & Song 2025, CIFAR-10, but for the learned weight of levels: `learn_level_weight`.
    "sct": {
        "warmup": 10_000,
        "normaliser": 0.1,
        "log_mean": -1.0,
        "log_deviation": 1.4,
        "distilled": False,
        "weight_cosines": 0,
    },
}

# Of the small VGG whose features are the distance "augmentations".
AUGMENTATION_WIDTHS = (32, 64, 128)

# Kernels [L, in, out] of Transformers' attention and MLPs are cut along the layer's inner axis by `tensor`, the other by `fsdp`.
RULES = (
    (r"(attention|mlp)/(query|key|value|gate|up)/kernel$", ("-", "fsdp", "tensor")),
    (r"(attention|mlp)/(out|down)/kernel$", ("-", "tensor", "fsdp")),
    (r".*", "fsdp"),
)
UNET_RULES = ((r".*", "fsdp"),)  # for config.model.network="unet": it has none of the layers above


def objective(name: str, **changes) -> ConfigDict:
    """The named objective with all its fields written out."""
    return ConfigDict({"name": name, **OBJECTIVES[name], **changes})


def optimizer(name: str, learning_rate: float, **changes) -> ConfigDict:
    """One parameter group's optimizer: constant rate after a warm-up unless `schedule` is "cosine" or "linear" (to zero)."""
    fields = {
        "name": name,  # adam, adamw, radam
        "learning_rate": learning_rate,
        "warmup_steps": 0,
        "schedule": "constant",
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "grad_clip": 0.0,  # global norm; 0: no clipping
    }
    return ConfigDict(fields | changes)


def learn_level_weight(config: ConfigDict) -> None:
    """The learned weight of levels of `sct`: a group with an optimizer of its own, for it has further to go than a network."""
    config.objective.weight_cosines = 16
    config.optimizers.level_weight = optimizer("adam", 1e-2)
    config.init.level_weight = ""


def training(task: str) -> ConfigDict:
    """What every task's config holds: the run, its data, where it runs and what it reports."""
    config = ConfigDict()
    config.seed = 0
    config.task = task
    config.num_steps = 400_000
    config.batch_size = 128  # global
    config.accumulate = 1  # micro-batches per step

    config.data = ConfigDict()
    config.data.source = "folder"  # captions, digits, folder, npz, prepared, shapes, synthetic, tfds:NAME
    config.data.path = ""
    config.data.split = "train"  # tfds only
    config.data.image_size = 32
    config.data.resize = 0  # random crops of image_size of pictures shrunk to this size; 0: whole pictures
    config.data.buckets = ()  # (height, width) each, for Stages B and C; (): squares of image_size
    config.data.channels = 3
    config.data.flip = False
    config.data.holdout_every = 0  # k: every k-th record is held out for evaluation
    config.data.skip_unreadable = False
    config.data.features = ""  # of Stage C: a folder of `python -m fid_imagegen.features`, read in place of pictures

    config.ema_decays = (0.9999,)  # evaluation EMAs; samples use the last
    # Power averages of these relative widths (EDM2), such as (0.05, 0.1), saved every so many steps into WORKDIR/snapshots:
    # `python -m fid_imagegen.average --runs WORKDIR --width 0.08` makes any other of them. 0: none are saved.
    config.ema_widths = ()
    config.ema_snapshots = 0
    # GROUP: the run or exported folder that the group comes from; ./ is in the work directory, ../ beside it.
    config.init = ConfigDict()
    config.optimizers = ConfigDict()  # one a trained group

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: the devices that are left
    # The first rule whose regex is found in a parameter's path decides; arrays below min_size elements are replicated.
    config.sharding = ConfigDict({"min_size": 2**20})
    config.sharding.rules = RULES
    config.checkpoint = ConfigDict({"every": 1000, "keep": 3})
    config.log = ConfigDict({"every": 50, "sample_every": 5000, "num_samples": 16, "tensorboard": True})
    config.profile = ConfigDict({"start": 0, "steps": 0})  # 0 steps: none
    return config


def base() -> ConfigDict:
    """Every key of an image-function generator's config, with the values the CIFAR-10-sized one starts from."""
    config = training("consistency")
    config.model = ConfigDict()
    config.model.network = "function"  # of one fixed size: dit, unet, uvit
    config.model.preset = (
        "tiny"  # tiny, S, B, L; dit: XL too; uvit: M for B; unet: ddpmpp_32, ddpmpp_64, ncsnpp_32, ncsnpp_64, adm_64
    )
    config.model.patch = 2
    config.model.width = config_dict.placeholder(int)
    config.model.heads = config_dict.placeholder(int)
    config.model.depth = config_dict.placeholder(int)  # of dit and uvit
    config.model.extractor_depth = config_dict.placeholder(
        int
    )  # from here to integrated: of the generator of functions
    config.model.predictor_depth = config_dict.placeholder(int)
    config.model.function = config_dict.placeholder(
        str
    )  # of a place: pixel128, pixel64, pixel32, patch64, patch32, local256, local128, local64; global: 5x256, 5x128, 5x64
    config.model.function_width = config_dict.placeholder(int)
    config.model.function_depth = config_dict.placeholder(int)
    config.model.bands = config_dict.placeholder(int)
    config.model.function_features = config_dict.placeholder(int)  # values a patch, of local functions
    config.model.groups = config_dict.placeholder(int)  # this and the next three: of global functions
    config.model.activation = "relu"  # relu, sine
    config.model.weight_update = "normalize"  # normalize (TransINR), scale (LDMI), low_rank (IPC, INR-GAN)
    config.model.cutoff = "nyquist"  # or cycles per image, e.g. "1024" as the papers
    config.model.integrated = config_dict.placeholder(bool)  # waves averaged over a pixel's footprint
    config.model.level_scale = 1000.0
    config.model.unet = ConfigDict({"stem": config_dict.placeholder(int), "blocks": config_dict.placeholder(int)})
    config.model.unet.update({name: config_dict.placeholder(tuple) for name in ("widths", "attention_levels")})
    config.model.unet.update({name: config_dict.placeholder(int) for name in ("head_width", "groups")})
    config.model.unet.fourier_scale = config_dict.placeholder(float)  # ncsnpp: 16; 0.02 for sct and meanflow
    config.model.num_classes = 0  # 0: unconditional
    config.model.dropout = 0.0
    config.model.norm = "layer"  # this and the next three: of function and dit, qk_norm of uvit too; layer, rms
    config.model.mlp = "gelu"  # gelu, swiglu
    config.model.qk_norm = False  # of queries and keys, for objectives that differentiate in the level
    config.model.rotary = False  # rotary positions of image tokens, beside the fixed ones
    config.model.dtype = "float32"  # compute; parameters are always float32
    config.model.remat = False
    config.model.unroll = False

    config.noise = ConfigDict({"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5})
    config.preconditioning = "x0_blend"  # edm (faithful), x0_blend, mean_flow
    config.time = "log"  # what the network is told of the noise level: log, angle (sct)
    config.objective = objective("ect")
    config.distance = "pseudo_huber"  # l2, laplacian, pseudo_huber, lpips, augmentations
    config.lpips = ConfigDict({"vgg16": "", "heads": ""})
    config.augmentation_net = ConfigDict({"widths": AUGMENTATION_WIDTHS})  # as model.widths of its run
    # Of the noise, where not the images' own: the function is held to windows of the images at random sizes.
    config.grid, config.window = 0, 0  # 0: the images' size; whole images, at their own size
    config.label_dropped = 0.0  # share of labels replaced by the null class, for classifier-free guidance
    config.variational = False  # variational coordinates
    config.render_chunk = 4096  # coordinates rendered at once in training

    config.optimizers.generator = optimizer("radam", 1e-4)
    config.init.generator = ""
    config.init.teacher = ""  # of cd: a run of objective edm
    config.init.augmentation_net = ""  # of distance augmentations: a run of configs/augmentation_net.py

    # Reconstruction pre-training of patch embedding and predictor, run first into WORKDIR/pretrain; 0 steps: none.
    config.pretrain = ConfigDict({"num_steps": 0, "batch_size": 128, "accumulate": 1, "checkpoint_every": 1000})
    config.pretrain.optimizers = ConfigDict({"generator": optimizer("adam", 1e-4)})
    return config


def paper(config: ConfigDict, *, images: int) -> None:
    """The function generator's paper: Song et al. 2023 at batch 32, LPIPS, edm, functions 5x256 with cut-off 1024.

    Without the public VGG16 weights the LPIPS distance stops with an error that names the file; `--config.distance=l2` is the
    stated variant. 30 epochs of pre-training.
    """
    config.batch_size, config.num_steps = 32, 800_000
    config.model.update({"preset": "S", "function": "5x256", "cutoff": "1024", "dtype": "float32"})
    config.preconditioning, config.distance, config.variational = "edm", "lpips", True
    config.lpips.update({"vgg16": "vgg16-397923af.pth", "heads": "lpips_v0.1_linear_heads.npz"})
    config.objective = objective("ct")
    config.optimizers.generator = optimizer("radam", 4e-4)
    config.ema_decays = (0.9999,)
    config.pretrain.update({"num_steps": 30 * images // 32, "batch_size": 32})


def runlocal(config: ConfigDict) -> ConfigDict:
    """The same experiment shrunk until it trains on 2 cores within a minute; it shows that the config runs, nothing more."""
    config.num_steps = 8
    config.batch_size = 8
    config.accumulate = 1
    config.model.update({"width": 32, "heads": 2, "depth": 2, "extractor_depth": 1, "predictor_depth": 1})
    config.model.dtype = "float32"
    if config.model.network == "unet":
        own = {"head_width": 16, "groups": 8} if config.model.preset == "adm_64" else {"stem": 16}
        config.model.unet.update({"blocks": 1, "widths": (16, 16), "attention_levels": (1,), **own})
    else:
        config.model.preset = "tiny"
    if (config.model.function or "pixel")[0].isdigit():  # a global function
        config.model.update({"function_width": 16, "function_depth": 3, "bands": 4, "groups": 4})
    config.pretrain.update({"num_steps": min(4, config.pretrain.num_steps), "batch_size": 8, "checkpoint_every": 4})
    config.checkpoint.every = 4
    config.log.update({"every": 2, "sample_every": 8, "num_samples": 4})
    return config


def finish(config: ConfigDict, arg: str, variants: dict | None = None) -> ConfigDict:
    """Applies `arg`, a comma-separated list of variant names and `runlocal`, then locks the config.

    They are applied in the order of `variants`, `runlocal` last, in whichever order they are named. Stages read the set that
    `config.data` names, each unless its own config names another.
    """
    known = dict(variants or {})
    known["runlocal"] = known.pop("runlocal", runlocal)
    named = set(filter(None, arg.split(",")))
    if unknown := sorted(named - set(known)):
        raise ValueError(f"found config argument {unknown[0]!r}, expected of {sorted(known)}")
    for name in filter(named.__contains__, known):
        known[name](config)
    for stage in config.get("stages", ()):
        config[stage].data.update({key: config.data.get_oneway_ref(key) for key in config.data})
    config.lock()
    return config
