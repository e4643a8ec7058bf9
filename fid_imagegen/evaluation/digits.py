"""A judge of generated digits: a small classifier trained on real ones (scikit-learn's multi-layer perceptron)."""

import numpy as np

from fid_imagegen.data import pipeline, sources

CONFIDENT = 0.9


class DigitJudge:
    """Classifier of 8x8 digits. `accuracy` is on the held-out real digits, which it has not seen."""

    def __init__(self, data):
        from sklearn.neural_network import MLPClassifier

        self._model = MLPClassifier((128,), alpha=1e-2, max_iter=300, random_state=0)
        images, labels = _records(data, held_out=False)
        self._model.fit(_flat(images), labels)
        held_out, labels = _records(data, held_out=True)
        self.accuracy = float(self._model.score(_flat(held_out), labels))
        self.real = self.judge(held_out)

    def judge(self, images: np.ndarray) -> dict[str, float]:
        """Of uint8 images: the share judged with confidence >= 0.9, and the share of the rarest class."""
        probabilities = self._model.predict_proba(_flat(images))
        shares = np.bincount(probabilities.argmax(axis=1), minlength=10) / len(images)
        return {
            "confident": float((probabilities.max(axis=1) >= CONFIDENT).mean()),
            "rarest_class": float(shares.min()),
        }


def _records(data, *, held_out: bool):
    source = sources.make_source(data, held_out=held_out)
    labels = np.array([int(source[i]["label"]) for i in range(len(source))])
    return pipeline.examples(source, data, range(len(source))), labels


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1
