"""Where, and for how long, the host waits for the GPU in a training step.

    python -m bench.host_waits --device cuda --out FILE.json
    python -m bench.host_waits --rehearse --out FILE.json # tiny, on a CPU: the places alone

places          calls that wait for the GPU, by file and line (torch.cuda.set_sync_debug_mode; on a CPU the calls of
                Tensor.item, which are some of them)
wait_seconds    of a step, in CUDA's synchronising calls (torch.profiler)
planned_seconds what the planner counts for a step: its wait for group sizes in each MoE layer

The planner's number is fitted to published runs (planner/calibration.py); this is what it can be held against.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.result_tables import machine
from bench.shapes import SHAPES, Shape, rehearsal
from bench.train_step_variants import Batches, our_step, uses_engine
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import UserError

NAMES = ("qwen3_8b", "qwen3_30b_a3b")
LAYERS = 4
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the true shapes")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --rehearse")
    if options.device == "cpu" and not options.rehearse:
        raise UserError("--device cpu: true shapes are for a GPU; add --rehearse, or use --device cuda")
    warnings.filterwarnings("ignore")
    engine = uses_engine(options.rehearse)
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    for name in NAMES:
        shape = rehearsal(SHAPES[name]) if options.rehearse else SHAPES[name]._replace(layers=LAYERS)
        row = {"shape": name, "layers": shape.layers, **measure(shape, engine)}
        result["rows"].append(row)
        print(f"{name:14} {sum(row['places'].values())} waits in a step of {row['seconds']:.3f} s", flush=True)
        if options.out:
            write_json(options.out, result)


def measure(shape: Shape, engine: bool) -> dict[str, Any]:
    """A few plain steps, one whose reads are located, and one that is profiled."""
    from bench.train_step_vs_hf import free_memory, seconds
    from megatron_a2d.planner.calibration import EFFICIENCIES

    model = shape.config()
    batches = Batches(shape.micro_batch_size, shape.seq_length, model["mask_token_id"], shape.num_microbatches)
    settings = {"bf16": True, "transformer_impl": "transformer_engine" if engine else "local"}
    step = our_step(model, batches, settings)
    times = [seconds(step.run) for _ in range(4)]
    found = {
        "settings": settings,
        "seconds": statistics.median(times[1:]),
        "places": find_places(step.run),
        "wait_seconds": waited(step.run),
        "planned_seconds": EFFICIENCIES.moe_sync * shape.layers * shape.num_microbatches if shape.is_moe else 0.0,
    }
    free_memory()
    return found


def find_places(run: Callable[[], None]) -> dict[str, int]:
    """How often each line of Python waited."""
    if not torch.cuda.is_available():
        with _Reads() as reads:
            run()
        return dict(reads.places)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [_place(item.filename, item.lineno) for item in seen if "synchronizing CUDA" in str(item.message)]
    return dict(Counter(places))


class _Reads(TorchDispatchMode):
    """Counts by line where Python asks for a tensor's number."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.places[_caller()] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line that is not torch's, nor this file's."""
    import traceback

    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return _place(frame.filename, frame.lineno or 0)
    return "unknown"


def _place(file: str, line: int) -> str:
    """Without what names this machine."""
    path = Path(file)
    if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
        return f"{path.relative_to(_ROOT)}:{line}"
    return f"{'/'.join(path.parts[-4:])}:{line}"


def waited(run: Callable[[], None]) -> float | None:
    """Seconds in CUDA's synchronising calls; None without a GPU."""
    if not torch.cuda.is_available():
        run()
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        begin = time.perf_counter()
        run()
        end = time.perf_counter() - begin
    # cudaMemcpyAsync to pageable memory waits too; it is told apart by its name's beginning alone.
    calls = [item for item in trace.events() if item.name.startswith(_WAITS)]
    return min(end, sum(item.cpu_time_total for item in calls) / 1e6)


if __name__ == "__main__":
    entry_point(main)
