"""Every shipped recipe, and the numbers of GPUs that it fits."""

from __future__ import annotations

from pathlib import Path

import yaml

RECIPES = {
    path.stem: path
    for path in sorted((Path(__file__).resolve().parents[1] / "launch" / "recipes").glob("*.yaml"))
    if "model" in yaml.safe_load(path.read_text())
}
GPUS = (8, 16, 32, 64, 128, 256, 512)
# The fewest GPUs (H100, H200, B200) that a recipe fits on as it stands; 0: on none, another micro-batch is needed.
FEWEST = {
    "qwen3_0p6b": (8, 8, 8), "qwen3_1p7b": (8, 8, 8), "qwen3_4b": (8, 8, 8), "qwen3_8b": (8, 8, 8),
    "qwen3_14b": (8, 8, 8), "qwen3_32b": (16, 8, 8), "qwen3_30b_a3b": (32, 8, 8), "qwen3_235b_a22b": (128, 64, 64),
    "rnd1_30b_a3b_64xb200": (0, 0, 64), "qwen3_8b_block": (8, 8, 8), "qwen3_30b_a3b_block": (0, 8, 8),
}  # fmt: skip
