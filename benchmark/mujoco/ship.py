"""Makes of a complete run what the repository ships: its table, what --evaluate reads, a film.

    python benchmark/mujoco/ship.py runs/NAME benchmark/mujoco/halfcheetah

Writes args.json without the folder, versions.json, eval.csv, a checkpoint.npz that has pi_old and
the critics alone, and film.webp: the first four seconds of an evaluation episode, in real time.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imageio.v3 as imageio
import numpy as np
import tyro
from PIL import Image
from results import fail, share_done

ROOT = Path(__file__).resolve().parents[2]


def slim(run, out):
    """Copies a run folder without what only training needs."""
    out.mkdir(parents=True, exist_ok=True)
    args = json.loads((run / "args.json").read_text()) | {"run_dir": None}
    (out / "args.json").write_text(json.dumps(args, indent=2) + "\n")
    for name in ("versions.json", "eval.csv"):
        shutil.copy(run / name, out)
    with np.load(run / "checkpoint.npz") as file:
        kept = [x for x in file if x.startswith((".theta_old", ".critics[")) or x[-4:] == "step"]
        np.savez_compressed(out / "checkpoint.npz", **{name: file[name] for name in kept})


def film(run, path, seconds=4, size=320):
    """Evaluates a copy of `run` with a film -> its first seconds, as animated WebP."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(run, Path(folder) / "run")
        flags = "--evaluate", copy, "--eval-episodes", "1", "--capture-video"
        subprocess.run([sys.executable, ROOT / "simpo_mujoco.py", *flags], check=True)
        (video,) = copy.glob("film-*.mp4")
        fps = round(imageio.immeta(video)["fps"])
        frames = imageio.imread(video)[: seconds * fps]
    images = [Image.fromarray(x).resize((size, size), Image.Resampling.LANCZOS) for x in frames]
    options = {"save_all": True, "append_images": images[1:], "loop": 0}
    images[0].save(path, duration=1000 // fps, quality=70, method=6, **options)


def main(run: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]):
    if share_done(run) < 1:
        fail(f"{run} is no complete run")
    slim(run, out)
    film(out, out / "film.webp")
    for path in sorted(out.iterdir()):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
