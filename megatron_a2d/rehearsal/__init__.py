"""Rehearsal of a run: one step of any rank of the real layout at the real sizes, on a machine without GPUs or memory.

dataless_gpu.py      torch's CUDA interface over tensors that hold no data
step_trace.py        what a step does: bytes held, collectives, waits of the host
balanced_routing.py  the constants that stand for sizes which only data decides
rank_rehearsal.py    builds a rank as training does and takes one step
pipeline_pairing.py  sends and receives of all stages matched, deadlocks found
rehearsal_report.py  the figures beside the planner's, as text
"""
