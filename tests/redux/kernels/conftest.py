"""Kernels are interpreted on a CPU if there is no GPU; triton reads the variable when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
