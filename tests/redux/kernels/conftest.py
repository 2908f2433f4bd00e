"""Without a GPU, Triton interprets the kernels under test; it reads the variable when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
