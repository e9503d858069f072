"""Live terminal view of a batch while it is denoised.

The colour of a token shows the step that unmasked it, from cool (early) to warm (late); the prompt has the terminal's
default colour, masked tokens are dim blocks.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator, Sequence

from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from megatron_a2d.utils.printable import lines_of

Decode = Callable[[list[int]], str]

MASK_BLOCK = "▒▒"
_MASK_STYLE = Style(dim=True)
_COOL_HUE, _WARM_HUE = 210 / 360, 0.0


class LiveView:
    """The view, a context manager; call `update` after each step.

    `tokens` and `editable` are the sampler's initial [B][L]; `decode` turns token ids into text.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        editable: Sequence[Sequence[bool]],
        num_steps: int,
        decode: Decode,
        console: Console,
    ):
        self.tokens = [list(row) for row in tokens]
        # [B][L] the step that unmasked each token; 0 for the prompt, None while masked.
        self.steps: list[list[int | None]] = [[None if hole else 0 for hole in row] for row in editable]
        self.num_steps, self.decode, self.console = num_steps, decode, console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        self._show(0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, step: int, tokens: Sequence[Sequence[int]], unmasked: Sequence[Sequence[bool]]) -> None:
        """Show the tokens after `step` (from 1), which unmasked the positions `unmasked`, both [B][L]."""
        self.record(step, tokens, unmasked)
        self._show(step)

    def record(self, step: int, tokens: Sequence[Sequence[int]], unmasked: Sequence[Sequence[bool]]) -> None:
        """As `update`, without redrawing."""
        self.tokens = [list(row) for row in tokens]
        for steps, row in zip(self.steps, unmasked, strict=True):
            for position, is_new in enumerate(row):
                if is_new:
                    steps[position] = step

    def text(self, row: int, positions: Sequence[int] | None = None, decode: Decode | None = None) -> Text:
        """The coloured text of one sample, or of some of its positions."""
        text = Text(overflow="fold")
        shown = range(len(self.tokens[row])) if positions is None else positions
        tokens = [self.tokens[row][position] for position in shown]
        steps = [self.steps[row][position] for position in shown]
        for start, end, segment in segments(tokens, steps, decode or self.decode):
            if steps[end - 1] is None:
                text.append(MASK_BLOCK * (end - start), _MASK_STYLE)
            else:
                text.append(lines_of(segment), self._style(steps[end - 1] or 0))
        return text

    def _style(self, step: int) -> Style:
        if step == 0:
            return Style()
        progress = (step - 1) / max(self.num_steps - 1, 1)
        red, green, blue = colorsys.hls_to_rgb(_COOL_HUE + progress * (_WARM_HUE - _COOL_HUE), 0.6, 0.8)
        return Style(color=Color.from_rgb(255 * red, 255 * green, 255 * blue))

    def _show(self, step: int) -> None:
        masked = sum(value is None for row in self.steps for value in row)
        lines: list[Text] = []
        for row in range(len(self.tokens)):
            lines += [Text(), *self.text(row).wrap(self.console, self.console.width)]
        # If the texts are taller than the screen, show their end, where tokens still change.
        lines = lines[-max(self.console.height - 2, 1) :]
        header = Text(f"step {step}/{self.num_steps}, {masked} masked", Style(dim=True))
        self._live.update(Group(header, *lines), refresh=True)


def segments(tokens: list[int], steps: list[int | None], decode: Decode) -> Iterator[tuple[int, int, str]]:
    """Split a sample into (start, end, text), keeping masked runs and the bytes of a character together."""
    start = 0
    for end in range(1, len(tokens) + 1):
        at_border = end == len(tokens) or (steps[end] is None) != (steps[start] is None)
        if steps[start] is None:
            if at_border:
                yield start, end, ""
                start = end
            continue
        segment = decode(tokens[start:end])
        # A character of up to four bytes may be spread over as many tokens.
        if at_border or not segment.endswith("\ufffd") or end - start == 4:
            yield start, end, segment
            start = end
