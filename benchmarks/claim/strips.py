"""Videos as rows of frames, each with what the checker says of it: the sheets of the judge, the claim's page and the demo."""

import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from fps_jax.files import write_bytes

FACTS = ("colour", "shape", "motion", "background", "one_object")
_ZOOM, _GAP, _HEAD = 2, 2, 28  # pixels a pixel; between frames; a line of text
_WORDS = 110  # pixels at the left of a strip
_EVERY = 4  # frames


class Strip(NamedTuple):
    """A video as a row of frames. label: at its left. verdict: at its right, "right" or what is wrong."""

    label: str
    frames: UInt8[np.ndarray, "F H W 3"]
    verdict: str


def verdict(right: Sequence[bool] | np.ndarray) -> str:
    """ "right", or which of `FACTS` are wrong."""
    wrong = [fact.replace("_", " ") for fact, is_right in zip(FACTS, right, strict=True) if not is_right]
    return f"wrong: {', '.join(wrong)}" if wrong else "right"


def strips(blocks: list[tuple[str, list[Strip]]], path: pathlib.Path) -> None:
    """A png: under each text its strips, every fourth frame of each, the first and the last included."""
    from PIL import Image, ImageDraw, ImageFont

    _, height, width, _ = blocks[0][1][0].frames.shape
    height, width = _ZOOM * height, _ZOOM * width
    columns = len(blocks[0][1][0].frames[::_EVERY])
    strip = columns * (width + _GAP)
    tops = np.cumsum([0, *(_HEAD + len(rows) * (height + _GAP) + _HEAD // 2 for _, rows in blocks)])
    font = ImageFont.load_default(size=13)
    verdicts = max(font.getlength(row.verdict) for _, rows in blocks for row in rows)
    sheet = Image.new("RGB", (_WORDS + strip + int(verdicts) + 18, int(tops[-1])), "white")
    draw = ImageDraw.Draw(sheet)
    for top, (text, rows) in zip(tops, blocks, strict=False):
        draw.text((_WORDS, top + _HEAD / 2), text, fill="black", font=font, anchor="lm")
        for line, row in enumerate(rows):
            y = int(top) + _HEAD + line * (height + _GAP)
            draw.text((6, y + height / 2), row.label, fill="black", font=font, anchor="lm")
            for column, frame in enumerate(row.frames[::_EVERY]):
                image = Image.fromarray(np.asarray(frame)).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (_WORDS + column * (width + _GAP), y))
            place = (_WORDS + strip + 6, y + height / 2)
            draw.text(
                place, row.verdict, fill="#406040" if row.verdict == "right" else "#804000", font=font, anchor="lm"
            )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
