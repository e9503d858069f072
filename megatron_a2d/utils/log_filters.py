"""Filters for library warnings and log messages that a user can do nothing about."""

from __future__ import annotations

import logging
import warnings

# Their modules warn about every missing GPU library, and about each other's deprecated functions.
LIBRARIES = ("megatron", "torch", "transformer_engine", "apex")


def hide_noise(*loggers: str) -> None:
    """Suppress everything below errors from LIBRARIES (warnings and logs) and from `loggers`.

    Call it before the libraries are imported, and after setting the environment variables that torch reads.
    """
    for package in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
    import torch as torch  # its import sets the levels of its loggers

    for name in (*LIBRARIES, *loggers):
        logging.getLogger(name).setLevel(logging.ERROR)
