"""Würstchen on procedural scenes of coloured shapes with exact captions, 64 px: text to image on a laptop (`make demo-text`).

    python -m fid_imagegen.text_demo --workdir runs/demo-text

Expected on 2 cores: see docs/results.md, "Shapes".
"""

from configs import common, wuerstchen

SIZE = 64
VQGAN = {"levels": (32, 64), "bottleneck_blocks": 3, "codebook_size": 512, "unroll": True}
COMPRESSOR = {"name": "conv", "size": SIZE, "stride": 16, "widths": (16, 32, 64, 96)}


def get_config(arg: str = ""):
    """Three small stages in sequence: 20 to 30 minutes on 2 cores."""
    config = wuerstchen.base()
    for stage in wuerstchen.STAGES:
        config[stage].data.update({"source": "shapes", "image_size": SIZE})
        config[stage].update({"batch_size": 64, "ema_decays": (0.995,)})
        config[stage].checkpoint.every = config[stage].log.sample_every = 500
        config[stage].log.every = 20
        for group in config[stage].optimizers:
            config[stage].optimizers[group] = common.optimizer(
                "adam", 2e-3, warmup_steps=100, schedule="cosine", b2=0.99, grad_clip=1.0
            )
    tokenizer(config.stage_a)
    decoder(config.stage_b)
    prior(config.stage_c)
    return common.finish(config, arg, {"runlocal": runlocal})


def get_sweep():
    """Named sweeps: lists of overrides."""
    return wuerstchen.get_sweep()


def tokenizer(config):
    """Stage A: no LPIPS weights are at hand, and flat shapes need no adversary."""
    config.model.update(VQGAN)
    config.discriminator.widths = (16, 32, 64)
    config.objective.update({"perceptual": "laplacian", "adversarial_start": 300, "adversarial": 0.002})
    config.num_steps, config.batch_size = 600, 32


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
    config.sampling.update({"steps": 20, "guidance": 3.0})
    config.num_steps = 3000


def runlocal(config):
    """A minute: it shows that the three stages run, nothing more."""
    for stage in wuerstchen.STAGES:
        config[stage].update({"num_steps": 8, "batch_size": 8})
        config[stage].checkpoint.every = config[stage].log.sample_every = 4
        config[stage].log.update({"every": 2, "num_samples": 4})
