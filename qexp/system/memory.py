"""Describes errors of memory that is used up, on a GPU or on the host, in one sentence."""

from __future__ import annotations

import torch

_TEXTS = ("not enough memory", "DefaultCPUAllocator", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def trouble(error: BaseException) -> str | None:
    """Returns one sentence with a remedy if an error means that memory was used up; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        where = "the GPU's memory"
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
    ):
        where = "the memory of this machine"
    else:
        return None
    return (
        f"{where} was used up; take smaller batches (dataset.data.batch_size, dataset.data.eval_batch_size) or fewer calibration "
        "images (n_calibrate), or leave more memory free"
    )
