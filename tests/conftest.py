"""Tests reach no network: a name that is not here is missing at once, for everyone in the same way.

Without a GPU the Triton kernels run in Triton's interpreter, which is chosen before triton is imported.
"""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
