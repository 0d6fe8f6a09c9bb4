"""Images of records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from germane.core.errors import MissingExtra, RecordsError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(value: Any, folder: Path, where: str) -> Image:
    """The image of a record, in colour.

    Args:
        value: A file name, relative to `folder`, or (rows, columns) or (rows, columns, 3) numbers
            from 0 to 255.
        folder: Where the records lie.
        where: The record, for messages.

    Raises:
        RecordsError: No such file, no image, or numbers of another shape.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("pillow", "images", "reading images") from None
    if isinstance(value, str):
        try:
            with Image.open(folder / value) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise RecordsError(
                f"{where}: {folder / value}: no image can be read from it: {error}"
            ) from None
    try:
        pixels = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise RecordsError(f"{where}: the image is neither a file name nor numbers.") from None
    if pixels.ndim not in (2, 3) or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise RecordsError(f"{where}: an image is (rows, columns[, 3]) numbers from 0 to 255.")
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
