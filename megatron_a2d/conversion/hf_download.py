"""`--hf-model`: a directory, or the id of a model on the Hugging Face hub, which is downloaded into its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.checkpoint.directory import HF_PATTERNS
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import without_passwords


class Model(NamedTuple):
    directory: Path
    hub_id: str | None


def find_model(given: str, with_weights: bool = True) -> Model:
    """The directory of the model `given`, a directory or else a hub id."""
    if Path(given).is_dir():
        return Model(Path(given), None)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given) or given.startswith("."):
        raise UserError(f"--hf-model {given}: no such directory, and no hub id (owner/name); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    weights = ["*.safetensors", "*.safetensors.index.json"] if with_weights else []
    patterns = [*HF_PATTERNS, "README.md", *weights]
    try:
        return Model(Path(snapshot_download(given, allow_patterns=patterns)), given)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = without_passwords(" ".join(str(error).split()))
        raise UserError(
            f"--hf-model {given}: no such directory, and the hub does not give it ({reason}); "
            "check the name and the connection, or download it and give the directory"
        ) from None
