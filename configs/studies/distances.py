"""Does a distance of learned features help consistency training, above all of small batches? AYT's claim (arXiv 2510.00658).

    python -m fid_imagegen.train --config configs/augmentation_net.py --workdir runs/augmentation_net
    python -m fid_imagegen.train --config configs/studies/distances.py:diffusion --workdir runs/diffusion
    python -m launch.run --config configs/studies/distances.py --sweep distance,batch,seed
    python -m benchmarks.study --experiment runs/distances

`ect` from a diffusion model, as in AYT: features say little of what lies far off the images. Equal steps, so that at batch 16 an
eighth of the images is seen. To be judged in pixels: features of augmentations would favour the arm that they trained.
"""

from configs import common
from configs.studies import common as studies


def get_config(arg: str = ""):
    """Pseudo-Huber, unless a variant is named."""
    config = studies.digits()
    config.init.generator = "runs/diffusion"
    return common.finish(config, arg, VARIANTS | {"diffusion": diffusion})


def diffusion(config) -> None:
    """What all arms start from."""
    config.objective, config.distance = common.objective("edm", log_mean=0.3, log_deviation=1.5), "l2"
    config.init.generator = ""


def laplacian(config) -> None:
    """Bands of a pyramid, nothing learned."""
    config.distance = "laplacian"


def augmentations(config) -> None:
    """AYT's, of the net trained above."""
    config.distance, config.init.augmentation_net = "augmentations", "runs/augmentation_net"


VARIANTS = {"pseudo_huber": lambda config: None, "laplacian": laplacian, "augmentations": augmentations}


def get_sweep():
    """`distance`, `batch` and `seed`."""
    batches = [{"batch_size": size} for size in (16, 128)]
    return {"distance": studies.arms(*VARIANTS), "batch": batches, "seed": studies.SEEDS}
