"""`--hf-model`: a directory, or the id of a model on the Hugging Face hub, which is downloaded into its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.checkpoint.directory import HF_PATTERNS, check_directory, check_hf_directory
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import without_passwords


class Model(NamedTuple):
    directory: Path
    hub_id: str | None


def find_model(given: str, with_weights: bool = True) -> Model:
    """The directory of the model `given`, a directory or else a hub id.

    Without `with_weights` a directory with only a tokenizer suffices.
    """
    path, where = Path(given), f"--hf-model {given}"
    if path.exists():
        if with_weights:
            check_hf_directory(path, where)
        else:
            check_directory(path, where, "give a Hugging Face directory")
        return Model(path, None)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given) or given.startswith("."):
        raise UserError(f"{where}: no such directory, and no hub id (owner/name); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    weights = ["*.safetensors", "*.safetensors.index.json"] if with_weights else []
    patterns = [*HF_PATTERNS, "README.md", *weights]
    try:
        return Model(Path(snapshot_download(given, allow_patterns=patterns)), given)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = without_passwords(" ".join(str(error).split()))
        raise UserError(
            f"{where}: no such directory, and it cannot be downloaded from the hub ({reason}); "
            "check the name and the connection, or download it and give the directory"
        ) from None
