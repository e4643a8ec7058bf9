"""Packaging of `fid_imagegen`. Floors, not pins: an upper bound is added only with a reason beside it."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["scikit-learn>=1.5", "matplotlib>=3.9"]

setup(
    name="fid_imagegen",
    version="0.1.0",
    description="One-step generators of image functions and text-to-image stages, trained with JAX on TPU and GPU meshes",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `configs/` and `launch/` run from a checkout: their names are too common for site-packages.
    packages=find_packages(include=["fid_imagegen", "fid_imagegen.*"]),
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.5; platform_system == 'Linux'",
        "clu>=0.0.12",
        "einops>=0.8",
        "etils[epath]>=1.9",
        "flax>=0.12.8",
        "grain>=0.2.12",
        "importlib_resources>=6.0",  # tensorflow-datasets imports it without declaring it
        "jax>=0.10",
        "jaxtyping>=0.3",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "pillow>=11.0",
        "safetensors>=0.5",
        "scipy>=1.14",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.8",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10", "gcsfs>=2024.6"],  # gcsfs: work directories in buckets
        "cuda": ["jax[cuda13]>=0.10"],
        "tfds": ["tensorflow-cpu>=2.20"],  # preparing TFDS sets; reading prepared ones needs no tensorflow
        "demo": DEMO,
        "parity": [
            "torch>=2.4",
            "torchvision>=0.19",
            "diffusers>=0.38",
            "transformers>=4.45",
        ],  # oracles of tests, never imported at run time
        "dev": [*DEMO, "beartype>=0.19", "pytest>=8.3", "pytest-xdist>=3.6", "ruff>=0.9"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
