"""python -m fid_imagegen.sample --workdir DIR --num 64 --sizes 32,128,96x160 --out DIR

Draws image functions, renders each at every size, and writes PNGs (OUT/SIZE/00000.png), a contact sheet of the first 16
functions, and `functions.safetensors`, which renders without the generator. `--functions FILE` renders such a file instead.
"""

from pathlib import Path

from absl import app, flags
from PIL import Image

from fid_imagegen import command

WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a run, or exported folder")
FUNCTIONS = flags.DEFINE_string("functions", None, "a functions.safetensors to render instead of generating")
NUM = flags.DEFINE_integer("num", 16, "how many functions")
SIZES = flags.DEFINE_list("sizes", None, "render sizes, HEIGHTxWIDTH or one number; default: the training size")
STEPS = flags.DEFINE_integer("steps", None, "sampling steps; default: 1, for a diffusion model 18")
SEED = flags.DEFINE_integer("seed", 0, "function i depends on (seed, i) alone")
LABEL = flags.DEFINE_integer("label", None, "one class for all, where the generator has classes")
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "scale of classifier-free guidance, where labels were dropped in training"
)
OUT = flags.DEFINE_string("out", None, "where to write; default: WORKDIR/samples/seed_SEED")
ON_SHEET = 16


def parse_size(text: str) -> tuple[int, int]:
    """ "128" -> (128, 128), "96x160" -> (96, 160). ValueError says what was found and the limits."""
    from fid_imagegen.models.rendering import check_size

    parts = text.strip().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"found size {text!r}, expected a number or HEIGHTxWIDTH, such as 128 or 96x160; correct --sizes"
        )
    height, width = (int(part) for part in (parts * 2)[:2])
    check_size(height, width)
    return height, width


def write(functions, sizes, out: Path) -> None:
    """Writes PNGs, contact sheet and functions of a batch."""
    from fid_imagegen.evaluation.sheets import contact_sheet

    rows = []
    for height, width in sizes:
        folder = out / f"{height}x{width}"
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(functions), ON_SHEET):
            images = functions[start : start + ON_SHEET].render(height, width)
            for number, image in enumerate(images, start=start):
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{number:05d}.png")
            if start == 0:
                rows.append((f"{height}x{width}", images))
    contact_sheet(rows).save(out / "contact_sheet.png")
    functions.save(out / "functions.safetensors")


def main(argv):
    del argv
    if (WORKDIR.value is None) == (FUNCTIONS.value is None):
        raise app.UsageError("found both or neither of --workdir and --functions, expected one of them")
    from fid_imagegen.pipelines import ImageFunctionPipeline, RenderableFunctions

    sizes = [parse_size(text) for text in SIZES.value or []]
    if FUNCTIONS.value:
        functions, default_out = RenderableFunctions.load(FUNCTIONS.value), Path(FUNCTIONS.value).parent
    else:
        pipe = ImageFunctionPipeline.from_pretrained(WORKDIR.value)
        labels = None if LABEL.value is None else [LABEL.value] * NUM.value
        asked = {"seed": SEED.value, "steps": STEPS.value, "labels": labels, "guidance": GUIDANCE.value}
        functions = pipe.generate(NUM.value, **asked)
        default_out = Path(WORKDIR.value) / "samples" / f"seed_{SEED.value}"
    out = Path(OUT.value) if OUT.value else default_out
    write(functions, sizes or [functions.functions.grid], out)
    print(f"{len(functions)} functions at {len(sizes) or 1} size(s): {out}/contact_sheet.png")


if __name__ == "__main__":
    command.run(main)
