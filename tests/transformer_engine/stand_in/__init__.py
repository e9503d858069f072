"""A stand-in for Transformer Engine's compiled extension `transformer_engine_torch`, in plain torch, for tests on a CPU.

The real Python package of Transformer Engine runs over it: its modules, autograd functions, quantised tensors and
communication, with these functions where the kernels would be. A function checks what the C++ code checks before it
starts a kernel (shapes, types, which half of a quantised tensor a product reads), for a call that a GPU would refuse
must fail here too. Arithmetic is in fp32 and rounded once at the end. What no test needs is missing, and raises
NotImplementedError by name when it is called (extension.py).
"""
