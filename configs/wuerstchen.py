"""Würstchen's three stages, at the size of the public weights and with the paper's recipes; and what every such config holds.

    python -m fid_imagegen.train --config configs/wuerstchen.py --workdir runs/wuerstchen \
        --config.data.source=prepared --config.data.path=...

Variants: `published`, and in its phases `paper`; `transformer`, `b_no_text`, `previewer`; of baselines `ldm` and `text_only`;
`jumps` and `b_jumps` add a Stage C and a Stage B of one to four steps, distilled at some levels, or `tuned` or `continuous`,
the latter also `weighted`; `runlocal` of any of them.

A config holds a whole config for each stage; `stages` says which are trained, in order. Published: 24,602 A100-hours for
Stage C, 11,000 for Stage B. Not yet reproduced.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("stage_a", "stage_b", "stage_c")
VQGAN = {
    "levels": (192, 384),
    "bottleneck_blocks": 12,
    "latent_channels": 4,
    "codebook_size": 8192,
    "patch": 2,
    "remat": False,
    "unroll": False,
    "dtype": "float32",
}
# Stable Diffusion 1's and 2's first stage, f8.
AUTOENCODER = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "dtype": "float32",
}
# Stage B's compressor sees half-size images in the first phase: 384 of 512 pixels.
COMPRESSOR = {"name": "efficientnet_v2_s", "size": 384, "stride": 32, "widths": (), "channels": 16, "dtype": "float32"}
TEXT = {
    "encoder": "bigG",  # none, small, L, H, bigG
    "tokenizer": "",  # CLIP's: a tokenizer.json or a folder with its files
    "weights": "",  # CLIP's: a safetensors file or a folder with one
    "vocabulary": 1024,  # the rest: small
    "length": 77,
    "width": 128,
    "layers": 4,
    "heads": 4,
    "dtype": "float32",
}
LEVEL_SCALE = 10_000.0  # what the level is multiplied by before its sines
# Attention's kernels have no layer axis in Stage B's single blocks: every kernel is cut along its longest axis.
RULES = ((r".*", "fsdp"),)


def stage_a() -> ConfigDict:
    """Stage A: 500,000 steps of 256 crops of 128 px of pictures of 256 px; adversarial from step 10,000 on."""
    config = common.training("stage_a")
    config.data.update({"image_size": 128, "resize": 256})
    config.model = ConfigDict(VQGAN)
    config.discriminator = ConfigDict({"widths": (64, 128, 256, 512, 512, 512)})
    config.objective = ConfigDict({"mse": 1.0, "perceptual": "lpips", "perceptual_weight": 0.1})
    config.objective.update({"adversarial": 0.01, "adversarial_start": 10_000})
    config.objective.update({"commitment": 0.25, "quantiser_drop": 0.1})
    config.lpips = ConfigDict({"vgg16": "vgg16-397923af.pth", "heads": "lpips_v0.1_linear_heads.npz"})
    config.num_steps, config.batch_size = 500_000, 256
    for group in ("vqgan", "discriminator"):
        config.optimizers[group] = common.optimizer("adamw", 1e-4, weight_decay=0.01)
        config.init[group] = ""
    config.sharding.rules = RULES
    return config


def stage_b() -> ConfigDict:
    """Stage B with its compressor: 457,000 steps of 512 images of 512 px.

    Betas, warm-up and clipping are those of the authors' first version; the weights of noise levels, here p2, are not published.
    The paper's compressor starts from ImageNet's weights: give `compressor.weights` torchvision's efficientnet_v2_s-dd5fe13b.pth.
    """
    config = common.training("stage_b")
    config.data.image_size = 512
    config.model = ConfigDict(
        {"c_in": 4, "c_r": 64, "patch_size": 2, "c_cond": 1024, "c_hidden": (320, 640, 1280, 1280)}
    )
    config.model.update(
        {"nhead": (-1, 10, 20, 20), "blocks": (4, 4, 14, 4), "level_config": ("CT", "CTA", "CTA", "CTA")}
    )
    config.model.update({"inject_effnet": (False, True, True, True), "effnet_embd": 16, "clip_embd": 1024})
    config.model.update({"kernel_size": 3, "dropout": 0.1, "remat": True, "unroll": False, "dtype": "bfloat16"})
    config.model.level_scale = LEVEL_SCALE
    config.vqgan = ConfigDict(VQGAN)
    config.latent_scale = 0.3764  # Stage A's latents are divided by it
    config.compressor = ConfigDict(COMPRESSOR | {"weights": ""})  # torchvision's, of the backbone; "": random
    config.text = ConfigDict(TEXT | {"encoder": "H"})
    config.form = "eps_ab_sigmoid"
    config.disturbance = ConfigDict({"zeroed": 0.05, "noised": 0.3, "noised_until": 0.5, "text_dropped": 0.05})
    config.sampling = ConfigDict({"steps": 12, "guidance": 4.0})
    config.num_steps, config.batch_size = 457_000, 512
    config.ema_decays = (0.999,)
    for group in ("stage_b", "compressor"):
        config.optimizers[group] = common.optimizer("adamw", 1e-4, warmup_steps=10_000, b2=0.95, weight_decay=0.01)
        config.optimizers[group].grad_clip = 1.0
        config.init[group] = ""
    config.init.vqgan = "../stage_a"
    config.sharding.rules = RULES
    return config


def stage_c() -> ConfigDict:
    """Stage C: 500,000 steps of 1,536 images of 384 px, all of which the compressor sees: 12x12 latents."""
    config = common.training("stage_c")
    config.data.image_size = COMPRESSOR["size"]
    config.model = ConfigDict({"network": "convnext", "c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32})
    config.model.update({"nhead": 24, "dropout": 0.1, "remat": True, "unroll": False, "dtype": "bfloat16"})
    config.model.level_scale = LEVEL_SCALE
    config.compressor = ConfigDict(COMPRESSOR)
    config.latent_scale = "statistics"  # or published: (z + 1) / 42
    config.text = ConfigDict(TEXT)
    config.text_dropped = 0.05
    config.form = "v"
    config.sampling = ConfigDict({"steps": 60, "guidance": 4.0})
    config.num_steps, config.batch_size = 500_000, 1536
    config.ema_decays = (0.999,)
    config.optimizers.stage_c = common.optimizer("adamw", 1e-4, warmup_steps=10_000, weight_decay=0.01, grad_clip=1.0)
    config.init.stage_c = ""
    config.init.compressor = "../stage_b"
    config.sharding.rules = RULES
    return config


def twin(teacher: ConfigDict) -> ConfigDict:
    """A twin of one to four steps of a Stage B or C, distilled from it under guidance of any scale (Song et al. 2023)."""
    config = teacher.copy_and_resolve_references()
    config.task, config.form, config.distance = f"{teacher.task}_jumps", "jump", "pseudo_huber"
    config.objective = common.objective("cd", levels=40)
    config.teacher_guidance = (1.0, 2.0 * config.sampling.guidance)
    config.sampling.steps = 2
    if "disturbance" in config:
        config.disturbance.update({"zeroed": 0.0, "text_dropped": 0.0})
    else:
        config.text_dropped = 0.0
    for groups in (config.optimizers, config.init):
        groups[config.task] = groups[teacher.task]
        del groups[teacher.task]
    config.init.update(dict.fromkeys((config.task, "teacher"), f"../{teacher.task}"))
    config.optimizers.guidance, config.init.guidance = config.optimizers[config.task].copy_and_resolve_references(), ""
    _keep(config, teacher.task)
    return config


def _keep(config: ConfigDict, stage: str) -> None:
    """What the teacher trained beside itself, a small text encoder or a compressor, stays as it was there."""
    for group in {"text", "compressor"} & set(config.optimizers):
        config.init[group], config.optimizers[group].learning_rate = f"../{stage}", 0.0


def previewer() -> ConfigDict:
    """Images of 192 px from 24x24 latents; the authors state its layers, not how it is trained."""
    config = common.training("previewer")
    config.data.image_size = 1024  # of which the compressor sees 768 pixels
    config.model = ConfigDict({"widths": (512, 256, 128, 128), "dtype": "float32"})
    config.compressor = ConfigDict(COMPRESSOR | {"size": 768})
    config.latent_scale = "statistics"
    config.objective = ConfigDict({"mse": 1.0, "perceptual": "lpips", "perceptual_weight": 0.1})
    config.lpips = ConfigDict({"vgg16": "vgg16-397923af.pth", "heads": "lpips_v0.1_linear_heads.npz"})
    config.num_steps, config.batch_size = 100_000, 128
    config.optimizers.previewer = common.optimizer("adamw", 1e-4, weight_decay=0.01)
    config.init.previewer = ""
    config.init.compressor = "../stage_b"
    config.sharding.rules = RULES
    return config


def ldm() -> ConfigDict:
    """The baseline of App. E.4: 1,500,000 steps of 1,280 images of 512 px; 0.99 B parameters, 25,000 A100-hours, FID 43.5.

    Its form and sampling are not stated: those of the published Stage C.
    """
    config = common.training("ldm")
    config.data.image_size = 512
    config.model = ConfigDict({"widths": (320, 640, 1280, 1280), "heads": (5, 10, 20, 20), "blocks": (2, 4, 14, 4)})
    config.model.update({"text_width": 768, "level_width": 64, "dropout": 0.1, "remat": True, "unroll": False})
    config.model.dtype = "bfloat16"
    # weights: the folder vae of a Stable Diffusion repository holds them, as diffusion_pytorch_model.safetensors
    config.first_stage = ConfigDict({"network": "kl", "scaling_factor": 0.18215, "weights": "", **AUTOENCODER})
    config.text = ConfigDict(TEXT | {"encoder": "L"})
    config.text_dropped = 0.05
    config.form = "eps_ab"
    config.sampling = ConfigDict({"steps": 60, "guidance": 8.0})
    config.num_steps, config.batch_size = 1_500_000, 1280
    config.ema_decays = (0.999,)
    config.optimizers.ldm = common.optimizer("adamw", 1e-4, warmup_steps=10_000, weight_decay=0.01, grad_clip=1.0)
    config.init.ldm = ""
    config.sharding.rules = RULES
    return config


def base() -> ConfigDict:
    """The three stages, and the set that all of them read."""
    config = ConfigDict({"stages": STAGES, "stage_a": stage_a(), "stage_b": stage_b(), "stage_c": stage_c()})
    config.data = {name: config.stage_a.data[name] for name in ("source", "path")}
    return config


def published(config: ConfigDict) -> None:
    """Stage C as published: eps with the (a, b) head and p2 weight, latents scaled by (z + 1) / 42."""
    config.stage_c.form, config.stage_c.latent_scale = "eps_ab", "published"
    config.stage_c.sampling.guidance = 8.0


def paper(config: ConfigDict) -> None:
    """As published, in all phases (App. E.2 and E.3), with the warm-up of the first one in that alone.

    What is left is the weight average that the public Stage C is:

        python -m fid_imagegen.average --runs W/stage_c_aspects,W/stage_c_artworks --out W/stage_c
    """
    published(config)
    split = {"stage_b": _phases_b, "stage_c": _phases_c}
    config.stages = sum((split[stage](config) if stage in split else (stage,) for stage in config.stages), ())


def _phases_b(config: ConfigDict) -> tuple[str, ...]:
    """Stage B at 512 px, then at 1024."""
    config.stage_b_512 = config.stage_b.copy_and_resolve_references()
    _start_from("stage_b_512", config.stage_b, num_steps=300_000, batch_size=128)
    config.stage_b.data.image_size, config.stage_b.compressor.size = 1024, 768
    return "stage_b_512", "stage_b"


def _phases_c(config: ConfigDict) -> tuple[str, ...]:
    """Stage C on 12x12 latents, then on 24x24, of mixed shapes, of artworks, whose folder is for you to give."""
    phases = "stage_c_384", "stage_c_768", "stage_c_aspects", "stage_c_artworks"
    small, large, aspects, artworks = (config.stage_c.copy_and_resolve_references() for _ in phases)
    for config_768 in (large, aspects, artworks):
        config_768.data.image_size = config_768.compressor.size = 768
    _start_from(phases[0], large, num_steps=364_000)
    _start_from(phases[1], aspects, num_steps=4_000, batch_size=768)
    _start_from(phases[2], artworks, num_steps=50_000, batch_size=384)
    aspects.data.buckets = ((768, 1280), (1280, 768), (768, 768))
    config.update(dict(zip(phases, (small, large, aspects, artworks), strict=True)))
    del config.stage_c
    return phases


def _start_from(earlier: str, phase: ConfigDict, **changes) -> None:
    """A phase that goes on with the groups of an earlier one; Adam's moments begin anew."""
    phase.update(changes)
    for group, optimizer in phase.optimizers.items():
        phase.init[group], optimizer.warmup_steps = f"../{earlier}", 1_000


def transformer(config: ConfigDict) -> None:
    """Stage C as a Transformer of as many parameters, within 1 %."""
    model = {"network": "transformer", "channels": 16, "width": 1536, "text_width": 1280, "depth": 19, "heads": 24}
    kept = {name: config.stage_c.model[name] for name in ("dropout", "remat", "unroll", "dtype")}
    config.stage_c.model = ConfigDict(model | kept | {"level_scale": 1000.0})


def b_no_text(config: ConfigDict) -> None:
    """Stage B on the compressor's latents alone, which the paper's App. J finds as good."""
    config.stage_b.text.encoder = "none"


def text_only(config: ConfigDict) -> None:
    """The baseline that the paper's reviewers asked for: Stage B's network without a compressor, sampled as Stage C is.

    It sees as many images as B and C together: of the published sizes 1.7 times their FLOPs.
    """
    b, c = config.stage_b, config.stage_c
    config.stages = ("stage_a", "stage_b")
    b.model.inject_effnet = (False,) * len(b.model.inject_effnet)
    b.num_steps += c.num_steps * c.batch_size // b.batch_size
    b.sampling.update(c.sampling)
    del b.optimizers.compressor, b.init.compressor


def jumps(config: ConfigDict) -> None:
    """Stage C's twin of one to four steps too. Not with `published`, `paper` or a baseline: the teacher is of form `v`."""
    _add_twin(config, "stage_c")


def b_jumps(config: ConfigDict) -> None:
    """Stage B's twin of one to four steps too, its teacher of form `v`."""
    config.stage_b.form = "v"
    _add_twin(config, "stage_b")


def _add_twin(config: ConfigDict, stage: str) -> None:
    if stage not in config.stages or "stage_c" not in config.stages or config[stage].form != "v":
        raise ValueError(
            "found 'jumps' without a Stage C of form 'v', expected one; leave out published, paper and baselines"
        )
    made = twin(config[stage])
    config[made.task] = made
    config.stages += (made.task,)


def _twins(config: ConfigDict) -> list[str]:
    if not (found := [stage for stage in config.stages if stage.endswith("_jumps")]):
        raise ValueError("found a variant of a twin without one, expected jumps or b_jumps beside it; name one of them")
    return found


def tuned(config: ConfigDict) -> None:
    """Twins by ECT: from the trained stage, without a teacher and therefore without guidance."""
    for twin in _twins(config):
        config[twin].objective = common.objective("ect", log_mean=-0.4, log_deviation=1.6)
        config[twin].teacher_guidance, config[twin].sampling.guidance, config[twin].init.teacher = (1.0, 1.0), 1.0, ""


def continuous(config: ConfigDict) -> None:
    """Twins by sCM's distillation (Lu & Song 2025), and their teachers of a level that can be differentiated in."""
    for twin in _twins(config):
        # Levels are those of pixels, whose deviation is 0.5, times two.
        levels = {"log_mean": -0.3, "log_deviation": 1.4}
        config[twin].objective = common.objective("sct", warmup=config[twin].num_steps // 10, distilled=True, **levels)
        config[twin].distance = "l2"
        for stage in (twin, twin.removesuffix("_jumps")):
            config[stage].model.level_scale = 16.0


def weighted(config: ConfigDict) -> None:
    """Twins of `continuous` with sCM's learned weight of levels."""
    for twin in _twins(config):
        common.learn_level_weight(config[twin])


def with_previewer(config: ConfigDict) -> None:
    """The three stages and a previewer of Stage C's latents."""
    config.previewer = previewer()
    config.stages = ("stage_a", "stage_b", "previewer", "stage_c")


def only_ldm(config: ConfigDict) -> None:
    """The baseline LDM in the place of the three stages."""
    config.ldm = ldm()
    config.stages = ("ldm",)


def on_stage_a(config: ConfigDict) -> None:
    """The baseline LDM on Stage A's latents, where no public autoencoder is at hand."""
    config.stages = ("stage_a", "ldm")
    config.ldm.first_stage = ConfigDict({"network": "vqgan", "scaling_factor": 1.0, **config.stage_a.model})
    config.ldm.init.vqgan = "../stage_a"


def small_text(stage: ConfigDict, *, length: int, width: int) -> None:
    """A text encoder trained with the stage, on the set's own captions."""
    stage.text.update({"encoder": "small", "length": length, "width": width})
    stage.optimizers.text = stage.optimizers[stage.task].copy_and_resolve_references()
    stage.init.text = ""


def runlocal(config: ConfigDict) -> None:
    """A minute on procedural scenes: it shows that the stages run, nothing more."""
    config.data.source = "shapes"
    if "ldm" in config:
        on_stage_a(config)
    for stage in config.stages:
        TINY[config[stage].task](config[stage])
        config[stage].update({"num_steps": 8, "batch_size": 8, "accumulate": 1})
        config[stage].data.image_size = 64
        config[stage].data.buckets = ((64, 96), (96, 64), (64, 64)) if config[stage].data.buckets else ()
        config[stage].checkpoint.every = config[stage].log.sample_every = 4
        config[stage].log.update({"every": 2, "num_samples": 4})


TINY_VQGAN = {"levels": (16, 32), "bottleneck_blocks": 1, "codebook_size": 64}
TINY_COMPRESSOR = {"name": "conv", "size": 64, "stride": 16, "widths": (8, 16, 32, 32)}


def _tiny_a(config: ConfigDict) -> None:
    config.data.resize = 96
    config.model.update(TINY_VQGAN)
    config.discriminator.widths = (8, 16, 32)
    config.objective.perceptual = "laplacian"


def _tiny_b(config: ConfigDict) -> None:
    config.vqgan.update(TINY_VQGAN)
    config.compressor.update(TINY_COMPRESSOR)
    latents = any(config.model.inject_effnet)
    config.model.update({"c_hidden": (16, 32), "nhead": (-1, 2), "blocks": (1, 2), "level_config": ("CT", "CTA")})
    config.model.update({"inject_effnet": (False, latents), "c_cond": 32, "clip_embd": 32, "dtype": "float32"})
    config.text.encoder = "none"
    if not latents:
        small_text(config, length=16, width=32)


def _tiny_c(config: ConfigDict) -> None:
    config.compressor.update(TINY_COMPRESSOR)
    sizes = {
        "convnext": {"c": 32, "c_cond": 32, "nhead": 2},
        "transformer": {"width": 32, "text_width": 32, "heads": 2},
    }
    config.model.update(sizes[config.model.network] | {"depth": 2, "dtype": "float32"})
    config.sampling.steps = 4
    small_text(config, length=16, width=32)


def _tiny_twin(tiny):
    def shrink(config: ConfigDict) -> None:
        tiny(config)
        _keep(config, config.task.removesuffix("_jumps"))

    return shrink


def _tiny_previewer(config: ConfigDict) -> None:
    config.compressor.update(TINY_COMPRESSOR)
    config.model.widths = (16, 16, 16, 16)
    config.objective.perceptual = "laplacian"


def _tiny_ldm(config: ConfigDict) -> None:
    config.first_stage.update(TINY_VQGAN)
    config.model.update({"widths": (16, 32), "heads": (1, 2), "blocks": (1, 1), "text_width": 32, "level_width": 16})
    config.model.dtype = "float32"
    config.sampling.steps = 4
    small_text(config, length=16, width=32)


TINY = {
    "stage_a": _tiny_a,
    "stage_b": _tiny_b,
    "stage_b_jumps": _tiny_twin(_tiny_b),
    "stage_c": _tiny_c,
    "stage_c_jumps": _tiny_twin(_tiny_c),
    "previewer": _tiny_previewer,
    "ldm": _tiny_ldm,
}
VARIANTS = {
    "transformer": transformer,
    "b_no_text": b_no_text,
    "previewer": with_previewer,
    "ldm": only_ldm,
    "text_only": text_only,
    "published": published,
    "paper": paper,
    "jumps": jumps,
    "b_jumps": b_jumps,
    "tuned": tuned,
    "continuous": continuous,
    "weighted": weighted,
    "runlocal": runlocal,
}


def get_config(arg: str = ""):
    """Large text-image sets: `v` for Stage C, latents scaled by their statistics. `published`: as the public weights."""
    return common.finish(base(), arg, VARIANTS)


def get_sweep():
    """Named sweeps: lists of overrides."""
    return {
        "form": [{"stage_c.form": name} for name in ("eps_ab", "v", "flow", "edm")],
        "seed": [{"stage_c.seed": seed} for seed in (0, 1, 2)],
    }
