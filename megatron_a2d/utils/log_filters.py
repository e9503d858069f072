"""What libraries say that a user can do nothing about is left out; whatever else warns is heard."""

from __future__ import annotations

import logging
import warnings

# Their modules warn of each GPU library that they do not find, and of one another's deprecated functions.
LIBRARIES = ("megatron", "torch", "transformer_engine", "apex")


def hide_noise(*loggers: str) -> None:
    """Of LIBRARIES, in warnings and in logs, and of `loggers`, let errors through alone.

    To be called before the libraries are imported, and after what torch reads from the environment is set.
    """
    for package in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
    import torch as torch  # sets its loggers' levels when it is imported

    for name in (*LIBRARIES, *loggers):
        logging.getLogger(name).setLevel(logging.ERROR)
