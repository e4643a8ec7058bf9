"""Does pre-training by reconstruction pay for itself? With it, and without it but for as many FLOPs more of consistency training.

python -m launch.run --config configs/studies/pretraining.py --sweep pretraining,seed
python -m benchmarks.study --experiment runs/pretraining
python -m benchmarks.curves --experiment runs/pretraining --against seconds
"""

from configs import common
from configs.studies import common as studies


def get_config(arg: str = ""):
    """Without, unless a variant is named."""
    config = studies.digits()
    config.log.every = 10  # for its curve
    return common.finish(config, arg, VARIANTS)


def pretrained(config) -> None:
    """400 steps of the demo's pre-training: 17.9 MFLOP an image, 176 steps' worth of the 40.6 of consistency training."""
    config.pretrain.update({"num_steps": 400, "batch_size": 128, "checkpoint_every": 400})
    config.pretrain.optimizers.generator = common.optimizer("adam", 5e-3, warmup_steps=50, schedule="cosine", b2=0.99)


def longer(config) -> None:
    """The pre-training's FLOPs spent on consistency training."""
    config.num_steps += 176


VARIANTS = {"none": lambda config: None, "pretrained": pretrained, "longer": longer}


def get_sweep():
    """`pretraining` and `seed`."""
    return {"pretraining": studies.arms(*VARIANTS), "seed": studies.SEEDS}
