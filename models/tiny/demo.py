"""Draw the demo picture.

python models/tiny/demo.py models/tiny/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from pictures import LIGHT_PAPERS, SLICE, Lettering, Picture, draw_shape, write
from PIL import Image


def demo_picture() -> Picture:
    """A word above a shape, in one slice."""
    picture, rng = Picture(Image.new("RGB", (SLICE, SLICE), LIGHT_PAPERS[0]), dark=False), Random("demo")
    style = Lettering(font_size=18, advance=17, height=16, bold=True)
    write(picture, rng, "HELLO", 13, 18, style, "blue")
    draw_shape(picture, rng, "circle", (36, 54, 76, 94), "red", 1)
    return picture


if __name__ == "__main__":
    demo_picture().image.save(Path(sys.argv[1]))
