"""Draw the thumbnails of the gallery: ``python docs/figures/make_thumbnails.py [NAME ...]`` writes thumbnails/NAME.png.

Each tutorial opens with a picture. This runs a tutorial up to that picture and saves it in a small size.
"""

import io
import runpy
import sys
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image

TUTORIALS = Path(__file__).parent.parent.parent / "tutorials"
FOLDER = Path(__file__).with_name("thumbnails")
SIZE = (420, 260)  # pixels, of the box into which each picture is fitted


class Shown(Exception):
    """The tutorial has shown its first picture."""


def show() -> None:
    raise Shown


def first_picture(script: Path) -> Image.Image:
    plt.close("all")
    plt.rcdefaults()
    plt.show = show
    torch.set_default_dtype(torch.float32)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Shown:
        buffer = io.BytesIO()
        plt.gcf().savefig(buffer, dpi=100)
        return Image.open(buffer).convert("RGB")
    raise AssertionError(f"{script.name} shows no picture")


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    warnings.simplefilter("ignore", DeprecationWarning)
    for script in sorted(TUTORIALS.glob("*.py")):
        if names and script.stem not in names:
            continue
        picture = first_picture(script)
        picture.thumbnail(SIZE, Image.Resampling.LANCZOS)
        picture.quantize(64).save(FOLDER / f"{script.stem}.png", optimize=True)
        print(script.stem, picture.size)


if __name__ == "__main__":
    main(sys.argv[1:])
