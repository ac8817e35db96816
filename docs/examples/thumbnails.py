"""Make thumbnails of pictures with Pillow, with a progress bar of rich.

It looks for pictures among the installed packages, or in the directories that are named. A file that is no picture
costs its own thumbnail alone.
"""

import argparse
import sysconfig
from pathlib import Path

import trio
from PIL import Image, ImageOps
from rich.progress import Progress

from trio_workers import open_python_pool

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}


def make_thumbnail(picture: Path, thumbnail: Path) -> tuple[int, int]:
    """The job: two paths go to a worker, and a size comes back."""
    try:
        with Image.open(picture) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:
        raise ValueError(f"{picture} is left out: {error}") from error
    upright.thumbnail((128, 128))
    upright.save(thumbnail)
    return upright.size


def find_pictures(directories: list[Path]) -> list[Path]:
    found = (path for directory in directories for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.is_file())


async def main(directories: list[Path], output: Path) -> None:
    pictures = find_pictures(directories)
    thumbnails = [output / f"{number:04}-{path.stem}.png" for number, path in enumerate(pictures)]
    failed = pixels = 0
    with Progress() as progress:
        bar = progress.add_task("Thumbnails", total=len(pictures))
        async with (
            open_python_pool() as pool,
            pool.map(make_thumbnail, pictures, thumbnails, ordered=False, return_exceptions=True) as results,
        ):
            async for result in results:
                if isinstance(result, Exception):
                    failed += 1
                    progress.console.print(str(result), markup=False, soft_wrap=True)
                else:
                    pixels += result[0] * result[1]
                progress.advance(bar)
    print(f"{len(pictures) - failed} thumbnails, {pixels:,} pixels, are in {output}; failed: {failed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make thumbnails of pictures.")
    parser.add_argument("directories", nargs="*", type=Path, default=[Path(sysconfig.get_path("purelib"))])
    parser.add_argument("--output", type=Path, default=Path("thumbnails"), help="where to put them")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    trio.run(main, options.directories, options.output)
