"""What may be asked of zero-shot edits."""

import numpy as np

from fid_imagegen.diffusion import editing

EDITS = {"inpaint": "a mask", "colourise": "neither mask nor factor", "super_resolve": "a factor"}


def projection(images: np.ndarray, edit: str, data, *, mask=None, factor: int | None = None) -> editing.Projection:
    """What `edit` knows of images of the size that `data`, a config's, says. ValueError for what cannot be."""
    size, channels = data.image_size, data.channels
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, channels):
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
    if edit == "inpaint":
        return editing.inpainting(_checked_mask(mask, size))
    if edit == "colourise":
        if channels != 3:
            raise ValueError(f"found a generator of {channels} channels, expected 3 for 'colourise'")
        return editing.colourisation()
    if factor < 1 or size % factor:
        raise ValueError(f"found factor {factor}, expected a divisor of the training size {size}")
    return editing.super_resolution(factor)


def _checked_mask(mask, size: int) -> np.ndarray:
    mask = np.asarray(mask, np.float32)
    if mask.shape != (size, size) or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"found a mask of shape {mask.shape} from {mask.min():g} to {mask.max():g}, expected 0 and 1 in [{size}, {size}]"
        )
    return mask
