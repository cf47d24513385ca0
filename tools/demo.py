"""The quick start: make data, measure, pre-train, measure again, look, with the commands that a user types.

python tools/demo.py [--seed S] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from passl.visualize.curves import plot_run
from passl.visualize.sheet import contact_sheet

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "demo"
METRIC = "knn_top1_k20"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the network and the augmentations")
    parser.add_argument(
        "--out", type=Path, default=Path("output/demo"), help="folder for everything (default %(default)s)"
    )
    options = parser.parse_args()
    started = time.perf_counter()
    run_demo(options.out, options.seed)
    print(f"\n{time.perf_counter() - started:.0f} seconds in all")


def run_demo(out: Path, seed: int) -> None:
    data = out / "data"
    roots = [f"Evaluators.0.{split}_dataset.root={data / split}" for split in ("train", "val")]
    shared = [f"Global.seed={seed}"]

    def knn(name: str, *more: str) -> dict[str, float]:
        place = [f"Global.output_dir={out / 'knn'}", f"Global.name={name}"]
        passl("eval", "knn.yaml", *place, *roots, *shared, *more)
        return read(out / "knn" / name)

    step("Draw the data: ten shapes, 500 + 100 pictures of each")
    command("passl-data", "demo", "--out", str(data))
    print(f"a few of them: {contact_sheet(data / 'train', out / 'pictures.png')}")
    step("Baselines: k-NN on the pixels, and on the network before training")
    pixels = knn("pixels", "Model={name: RawPixels, img_size: 48}")
    untrained = knn("untrained")
    step("Pre-train with DINO, without labels")
    passl(
        "train",
        "pretrain.yaml",
        f"Global.output_dir={out}",
        f"DataLoader.Train.dataset.root={data / 'train'}",
        *roots,
        *shared,
    )
    weights = f"Global.pretrained_model={out / 'DINO/latest'}"
    step("k-NN on the teacher's features")
    trained = knn("teacher", weights)
    step("Linear probe on the teacher's features")
    probe_data = [
        f"DataLoader.{phase}.dataset.root={data / split}" for phase, split in (("Train", "train"), ("Eval", "val"))
    ]
    passl("train", "linear_probe.yaml", f"Global.output_dir={out}", *probe_data, *shared, weights)
    probe = last_of(out / "LinearProbe" / "metrics.jsonl", "top1")

    step("One page about all of it")
    runs = [out / "DINO", out / "LinearProbe", *(out / "knn" / name for name in ("pixels", "untrained", "teacher"))]
    page = out / "report.html"
    title = "DINO on ten classes of drawn shapes"
    command("passl-visualize", "report", *map(str, runs), "--out", str(page), "--title", title)

    numbers = {
        "k-NN, pixels": pixels[METRIC],
        "k-NN, untrained network": untrained[METRIC],
        "k-NN, DINO teacher": trained[METRIC],
        "linear probe, DINO teacher": probe,
    }
    print_table(numbers)
    baselines = {"pixels": pixels[METRIC], "untrained": untrained[METRIC]}
    picture = plot_run(out / "DINO", out / "curves.png", METRIC, baselines)
    (out / "demo.json").write_text(json.dumps({**baselines, "knn": trained[METRIC], "linear": probe}) + "\n")
    for label, place in (
        ("report", page),
        ("attention", out / "DINO/report/attention.png"),
        ("map of features", out / "DINO/report/embeddings.png"),
        ("curves", picture),
        ("teacher", out / "DINO/latest.pdparams"),
        ("VisualDL", f"visualdl --logdir {out / 'DINO/vdl'}"),
    ):
        print(f"{label + ':':<17}{place}")


def print_table(numbers: dict[str, float]) -> None:
    print(f"\n{'top-1 on the validation pictures':<44}%\n{'-' * 50}")
    for label, value in numbers.items():
        print(f"{label:<42}{value:6.1f}")


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def passl(command_name: str, config: str, *overrides: str) -> None:
    path = CONFIGS / config
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    command(f"passl-{command_name}", "-c", str(shown), *(word for override in overrides for word in ("-o", override)))


def command(program: str, *arguments: str) -> None:
    """Echo a command and run it, with the interpreter that runs this."""
    print(f"$ {shlex.join([program, *arguments])}", flush=True)
    script = Path(sys.executable).with_name(program)
    done = subprocess.run([str(script), *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def read(folder: Path) -> dict[str, float]:
    return json.loads((folder / "eval.json").read_text())


def last_of(metrics: Path, key: str) -> float:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row[key] for row in rows if row["phase"] == "eval"][-1]


if __name__ == "__main__":
    main()
