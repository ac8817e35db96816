"""Count the words of the Python standard library's sources, with a progress bar of tqdm."""

import argparse
import re
import sysconfig
from collections import Counter
from pathlib import Path

import trio
from tqdm.asyncio import tqdm

from trio_workers import open_python_pool

LIBRARY = Path(sysconfig.get_path("stdlib"))


def count_words(path: Path) -> Counter[str]:
    """The job: a file's words, each with how often it is there."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return Counter(word.lower() for word in re.findall(r"[A-Za-z]{2,}", text))


def find_files(limit: int | None) -> list[Path]:
    """Find the library's source files; with a limit that many of them, evenly spread."""
    files = [
        path
        for path in sorted(LIBRARY.rglob("*.py"))
        if path.is_file() and not {"site-packages", "dist-packages"} & set(path.parts)
    ]
    if limit is None or limit >= len(files):
        return files
    return [files[number * len(files) // limit] for number in range(limit)]


async def main(limit: int | None) -> None:
    files = find_files(limit)
    words = Counter[str]()
    async with open_python_pool() as pool, pool.map(count_words, files, ordered=False) as counts:
        async for count in tqdm(counts, total=len(files), unit=" files"):
            words.update(count)

    print(f"{len(files):,} files, {words.total():,} words, {len(words):,} different ones")
    print("The most frequent:", ", ".join(f"{word} ({number:,})" for word, number in words.most_common(8)))
    print(f"There only once: {list(words.values()).count(1):,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the words of the standard library's sources.")
    parser.add_argument("--limit", type=int, metavar="N", help="only N files, evenly spread")
    trio.run(main, parser.parse_args().limit)
