import json

import numpy as np
import pytest
from PIL import Image

from fid_imagegen.training.writers import Writer, read_metrics, tile


def test_scalars_are_json_lines(tmp_path):
    writer = Writer(tmp_path, start=0, tensorboard=False)
    writer.write_scalars(1, {"loss": np.float32(0.5)})
    writer.write_scalars(2, {"loss": 0.25, "psnr": 10})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "psnr": 10.0}]
    assert not (tmp_path / "tensorboard").exists()


def test_what_is_not_finite_is_null_and_every_line_is_json(tmp_path):
    writer = Writer(tmp_path, start=0, tensorboard=False)
    writer.write_scalars(1, {"loss": float("nan"), "norm": float("inf"), "rate": 2.0})
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)  # NaN and Infinity are no JSON

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "norm": None, "rate": 2.0}


@pytest.mark.parametrize("start", [0, 2, 9])
def test_a_resumed_log_goes_on_from_the_restored_step(tmp_path, start):
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))  # cut off by a kill
    writer = Writer(tmp_path, start=start, tensorboard=False)
    writer.write_scalars(start + 1, {"loss": 7})
    writer.close()
    expected = [{"step": step, "loss": step / 2} for step in (1, 2, 3) if step <= start]
    assert read_metrics(tmp_path) == [*expected, {"step": start + 1, "loss": 7.0}]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_last_line_cut_off_is_left_out(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "los')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2}]


def test_tensorboard_holds_the_same(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = Writer(tmp_path, start=0, tensorboard=True)
    writer.write_scalars(3, {"loss": 0.5})
    writer.write_images(3, {"samples": np.zeros((4, 4, 3), np.uint8)})
    writer.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    data, found = file.read_bytes(), {}
    while data:  # length (8), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {value.tag: (event.step, value) for value in event.summary.value}
        data = data[16 + size :]
    assert found["loss"][0] == found["samples"][0] == 3
    assert found["loss"][1].simple_value == 0.5
    assert found["samples"][1].image.height == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_sheets_are_pngs(tmp_path, channels):
    images = np.arange(3 * 2 * 2 * channels, dtype=np.uint8).reshape(3, 2, 2, channels)
    writer = Writer(tmp_path, start=0, tensorboard=False)
    writer.write_images(12, {"samples": tile(images)})
    writer.close()
    sheet = np.asarray(Image.open(tmp_path / "samples" / "samples_0000012.png")).reshape(5, 5, channels)
    np.testing.assert_array_equal(sheet[:2, :2], images[0])
    np.testing.assert_array_equal(sheet[:2, 3:], images[1])
    np.testing.assert_array_equal(sheet[3:, :2], images[2])
    assert (sheet[2] == 255).all() and (sheet[:, 2] == 255).all() and (sheet[3:, 3:] == 255).all()
