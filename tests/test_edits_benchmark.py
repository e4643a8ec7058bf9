"""What the benchmark of edits sets side by side: every edit there is, and what was known, the mean image elsewhere."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import edits
from configs import common
from fid_imagegen.diffusion.editing import super_resolution
from fid_imagegen.tasks.generator import to_float


class Perfect:
    """A pipeline that knows the answer."""

    def __init__(self, data):
        self.config, self.asked = SimpleNamespace(data=data), []

    def edit(self, images, edit, *, steps, **given):
        self.asked.append((edit, steps, sorted(given)))
        return Answer(images)


class Answer(np.ndarray):
    def __new__(cls, images):
        return np.asarray(images).view(cls)

    def render(self, height, width):
        factor = height // self.shape[1]
        return np.asarray(self.repeat(factor, 1).repeat(factor, 2))


def test_edits_stand_beside_the_mean_of_what_is_not_known(tmp_path, monkeypatch):
    data = common.base().data
    data.update({"source": "synthetic", "image_size": 8, "channels": 3, "holdout_every": 64})
    seen = []
    monkeypatch.setattr(edits, "scores", lambda made, images, extract: seen.append((made, images)))
    pipe = Perfect(data)
    report = edits.run(pipe, 5, tmp_path)
    assert pipe.asked == [("inpaint", 5, ["mask"]), ("super_resolve", 5, ["factor"]), ("colourise", 5, [])]
    assert set(report) == {"inpaint", "super_resolve", "colourise"} == {path.stem for path in tmp_path.glob("*.png")}
    for made, images in seen[::2]:
        np.testing.assert_array_equal(made, images)
    inpainted, means = seen[1][0], seen[3][0]
    images = seen[0][1]
    np.testing.assert_array_equal(inpainted[:, :, :4], images[:, :, :4])
    assert (inpainted[:, :, 4:] == inpainted[:1, :, 4:]).all() and (inpainted[0, :, 4:] != images[0, :, 4:]).any()
    project = super_resolution(2)
    inside = np.all((means > 0) & (means < 255), axis=(1, 2, 3))  # where nothing was clipped
    assert inside.any()
    np.testing.assert_allclose(project(to_float(means))[inside], project(to_float(images))[inside], atol=0.01)


def test_scores_are_psnr_and_distance():
    images = np.random.default_rng(0).integers(0, 200, (40, 2, 2, 1), dtype=np.uint8)
    found = edits.scores(images + 51, images, lambda x: x.reshape(len(x), -1) / 255.0)
    assert found["psnr"] == pytest.approx(-20 * np.log10(0.2))
    assert found["frechet"] == pytest.approx(4 * 0.2**2, rel=1e-3)  # the squared shift of the mean
