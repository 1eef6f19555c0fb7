"""The device of a rank's threads."""

from __future__ import annotations

import torch


def use_device(device: torch.device) -> None:
    """Call it first in every thread of a rank that touches tensors.

    CUDA keeps a current device for each thread, at first GPU 0: what asks for no other one runs there, and takes the
    memory of a context there from the rank whose GPU it is.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
