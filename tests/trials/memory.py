"""Memory of `embed` over many rows: `python -m tests.trials.memory --photos DIR --rows 100000`.

Rows are boxes, each another one, in the photos of a folder, and the engine is a network of 48x16 pixels that is made
here. The resident memory is read at every batch of a process that does nothing else; printed are the bytes a row of a
line through what follows the first fifth, and the largest.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np

from mgn_deploy.config import ModelConfig
from mgn_deploy.embedder import Embedder
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_inputs
from mgn_deploy.images.listing import list_images
from mgn_deploy.train.weights import new_model, save_weights


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=32)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="mgn-memory-") as work:
        config = ModelConfig(backbone="resnet18", base_width=8, reduced_width=8, height=48, width=16)
        save_weights(new_model(config, seed=1), f"{work}/weights")
        export_bundle(f"{work}/weights", f"{work}/bundle")
        names = [file.name for file in list_images(asked.photos)]
        with open(f"{work}/boxes.csv", "w") as table:
            table.write("path,left,top,width,height\n")
            for row in range(asked.rows):
                number = row // len(names)
                table.write(f"{names[row % len(names)]},{number % 16},{number // 16 / 8},32,64\n")
        source = open_inputs([asked.photos], boxes=f"{work}/boxes.csv")
        embedder = Embedder.open(f"{work}/bundle", "onnxruntime")
        samples: list[tuple[int, int]] = [(0, resident())]
        report = embed_folder(
            source, f"{work}/store", embedder, batch_size=asked.batch,
            progress=lambda step, done, total: samples.append((done, resident())),
        )  # fmt: skip
    rows, used = np.array(samples, np.float64).T
    late = rows > asked.rows / 5
    slope = np.polyfit(rows[late], used[late], 1)[0]
    at = np.interp(np.linspace(0, asked.rows, 11), rows, used) / 2**20
    print(json.dumps({
        "embedded": report.embedded, "failed": len(report.failed), "bytes_a_row": round(slope, 1),
        "largest_mib": round(used.max() / 2**20, 1), "mib_at_each_tenth": at.round(1).tolist(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
