"""The command, in processes of its own: absl's flags are global, and every entry point defines --workdir."""

import subprocess
import sys

import numpy as np
from PIL import Image

from fid_imagegen import RenderableFunctions

BAD_SIZES = """
import sys
from fid_imagegen import command, sample
for size in sys.argv[1:]:
    try:
        print("took", sample.parse_size(size))
    except ValueError as error:
        print(str(error).replace("\\n", " "))
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_sizes():
    good = {"8": "(8, 8)", "96x160": "(96, 160)", " 1x1 ": "(1, 1)"}
    text = ["", "x", "8x", "x8", "8x8x8", "-1", "1.5", "8X8", "²", "1e3"]
    numbers = {"0": "0x0", "0x5": "0x5", "1000000000": "1000000000x1000000000", "40000x40000": "40000x40000"}
    done = run("-c", BAD_SIZES, *good, *text, *numbers)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"took {size}" for size in good.values()]
    for size, line in zip(text, lines[3:], strict=False):
        assert line.startswith(f"found size {size!r}, expected a number or HEIGHTxWIDTH") and "--sizes" in line
    for size, line in zip(numbers.values(), lines[3 + len(text) :], strict=True):
        assert line.startswith(f"found a render size of {size}, expected at least 1x1 and at most 268,435,456 pixels")


def test_pictures_of_an_exported_folder(exported, tmp_path):
    out = tmp_path / "out"
    command = ("-m", "fid_imagegen.sample", f"--workdir={exported}", "--num=3", f"--out={out}")
    done = run(*command, "--sizes=8,12x20")
    assert done.returncode == 0, done.stderr
    assert str(out / "contact_sheet.png") in done.stdout
    functions = RenderableFunctions.load(out / "functions.safetensors")
    assert len(functions) == 3
    assert {str(p.relative_to(out)) for p in out.rglob("*.*")} == {
        "contact_sheet.png",
        "functions.safetensors",
        *(f"{size}/0000{i}.png" for size in ("8x8", "12x20") for i in range(3)),
    }
    for height, width in ((8, 8), (12, 20)):
        images = [np.asarray(Image.open(out / f"{height}x{width}" / f"0000{i}.png")) for i in range(3)]
        np.testing.assert_array_equal(images, functions.render(height, width)[..., 0])


def test_a_bad_size_among_good_ones_leaves_nothing(exported, tmp_path):
    out = tmp_path / "out"
    done = run("-m", "fid_imagegen.sample", f"--workdir={exported}", "--sizes=8,0", f"--out={out}")
    assert done.returncode == 1 and not out.exists() and "Traceback" not in done.stderr
    assert "found a render size of 0x0" in done.stderr
