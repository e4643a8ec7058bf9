"""Does a distance of learned features help consistency training, above all of small batches? AYT's claim (arXiv 2510.00658).

    python -m fid_imagegen.train --config configs/augmentation_net.py --workdir runs/augmentation_net
    python -m launch.run --config configs/studies/distances.py --sweep distance,batch,seed
    python -m benchmarks.study --experiment runs/distances

`ect` as in the other studies; equal steps, so that at batch 16 an eighth of the images is seen. To be judged in pixels: features
of augmentations would favour the arm that they trained.
"""

from configs import common
from configs.studies import common as studies


def get_config(arg: str = ""):
    """Pseudo-Huber, unless a variant is named."""
    return common.finish(studies.digits(), arg, VARIANTS)


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
