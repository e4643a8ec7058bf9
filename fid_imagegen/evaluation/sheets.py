"""Pictures for people: contact sheets and training curves."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL = 6, 96


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], *, cell: int = 128) -> Image.Image:
    """One row a (title, uint8 images [count, height, width, channels]); column i is function i in every row.

    Every picture is drawn `cell` pixels wide: smaller ones with their pixels visible (nearest), larger ones reduced.
    """
    count = max(len(images) for _, images in rows)
    heights = [max(1, round(cell * images.shape[1] / images.shape[2])) for _, images in rows]
    size = (LABEL + count * (cell + MARGIN) + MARGIN, sum(height + MARGIN for height in heights) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    top = MARGIN
    for (title, images), height in zip(rows, heights, strict=True):
        draw.text((MARGIN, top + height // 2 - 8), title, fill="black", font=font)
        for number, image in enumerate(images):
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
            enlarge = picture.width <= cell
            picture = picture.resize((cell, height), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
            sheet.paste(picture, (LABEL + MARGIN + number * (cell + MARGIN), top))
        top += height + MARGIN
    return sheet


def captioned_sheet(
    captions: Sequence[str], images: Sequence[np.ndarray], *, columns: int = 4, cell: int = 256
) -> Image.Image:
    """Pictures, uint8 [height, width, 3] each, drawn `cell` wide with their captions below, in rows of `columns`."""
    height = max(round(cell * image.shape[0] / image.shape[1]) for image in images)
    font = ImageFont.load_default(size=14)
    texts = ["\n".join(textwrap.wrap(caption, cell // 8)[:2]) for caption in captions]
    row = height + 40 + MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, rows * row + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        left, top = MARGIN + number % columns * (cell + MARGIN), MARGIN + number // columns * row
        picture = Image.fromarray(image)
        way = Image.Resampling.NEAREST if picture.width <= cell else Image.Resampling.LANCZOS
        sheet.paste(picture.resize((cell, round(cell * image.shape[0] / image.shape[1])), way), (left, top))
        draw.text((left, top + height + 2), text, fill="black", font=font)
    return sheet


def training_curves(runs: Sequence[tuple[str, list[dict]]], path: str | Path) -> None:
    """Saves a plot of the scalars of several runs (title, lines of metrics.jsonl): one row a run, one panel a scalar."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    hidden = {"step", "images_per_second"}
    names = [list(dict.fromkeys(key for line in lines for key in line if key not in hidden)) for _, lines in runs]
    columns = max(map(len, names))
    figure, axes = pyplot.subplots(len(runs), columns, figsize=(3.2 * columns, 2.6 * len(runs)), squeeze=False)
    for row, ((title, lines), scalars) in enumerate(zip(runs, names, strict=True)):
        for column, axis in enumerate(axes[row]):
            if column >= len(scalars):
                axis.axis("off")
                continue
            points = [(line["step"], line[scalars[column]]) for line in lines if scalars[column] in line]
            axis.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 20 else "")
            axis.set_title(f"{title}: {scalars[column]}", fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
