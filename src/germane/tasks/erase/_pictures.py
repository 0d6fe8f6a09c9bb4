"""Records of a pipeline: images with the class or the prompt that they were made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from germane.core.errors import MissingExtra, RecordsError, nearest
from germane.core.images import read_image
from germane.core.records import Data, Row, read_rows
from germane.tasks.erase._pipeline import Condition


class Pictures:
    """Records read for a pipeline; images are opened when they are asked for.

    Args:
        data: Name and fields of the records.
        text: Whether conditions are prompts.
        classes: Otherwise, how many classes there are.

    Raises:
        RecordsError: A record without an image or a condition, or a label outside the classes.
    """

    def __init__(self, data: Data, text: bool, classes: int = 0) -> None:
        self.data = data
        self.rows = read_rows(data)
        self.conditions: list[Condition] = [
            self._prompt(row, number) if text else self._class(row, number, classes)
            for number, row in enumerate(self.rows, 1)
        ]
        for number, row in enumerate(self.rows, 1):
            self._check_image(row, number)

    def __len__(self) -> int:
        return len(self.rows)

    def _place(self, number: int) -> str:
        return f"{self.data.path}, record {number}"

    def _check_image(self, row: Row, number: int) -> None:
        value = row.get(self.data.image)
        if value is None:
            raise RecordsError(
                f"{self._place(number)}: has no image in field {self.data.image!r}"
                f"{nearest(self.data.image, row)} Fields: {', '.join(row)}."
            )
        if isinstance(value, str) and not (self._folder / value).is_file():
            raise RecordsError(f"{self._place(number)}: there is no image {self._folder / value}.")

    @property
    def _folder(self) -> Path:
        return Path(self.data.path).expanduser().parent

    def _prompt(self, row: Row, number: int) -> str:
        value = row.get(self.data.prompt)
        if not isinstance(value, str) or not value.strip():
            raise RecordsError(
                f"{self._place(number)}: has no prompt in field {self.data.prompt!r}"
                f"{nearest(self.data.prompt, row)} Fields: {', '.join(row)}."
            )
        return value

    def _class(self, row: Row, number: int, classes: int) -> int:
        value = row.get(self.data.label)
        if not str(value).isdigit() or int(str(value)) >= classes:
            raise RecordsError(
                f"{self._place(number)}: label {value!r} is no class number from 0 to {classes - 1}, which "
                "the pipeline draws."
            )
        return int(str(value))

    def images(self, numbers: Sequence[int], form: tuple[int, int, int]) -> Tensor:
        """(records, channels, height, width) from -1 to 1, resized where the size is another."""
        return torch.stack([self._image(number, form) for number in numbers])

    def _image(self, number: int, form: tuple[int, int, int]) -> Tensor:
        channels, height, width = form
        image = read_image(self.rows[number][self.data.image], self._folder, self._place(number + 1))
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height))
        values = np.asarray(image, dtype=np.float32).reshape(height, width, channels)
        return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)


def save_grid(rows: Sequence[Tensor], file: Path, smallest: int = 64) -> None:
    """Write rows of images (each (images, channels, height, width) from 0 to 1) as one PNG."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("pillow", "images", "the pictures of the result") from None
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    values = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
    scale = max(1, -(-smallest // rows[0].shape[3]))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file)
