"""What a start on millions of clips costs: seconds until the first micro-batch is known, and memory.

    python tools/bench/data.py --rows 5000000 --output docs/measured/data.json

Makes the index of a list of so many videos, none of which is there, and opens `BucketedClips` on it with three buckets
of seven aspect ratios each, its order, and the first micro-batch's keys; in one process, and in two at a time that
share the index's pages. Each is a process of its own, whose highest resident memory is told; of this, `private` is
what it does not share with others, such as mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsae.data.buckets import BucketedClips
from fsae.data.config import BucketConfig, Mixture, SourceConfig
from fsae.data.index import Index, index_folder, save_index
from fsae.data.order import Cut
from fsae.storage.columns import Table, Texts
from fsae.storage.files import atomic_path

BUCKETS = [
    BucketConfig(frames=121, area=448 * 448, weight=2),
    BucketConfig(frames=49, area=576 * 576),
    BucketConfig(frames=17, area=1024 * 1024, max_aspect=1.5),
]
CAPTION = "the camera pans slowly to the left over a harbour at dusk; boats rock, and lights come on, one by one, {}"


def make(source: Path, rows: int) -> None:
    """The index of a list of `rows` videos of 17 to 480 frames, in 900 sizes of picture."""
    source.write_text("path\nis not read\n")
    rng = np.random.default_rng(0)
    sides = 64 * rng.integers(5, 35, (2, rows))
    whole = {"start": np.zeros(rows), "end": np.full(rows, np.nan), "fps": rng.choice([24.0, 25.0, 30.0], rows)}
    flags = {"image": np.zeros(rows, bool), "probed": np.ones(rows, bool), "counted": np.ones(rows, bool)}
    numbers = {
        "frames": rng.integers(17, 481, rows),
        "height": sides[0].astype(np.int32),
        "width": sides[1].astype(np.int32),
    }
    numbers |= {
        "offset": np.zeros(rows, np.int64),
        "size": np.zeros(rows, np.int64),
        "file": np.arange(rows).view("u8"),
    }
    none = Texts(np.zeros(0, np.uint8), np.zeros(rows + 1, np.int64))
    texts = {"path": Texts.of(f"/videos/{row // 1000:05}/{row:09}.mp4" for row in range(rows)), "member": none}
    texts |= {"caption": Texts.of(map(CAPTION.format, range(rows))), "why": none}
    stat = source.stat()
    stamp = {"stamp": np.array([[stat.st_size, stat.st_mtime_ns]]), "first": np.zeros(1, np.int64)}
    parts = Table(stamp, {"path": Texts.of([str(source)])})
    save_index(Index(parts, Table({**numbers, **whole, **flags}, texts)), index_folder(str(source)))


def private() -> int:
    """Bytes of this process's memory that no other has; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def start(source: Path) -> dict[str, Any]:
    """Open the clips as a training does, up to the first micro-batch's keys."""
    before, used, imported = time.perf_counter(), time.process_time(), private()
    clips = BucketedClips(Mixture([SourceConfig(str(source))], BUCKETS))
    opened = time.perf_counter()
    keys = clips.order(Cut(seed=0, batch=4, accumulation=2, processes=8)).micro_batch(0, 0)
    ordered = time.perf_counter()
    return {
        "open_seconds": round(opened - before, 2),
        "first_micro_batch_seconds": round(ordered - opened, 2),
        "processor_seconds": round(time.process_time() - used, 2),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "private_gb": round(private() / 1e9, 3),
        "private_after_import_gb": round(imported / 1e9, 3),
        "buckets": len(clips.buckets),
        "items": len(clips),
        "keys": keys,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--output", type=Path, default=Path("build/bench/data.json"))
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    given = parse(argv)
    if given.make:
        make(given.make, given.rows)
        return 0
    if given.start:
        print(json.dumps(start(given.start)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source, environment = Path(folder) / "list.csv", {**os.environ, "XDG_CACHE_HOME": folder}
        again = [sys.executable, "-W", "ignore", __file__, "--rows", str(given.rows)]
        subprocess.run([*again, "--make", source], env=environment, check=True)
        rows = []
        for count in (1, 2):
            command = [*again, "--start", source]
            running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(count)]
            rows += [{"processes": count, **json.loads(process.communicate()[0])} for process in running]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.npy"))
    for row in rows:
        print(f"{row['processes']} at a time: " + ", ".join(f"{name} {row[name]}" for name in list(row)[1:7]))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"processor": platform.machine(), "numpy": np.__version__, "torch": torch.__version__}
    figures = {"index_rows": given.rows, "index_gb": round(size / 1e9, 3), **about, "rows": rows}
    with atomic_path(given.output) as path:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"figures: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
