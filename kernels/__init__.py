"""Stripe pooling and reduction: the heads of an MGN's branches. `tests/emulator/reference.py` is the definition.

`stripe_pool_reduce.cu` holds the CUDA kernels; `plan.py` says which of them run and `params.py` what they are told;
`nvrtc.py` compiles and launches them. `torch_op.py` is the operator for PyTorch, `pycuda_.py` is for PyCUDA's arrays.

Other implementations of the same that must differ: `train/model.py` (PyTorch, differentiable, traced for export) and
`export/graph/heads.py` (ONNX operators).
"""
