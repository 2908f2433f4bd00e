"""Triton interprets kernels on CPU tensors where no GPU is present; it reads the variable when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
