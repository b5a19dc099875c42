"""What to say where DeepSpeed's CPU Adam cannot be built: it is compiled at its first use."""

from __future__ import annotations

import shutil
import subprocess

from megatron_lpa.errors import TryAgain, UserError, causes
from megatron_lpa.files import LASTING

_HEAD, _TAIL = 200, 400  # of a compiler's words: the command is at the beginning, the error at the end
_CLASSES = ("MissingCUDAException", "CUDAMismatchException")
_NINJA = ("ninja not being installed", "Ninja is required")
_WORDS = (
    "CUDA_HOME", "not being compatible due to hardware/software", "command not found", ": not found",
    "fatal error: cu", "cannot find -l", "cannot open shared object file: No such file",
)  # fmt: skip


def not_built(error: Exception, where: str | None) -> UserError:
    """What to raise: a UserError where a toolkit or a compiler is missing, TryAgain for everything else.

    A full disk, a server that does not answer and a compiler that was killed may all be gone at the next
    attempt.

    Args:
        error: what building raised.
        where: the configuration that asks for it.
    """
    words = " ".join(str(error).split())
    if len(words) > _HEAD + _TAIL:
        words = f"{words[:_HEAD]} ... {words[-_TAIL:]}"
    said = f"{where}: DeepSpeed's CPU Adam cannot be built: {type(error).__name__}: {words}"
    if _lasts(error):
        return UserError(
            f"{said}; install the CUDA toolkit that PyTorch was built for, a C++ compiler and ninja, or "
            "choose a configuration without offload"
        )
    return TryAgain(
        f"{said}; this may be gone at the next start: look at the disk and at the memory of this machine"
    )


def _lasts(error: Exception) -> bool:
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in LASTING:
            return False
        if isinstance(cause, subprocess.CalledProcessError) and cause.returncode < 0:
            return False
    text = str(error)
    if any(words in text for words in _NINJA):
        return shutil.which("ninja") is None  # one that is there could not be started
    if any(type(cause).__name__ in _CLASSES or isinstance(cause, OSError) for cause in chain):
        return True
    return "No space left" not in text and any(words in text for words in _WORDS)
