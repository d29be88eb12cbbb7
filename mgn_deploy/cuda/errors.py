"""What CUDA says when it fails, as a sentence; and what can still be done in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mgn_deploy.errors import UserError

# Errors after which the process can use the GPU no more, whatever it calls: as the driver names them, and as TensorRT
# numbers them ("cudaError 700").
_NAMED = re.compile(
    r"CUDA_ERROR_(ILLEGAL_ADDRESS|ILLEGAL_INSTRUCTION|MISALIGNED_ADDRESS|INVALID_ADDRESS_SPACE|INVALID_PC|LAUNCH_FAILED"
    r"|LAUNCH_TIMEOUT|HARDWARE_STACK_ERROR|ASSERT|ECC_UNCORRECTABLE|NVLINK_UNCORRECTABLE|CONTAINED|EXTERNAL_DEVICE)\b"
)
_NUMBERED = re.compile(r"cudaError (214|220|700|702|710|71[4-9]|721|911)\b")
_NO_MEMORY = re.compile(r"CUDA_ERROR_OUT_OF_MEMORY|cudaError 2\b")

_lost: list[str] = []  # the sentence of the first sticky error of this process


@contextmanager
def cuda_errors() -> Iterator[None]:
    """CUDA's errors as UserErrors; what other code raises goes through. After a sticky one nothing is tried again."""
    if _lost:
        raise UserError(_lost[0])
    try:
        yield
    except Exception as error:
        sentence = cuda_sentence(str(error))
        if sentence is None:
            raise
        if _sticky(str(error)):
            _lost.append(sentence)
        raise UserError(sentence) from error


def cuda_sentence(message: str) -> str | None:
    """What a user can do about a CUDA error; None for a message that names none."""
    found = re.search(r"CUDA_ERROR_\w+|cudaError \d+", message)
    if found is None:
        return None
    if _NO_MEMORY.search(message):
        return f"the GPU has too little free memory ({found[0]}): use a smaller batch, or end what else runs on it"
    if _sticky(message):
        return (
            f"the GPU stopped with {found[0]} and this process cannot use it any more: run the same command again, and "
            "if it happens again check the GPU with nvidia-smi and dmesg"
        )
    return f"the GPU's driver refused a call ({found[0]}): run the same command again"


def _sticky(message: str) -> bool:
    return bool(_NAMED.search(message) or _NUMBERED.search(message))
