"""Pictures side by side, each with a few words: what a person looks at. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, LINE = 112, 13  # pixels: side of a picture's place, height of a line of words
INK, PAPER = (32, 32, 32), (250, 250, 250)
_LETTERS = 18  # fit under a picture


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[Sequence[str]],
                  columns: int = 8, places: int = 0) -> Image.Image:
    """One row after another; every picture as large as its place allows, its lines below it.

    Args:
        pictures: uint8 RGB [h, w, 3] each, of any size.
        captions: the lines under each of them, in `PILLOW_LETTERS`.
        places: how many there are at least, empty ones at the end.
    """
    lines = max((len(caption) for caption in captions), default=0)
    tall = CELL + LINE * lines + 3
    places = max(places, len(pictures), 1)
    columns = min(columns, places)
    sheet = Image.new("RGB", (columns * CELL, math.ceil(places / columns) * tall), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for place, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
        picture = _fitted(Image.fromarray(pixels), CELL - 4)
        x, y = place % columns * CELL, place // columns * tall
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        for number, text in enumerate(caption):
            draw.text((x + 3, y + CELL + number * LINE), _short(text), INK, font=font)
    return sheet


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.BOX)
    factor = side // max(picture.size)
    if factor > 1:  # small images, enlarged without smoothing
        return picture.resize((picture.width * factor, picture.height * factor),
                              Image.Resampling.NEAREST)
    return picture


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[:_LETTERS - 1] + "."
