import numpy as np

from fid_imagegen.evaluation.latents import latent_report
from fid_imagegen.evaluation.sheets import captioned_sheet
from fid_imagegen.pipelines import WuerstchenPipeline


def test_the_report_is_of_the_compressors_latents(random_stages, monkeypatch):
    stage = WuerstchenPipeline.from_pretrained(random_stages).stage_b
    channels = np.arange(16.0)

    def compress(groups, images):  # channel k of image i: k, but one far value
        made = np.broadcast_to(channels, (len(images), 4, 4, 16)).copy()
        made[..., 3] += np.resize([-1.0, 1.0], (4, 4))
        made[0, 0, 0, 3] = 100.0
        return made

    monkeypatch.setattr(
        "fid_imagegen.evaluation.latents.jax.jit", lambda function: lambda groups, images: compress(groups, images)
    )
    report = latent_report(stage)
    assert report["images"] == 1024 and report["largest"] == 100.0 and report["smallest"] == 0.0
    np.testing.assert_allclose(report["mean"], np.where(channels == 3, report["mean"][3], channels))
    assert abs(report["mean"][3] - 3) < 0.2 and np.count_nonzero(report["deviation"]) == 1
    # One far value in each batch of 64 images.
    assert report["outliers"] == 16 / (1024 * 16 * 16) and report["furthest_outlier_deviations"] > 20


def test_a_captioned_sheet_shows_every_picture_above_its_words():
    pictures = [np.full((10, 20, 3), value, np.uint8) for value in (10, 60, 110, 160, 210)]
    sheet = np.asarray(captioned_sheet([f"number {i}" for i in range(5)], pictures, columns=2, cell=40))
    assert sheet.shape[1] == 2 * 46 + 6
    for value in (10, 60, 110, 160, 210):
        assert (sheet == value).all(axis=-1).sum() >= 40 * 20
