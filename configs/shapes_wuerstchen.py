"""Würstchen on procedural scenes of coloured shapes with exact captions, 64 px: text to image on a laptop (`make demo-text`).

    python -m fid_imagegen.text_demo --workdir runs/demo-text

Expected on 2 cores: see docs/results.md, "Shapes". Your own pictures with captions, in a folder or zip:

    python -m fid_imagegen.train --config configs/shapes_wuerstchen.py --workdir runs/mine \
        --config.data.source=captions --config.data.path=FOLDER
"""

from configs import common, wuerstchen

SIZE = 64
VQGAN = {"levels": (32, 64), "bottleneck_blocks": 3, "codebook_size": 512, "unroll": True}
COMPRESSOR = {"name": "conv", "size": SIZE, "stride": 16, "widths": (16, 32, 64, 96)}


def get_config(arg: str = ""):
    """Three small stages in sequence: 20 minutes on 2 cores."""
    config = wuerstchen.base()
    config.data.source = "shapes"
    for stage in wuerstchen.STAGES:
        laptop(config[stage])
    tokenizer(config.stage_a)
    decoder(config.stage_b)
    prior(config.stage_c)
    return common.finish(config, arg, VARIANTS)


def get_sweep():
    """Named sweeps: lists of overrides."""
    return wuerstchen.get_sweep()


def laptop(config):
    """What the stages have in common."""
    config.data.update({"image_size": SIZE, "resize": 0})  # whole scenes
    config.update({"batch_size": 64, "ema_decays": (0.995,)})
    config.checkpoint.every = config.log.sample_every = 500
    config.log.every = 20
    for group in config.optimizers:
        config.optimizers[group] = common.optimizer(
            "adam", 2e-3, warmup_steps=100, schedule="cosine", b2=0.99, grad_clip=1.0
        )


def tokenizer(config):
    """Stage A: no LPIPS weights are at hand, and flat shapes need no adversary."""
    config.model.update(VQGAN)
    config.discriminator.widths = (16, 32, 64)
    config.objective.update({"perceptual": "laplacian", "adversarial_start": 300, "adversarial": 0.002})
    config.num_steps, config.batch_size = 650, 16


def decoder(config):
    """Stage B without text: the compressor's 4x4x16 latents say everything.

    Most of them are noised in training: what survives noise is easier for Stage C to hit (0.42 -> 0.56 of the shapes right at
    equal steps; noise up to 0.8 on all of them: 0.41). Guidance makes up for what the decoder then leaves vague.
    """
    config.vqgan.update(VQGAN)
    config.latent_scale = 1.0
    config.compressor.update(COMPRESSOR)
    config.model.update({"c_hidden": (64, 128), "nhead": (-1, 4), "blocks": (2, 3), "level_config": ("CT", "CTA")})
    config.model.update({"inject_effnet": (True, True), "c_cond": 64, "dropout": 0.0, "remat": False, "unroll": True})
    config.model.dtype = "float32"
    config.text.encoder = "none"
    config.form = "v"
    config.disturbance.update({"noised": 0.75, "noised_until": 0.6})
    config.sampling.update({"steps": 12, "guidance": 2.0})
    config.num_steps, config.batch_size = 1500, 32


def prior(config):
    """Stage C with a text encoder of its own."""
    config.compressor.update(COMPRESSOR)
    config.model.update(
        {"c": 128, "c_cond": 128, "depth": 6, "nhead": 4, "dropout": 0.0, "remat": False, "unroll": True}
    )
    config.model.dtype = "float32"
    wuerstchen.small_text(config, length=16, width=128)
    config.text.vocabulary = 400
    config.text_dropped = 0.1
    config.sampling.update({"steps": 20, "guidance": 2.0})
    for group in config.optimizers.values():
        group.learning_rate = 1e-3
    config.num_steps = 2000


def b_text(config):
    """Stage B with a text encoder of its own beside the compressor."""
    b, text = config.stage_b, config.stage_c.text
    wuerstchen.small_text(b, length=text.length, width=text.width)
    b.text.update(text)
    b.model.update({"clip_embd": text.width, "c_cond": text.width})
    b.disturbance.text_dropped = config.stage_c.text_dropped


def text_only(config):
    """The baseline: Stage B on text alone, for as many images as B and C together, 1.4 times their time."""
    wuerstchen.text_only(config)
    b_text(config)


def transformer(config):
    """Stage C as a Transformer of about as many parameters."""
    width = config.stage_c.text.width
    wuerstchen.transformer(config)
    config.stage_c.model.update({"width": width, "text_width": width, "depth": 4, "heads": 4})


def jumps(config):
    """Stage C's twin of one to four steps too."""
    wuerstchen.jumps(config)
    _short(config.stage_c_jumps)


def b_jumps(config):
    """Stage B's twin of one to four steps too."""
    wuerstchen.b_jumps(config)
    _short(config.stage_b_jumps)


def _short(twin):
    twin.num_steps = 1000
    for group in (twin.task, "guidance"):
        twin.optimizers[group].learning_rate = 3e-4


def previewer(config):
    """A previewer of Stage C's latents too, at the size of the images."""
    wuerstchen.with_previewer(config)
    laptop(config.previewer)
    config.previewer.compressor.update(COMPRESSOR)
    config.previewer.model.widths = (128, 64, 64, 32, 32)
    config.previewer.objective.perceptual = "laplacian"
    config.previewer.num_steps = 600


def ldm(config):
    """The baseline LDM on Stage A's latents, for as many images as B and C together."""
    b, c, text = config.stage_b, config.stage_c, config.stage_c.text
    wuerstchen.only_ldm(config)
    wuerstchen.on_stage_a(config)
    laptop(config.ldm)
    config.ldm.model.update({"widths": (64, 128), "heads": (2, 4), "blocks": (1, 2), "text_width": text.width})
    config.ldm.model.update({"dropout": 0.0, "remat": False, "unroll": True, "dtype": "float32"})
    wuerstchen.small_text(config.ldm, length=text.length, width=text.width)
    config.ldm.text.update(text)
    config.ldm.update({"text_dropped": c.text_dropped, "form": c.form})
    config.ldm.num_steps = (b.num_steps * b.batch_size + c.num_steps * c.batch_size) // config.ldm.batch_size
    config.ldm.sampling.update(c.sampling)


def runlocal(config):
    """A minute: it shows that the stages run, nothing more."""
    for stage in config.stages:
        config[stage].update({"num_steps": 8, "batch_size": 8})
        config[stage].checkpoint.every = config[stage].log.sample_every = 4
        config[stage].log.update({"every": 2, "num_samples": 4})


VARIANTS = {
    "b_text": b_text,
    "text_only": text_only,
    "transformer": transformer,
    "previewer": previewer,
    "ldm": ldm,
    "jumps": jumps,
    "b_jumps": b_jumps,
    "tuned": wuerstchen.tuned,
    "continuous": wuerstchen.continuous,
    "weighted": wuerstchen.weighted,
    "runlocal": runlocal,
}
