"""Accuracy of the converted ResNet-56 on CIFAR-10's test images; its authors publish 93.39 %.

python benchmarks/resnet56_accuracy.py --weights cifar10_resnet56.npz --images cifar10_test.npz
"""

import argparse
import json

import jax
import numpy as np

from fid_imagegen.interop.resnet56 import load_resnet56
from fid_imagegen.models.features.resnet56 import ResNet56

BATCH = 500


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    args = parser.parse_args()
    params, data = load_resnet56(args.weights), np.load(args.images)
    forward = jax.jit(lambda images: ResNet56().apply({"params": params}, images / 127.5 - 1)[1].argmax(axis=1))
    batches = [data["images"][i : i + BATCH] for i in range(0, len(data["images"]), BATCH)]
    correct = np.concatenate([np.asarray(forward(batch)) for batch in batches]) == data["labels"]
    print(json.dumps({"accuracy": correct.mean(), "images": len(correct), "peer": "published 0.9339"}))


if __name__ == "__main__":
    main()
