"""Background scan of token files for damage, foreign ids and mask tokens, while a run starts and trains.

Description and checksums are verified when a file is opened, and every read is checked. The scan finds early what a run
would meet late, above all in files of other tools that have no description.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.utils.errors import UserError


class BackgroundScan:
    """A thread that reads `files` completely; `check` raises what it has found. `close` stops it."""

    def __init__(self, files: Sequence[TokenFile]):
        self._files = list(files)
        self._problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scan", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the UserError of the first problem found so far."""
        if self._problem is not None:
            raise self._problem

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the scan, at most this many seconds, and `check`."""
        self._thread.join(timeout)
        self.check()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for file in self._files:
                for _ in file.scan():
                    if self._stop.is_set():
                        return
        except (UserError, OSError) as error:
            self._problem = error
