"""Memory that Apple's GPUs share with the host, written by the host without a copy.

Source: PyTorch's torch.mps._host_alias_storage, made for loaders such as safetensors', which
asks for a wait before and after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SAMPLE = 4096
"""Elements by which it is seen whether the GPU got what was written."""


def write_in_place(x: Tensor, write: Callable[[Tensor], None]) -> bool:
    """Have the host write into a tensor's own memory on MPS.

    Args:
        write: fills a tensor of the host that is ``x`` in all but its device.

    Returns:
        Whether it has; False elsewhere, and where the memory cannot be shared.
    """
    alias = _alias(x)
    if alias is None:
        return False
    torch.mps.synchronize()
    write(alias)
    torch.mps.synchronize()
    seen, written = (tensor.reshape(-1)[:SAMPLE].cpu() for tensor in (x, alias))
    if torch.equal(seen.view(torch.uint8), written.view(torch.uint8)):
        return True
    logger.warning("what is written into Metal's memory does not arrive: loading takes longer")
    return False


def _alias(x: Tensor) -> Tensor | None:
    """A tensor of the host in the memory of one on MPS, if there can be one."""
    # Present since PyTorch 2.13, and where it is built for MPS.
    if x.device.type != "mps" or not hasattr(torch._C, "_mps_host_alias_storage"):
        return None
    try:
        storage = torch.mps._host_alias_storage(x.untyped_storage())
    except RuntimeError:
        return None
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())
