"""Named U-Nets. Parameter counts are for three channels, without classes."""

import flax.linen as nn

from fid_imagegen.models.unets.adm import ADM
from fid_imagegen.models.unets.score import ScoreUNet

ARCHITECTURES = {"score": ScoreUNet, "adm": ADM}

DDPMPP = {
    "architecture": "score",
    "stem": 128,
    "blocks": 4,
    "resampling": "box",
    "progressive_input": False,
    "fourier_scale": None,
}
NCSNPP = DDPMPP | {"resampling": "fir", "progressive_input": True, "fourier_scale": 16.0}

# ddpmpp and ncsnpp as EDM trained them (arXiv 2206.00364, App. F); adm_64 as the public consistency models are.
UNETS = {
    "ddpmpp_32": DDPMPP | {"widths": (256, 256, 256), "attention_levels": (1,)},
    "ddpmpp_64": DDPMPP | {"widths": (128, 256, 256, 256), "attention_levels": (2,)},
    "ncsnpp_32": NCSNPP | {"widths": (256, 256, 256), "attention_levels": (1,)},
    "ncsnpp_64": NCSNPP | {"widths": (128, 256, 256, 256), "attention_levels": (2,)},
    "adm_64": {
        "architecture": "adm",
        "widths": (192, 384, 576, 768),
        "blocks": 3,
        "attention_levels": (1, 2, 3),
        "head_width": 64,
        "groups": 32,
    },
}


def build_unet(preset: str, *, channels: int, **overrides) -> nn.Module:
    """The named U-Net, single fields changed by `overrides`. Raises ValueError for unknown names."""
    if preset not in UNETS:
        raise ValueError(f"found U-Net {preset!r}, expected one of {sorted(UNETS)}; change config.model.preset")
    fields = UNETS[preset] | overrides
    architecture = ARCHITECTURES[fields.pop("architecture")]
    if unknown := sorted(set(fields) - set(architecture.__dataclass_fields__)):
        raise ValueError(
            f"found {', '.join(unknown)} for U-Net {preset!r}, which has none; leave it out of config.model.unet"
        )
    return architecture(channels=channels, **fields)
