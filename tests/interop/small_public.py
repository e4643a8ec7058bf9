"""A small model under the public files' names, and the converter's command, for tests of both."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fid_imagegen.data.tokenizer import byte_characters
from fid_imagegen.interop import paella_vq, public_wuerstchen, wuerstchen
from fid_imagegen.interop.clip import clip_state_dict
from fid_imagegen.models.text.clip import CLIPTextEncoder
from fid_imagegen.models.wuerstchen.stage_a import PaellaVQ
from fid_imagegen.models.wuerstchen.stage_b import StageB
from fid_imagegen.models.wuerstchen.stage_c import StageC

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = public_wuerstchen.WEIGHTS
VOCABULARY = 514  # CLIP's without a merge: 256 bytes, inside a word and at its end; start and end
COMMON = {"vocabulary": VOCABULARY, "length": 77, "activation": "gelu", "end": VOCABULARY - 1}
SMALL_TOWERS = {
    "H": {"width": 12, "layers": 2, "heads": 3, "hidden": 20, **COMMON},
    "bigG": {"width": 16, "layers": 1, "heads": 4, "hidden": 24, **COMMON},
}
VQGAN = {
    "in_channels": 3,
    "out_channels": 3,
    "up_down_scale_factor": 2,
    "levels": 2,
    "bottleneck_blocks": 1,
    "embed_dim": 12,
    "latent_channels": 4,
    "num_vq_embeddings": 16,
    "scale_factor": 0.5,
}
DECODER = {
    "c_in": 4,
    "c_out": 4,
    "c_r": 8,
    "patch_size": 2,
    "c_cond": 16,
    "c_hidden": [8, 12, 16],
    "nhead": [-1, 3, 4],
    "blocks": [1, 1, 2],
    "level_config": ["CT", "CTA", "CTA"],
    "inject_effnet": [False, True, True],
    "effnet_embd": 16,
    "clip_embd": 12,
    "kernel_size": 3,
    "dropout": 0.1,
}
PRIOR = {"c_in": 16, "c": 24, "c_cond": 16, "c_r": 8, "depth": 2, "nhead": 3, "dropout": 0.1}
JSON = {"vqgan": VQGAN, "decoder": DECODER, "prior": PRIOR}
CLASSES = {"vqgan": "PaellaVQModel", "decoder": "WuerstchenDiffNeXt", "prior": "WuerstchenPrior"}
WHERE = {"vqgan": "decoder/vqgan", "decoder": "decoder/decoder", "prior": "prior/prior"}
MODELS = {
    "vqgan": PaellaVQ(levels=(6, 12), bottleneck_blocks=1, codebook_size=16),
    "decoder": StageB(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in DECODER.items() if k != "c_out"}, text=True
    ),
    "prior": StageC(**PRIOR),
}
STAGES = {"vqgan": "stage_a", "decoder": "stage_b", "prior": "stage_c"}
# The published precision is bfloat16, in which nothing could be compared.
FLOAT32 = """
from configs import wuerstchen

def get_config(arg):
    config = wuerstchen.base()
    wuerstchen.published(config)
    for stage in ("stage_b", "stage_c"):
        config[stage].model.dtype = "float32"
    return config
"""
ENTRY = """
import json, sys
from fid_imagegen import command, convert
assert not {"jax", "numpy", "torch"} & set(sys.modules)
from fid_imagegen.models.text.clip import TOWERS
TOWERS.update(json.loads(sys.argv.pop(1)))
command.run(convert.main)
"""


def random_like(shapes, seed):
    """Weights about as large as trained ones; none at zero, variances positive, PyTorch's counters as they are."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (shape, dtype) in sorted(shapes.items()):
        if dtype == np.int64:
            tensors[name] = np.zeros(shape, dtype)
            continue
        fan_in = math.prod(shape[1:]) if name.endswith("weight") and len(shape) > 1 else 10
        # Noise estimates are about x, as a trained model's are at high levels: (x - a) / |1 - b| with b at 0 in Stage C,
        # (x - a) / b with b at 1 in Stage B. Others grow from step to step, and rounding errors with them. Nor are images far
        # outside [0, 1], where they are cut.
        scale = (0.1 if name.startswith(("out.1.", "clf.1.", "out_block.0.")) else 1) / np.sqrt(fan_in)
        x = scale * rng.standard_normal(shape)
        x = x + 0.5 if name == "out_block.0.bias" else x
        if name == "clf.1.bias":
            x[len(x) // 2 :] += 4
        tensors[name] = (np.abs(x) + 0.5 if name.endswith("running_var") else x).astype(np.float32)
    return tensors


def shapes_of(part):
    model = MODELS[part]
    if part != "vqgan":
        return {name: (shape, np.float32) for name, shape in wuerstchen.torch_shapes(model).items()}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), variables)
    return {k: (x.shape, x.dtype) for k, x in paella_vq.to_state_dict(model, zeros, authors=False).items()}


def tower_tensors(name, seed):
    encoder = CLIPTextEncoder(**SMALL_TOWERS[name])
    params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    return random_like({k: (x.shape, x.dtype) for k, x in clip_state_dict(zeros).items()}, seed)


def tower_json(name):
    tower = SMALL_TOWERS[name]
    return {
        "hidden_size": tower["width"],
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower["heads"],
        "intermediate_size": tower["hidden"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": VOCABULARY - 2,
        "pad_token_id": VOCABULARY - 1,
    }


def write_tokenizer(folder):
    folder.mkdir(parents=True)
    characters = byte_characters()
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def start(*arguments):
    command = [sys.executable, "-c", ENTRY, json.dumps(SMALL_TOWERS), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def converted(out, *arguments):
    done = start(f"--out={out}", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"converted: {out}\n"
    return out


def sources(root):
    return f"--decoder={root / 'decoder'}", f"--prior={root / 'prior'}", f"--config={root / 'config.py'}"
