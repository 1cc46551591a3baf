"""Chooses the library that multiplies float32 matrices on the CPU.

PyTorch multiplies float32 matrices by Intel's MKL. On AMD processors, MKL does not use AVX-512 instructions. oneDNN,
which PyTorch contains too, does. On an AMD EPYC its products take half of the time, with a similar rounding error
(benchmarks/README.md). On processors of Intel, MKL stays, because small products take longer with oneDNN.

PyTorch calls oneDNN for float32 matrices only if products may round their inputs to bfloat16 (precision "medium"). On
the EPYC, oneDNN nevertheless computes in float32. `choose` measures the error of small products, and keeps oneDNN only
if the error is that of float32.
"""
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ERROR = 2e-6
"""Largest relative error of a float32 product. MKL and oneDNN have 2.5e-7 and 3.9e-7 with 576 terms in each sum;
bfloat16 has 3e-3."""
SHAPES = ((1, 576, 192), (128, 576, 192))
"""Products that are tried: rows, terms of each sum, columns."""
CPUINFO = Path("/proc/cpuinfo")
AMD = "AuthenticAMD"
"""The vendor of AMD's processors, in the words of the processor."""
SHORT = 256
"""Largest number of tokens of a sequence for which `attention` avoids the fused attention."""


def choose() -> None:
    """Let oneDNN multiply float32 matrices in this process, if the processor is AMD's and the error is that of float32.

    Nothing changes if there is a GPU, because PyTorch's precision also holds for the GPU, or if the precision is
    already another one than PyTorch's default.
    """
    if not _amd() or torch.cuda.is_available() or _precision() != "highest":
        return
    torch.set_float32_matmul_precision("medium")
    if max(_error(*shape) for shape in SHAPES) > ERROR:
        torch.set_float32_matmul_precision("highest")


def attention(tokens: int) -> AbstractContextManager[object]:
    """A context for the forward passes of a training on sequences of `tokens` tokens.

    PyTorch's fused attention multiplies small blocks of matrices. With oneDNN, each of these products has a cost of its
    own. In this context, whole matrices are multiplied instead, in all threads of the process.
    """
    if tokens > SHORT or torch.cuda.is_available() or _precision() != "medium":
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def _amd() -> bool:
    """Whether the processor is AMD's. Linux names the vendor in a file, Windows in `platform.processor`."""
    return AMD in (CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else platform.processor())


def _precision() -> str:
    """PyTorch's precision of float32 products; empty if it was set by the newer settings of single libraries, which
    cannot be read in this way."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def _error(rows: int, terms: int, columns: int) -> float:
    """Relative error of a product of random matrices."""
    generator = torch.Generator().manual_seed(0)
    a_RT, b_TC = (torch.randn(*shape, generator=generator) for shape in ((rows, terms), (terms, columns)))
    exact_RC = a_RT.double() @ b_TC.double()
    return (((a_RT @ b_TC) - exact_RC).norm() / exact_RC.norm()).item()
