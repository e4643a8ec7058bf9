"""What may be asked of zero-shot edits."""

import numpy as np

from fid_imagegen.diffusion import editing

EDITS = {"inpaint": "a mask", "colourise": "neither mask nor factor", "super_resolve": "a factor"}


def check(images: np.ndarray, edit: str, size: int, channels: int, *, mask=None, factor: int | None = None) -> None:
    """Raises ValueError for what cannot be asked of a generator of `size` pixels a side."""
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, channels) or not len(images):
        raise ValueError(
            f"found images {images.dtype} {images.shape}, expected uint8 [batch, {size}, {size}, {channels}]; resize them to the "
            "training size"
        )
    if edit not in EDITS:
        raise ValueError(f"found edit {edit!r}, expected one of {sorted(EDITS)}")
    if (mask is not None) != (edit == "inpaint") or (factor is not None) != (edit == "super_resolve"):
        given = [name for name, value in (("a mask", mask), ("a factor", factor)) if value is not None]
        raise ValueError(
            f"found {' and '.join(given) or 'neither mask nor factor'} for {edit!r}, expected {EDITS[edit]}"
        )
    if edit == "colourise" and channels != 3:
        raise ValueError(f"found a generator of {channels} channels, expected 3 for 'colourise'")
    if edit == "inpaint" and np.shape(mask) != (size, size):
        raise ValueError(f"found a mask of shape {np.shape(mask)}, expected 0 and 1 in [{size}, {size}]")
    if edit == "inpaint" and not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"found a mask from {np.min(mask):g} to {np.max(mask):g}, expected 0 and 1 in [{size}, {size}]"
        )
    # A whole number of another type is no size: one that is let through stays in the cache of einops, for the next call too.
    if edit == "super_resolve" and (not isinstance(factor, int | np.integer) or factor < 1 or size % factor):
        raise ValueError(f"found factor {factor!r}, expected an integer, a divisor of the training size {size}")


def projection(edit: str, mask, factor: int | None) -> editing.Projection:
    """What a checked `edit` knows of images."""
    if edit == "inpaint":
        return editing.inpainting(mask)
    return editing.colourisation() if edit == "colourise" else editing.super_resolution(int(factor))
