"""Self-contained HTML page that replays the denoising of texts with a slider, without network or libraries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_a2d.terminal.live_view import Decode, segments


def replay_row(tokens: Sequence[int], steps: Sequence[int | None], decode: Decode) -> list[list[Any]]:
    """[text, step that completed it (0: prompt), number of tokens] for each segment of one text."""
    return [
        [text, max((step or 0) for step in steps[start:end]), end - start]
        for start, end, text in segments(list(tokens), list(steps), decode)
    ]


def replay_page(title: str, rows: Sequence[list[list[Any]]]) -> str:
    """The page for texts made by `replay_row`."""
    last = max((segment[1] for row in rows for segment in row), default=0)
    # "</script" would end the script element, and "<!--<script" would keep it from ending.
    data = json.dumps({"title": title, "last": last, "rows": rows}).replace("<", "\\u003c")
    return _PAGE.replace("__DATA__", data)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Replay</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      border: 1px solid #8884; border-radius: 6px; padding: 1rem; }
.controls { display: flex; gap: 1rem; align-items: center; position: sticky; top: 0; padding: .5rem 0;
            background: Canvas; }
.controls input { flex: 1; }
.masked { opacity: .3; }
output { min-width: 15rem; text-align: right; font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1></h1>
<div class="controls">
<button id="play" type="button">Play</button>
<input id="step" type="range" min="0" step="1" aria-label="Denoising step">
<output id="state" for="step"></output>
</div>
<main></main>
<script>
"use strict";
const data = __DATA__;
const slider = document.getElementById("step"), play = document.getElementById("play");
document.title = data.title;
document.querySelector("h1").textContent = data.title;
const spans = [];
for (const row of data.rows) {
  const block = document.createElement("pre");
  for (const [text, step, tokens] of row) {
    const span = document.createElement("span");
    block.append(span);
    spans.push({ span, text, step, tokens });
  }
  document.querySelector("main").append(block);
}
function colour(step) {
  return `hsl(${210 * (1 - (step - 1) / Math.max(data.last - 1, 1))} 80% 50%)`;
}
function show() {
  const now = Number(slider.value);
  let masked = 0;
  for (const { span, text, step, tokens } of spans) {
    const known = step <= now;
    span.textContent = known ? text : "\\u2592\\u2592".repeat(tokens);
    span.className = known ? "" : "masked";
    span.style.color = known && step ? colour(step) : "";
    span.title = step ? `step ${step}` : "given";
    if (!known) masked += tokens;
  }
  document.getElementById("state").textContent = `step ${now} of ${data.last}, ${masked} masked`;
}
let timer = null;
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
play.addEventListener("click", () => {
  if (timer) return stop();
  if (Number(slider.value) >= data.last) slider.value = 0;
  play.textContent = "Pause";
  timer = setInterval(() => {
    if (Number(slider.value) >= data.last) return stop();
    slider.value = Number(slider.value) + 1;
    show();
  }, Math.max(40, 6000 / Math.max(data.last, 1)));
  show();
});
slider.addEventListener("input", () => { stop(); show(); });
slider.max = data.last;
slider.value = data.last;
show();
</script>
</body>
</html>
"""
