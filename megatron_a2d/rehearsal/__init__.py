"""Rehearsal of a run: one step of any rank of the real layout at the real sizes, on a machine without GPUs or memory.

dataless_gpu.py      torch's CUDA interface over tensors that hold no data
step_trace.py        trace of a step: memory, collectives, host synchronisations
balanced_routing.py  sizes that depend on data, assuming balanced routing
rank_rehearsal.py    builds a rank as training does and runs one step
pipeline_pairing.py  matches sends and receives of all stages, finds deadlocks
rehearsal_report.py  the figures compared with the planner's, as text
"""
