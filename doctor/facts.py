"""Errors of attention packages that are known, as data with sources: how to tell them, what they mean, what helps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """An error that is known. `pattern` is searched for (ignoring case) in the error and the child's last words.

    packages: import names it is about; empty for any. install: whether another build of the package is the cure;
    else `cure` says in words what is.
    """

    name: str
    pattern: str
    text: str
    source: str
    packages: tuple[str, ...] = ()
    install: bool = True
    cure: str = ""


_FIELD = "github.com/Dao-AILab/flash-attention and github.com/thu-ml/SageAttention, issues on installation"
_TORCH_ABI = "PyTorch's C++ interface changes from version to version: pytorch.org/docs/stable/cpp_extension.html"

# The first that matches counts: special ones before general ones.
CAUSES: tuple[Cause, ...] = (
    Cause(
        "flash_schema",
        r"compatible aten::_flash_attention_forward schema|philox_seed.*philox_offset",
        "It comes with a copy of flash-attn (2.5.7) that was written for another version of PyTorch.",
        "raised by xformers' import of flash-attn 2.5.7; seen on Kaggle T4",
    ),
    Cause(
        "xformers_flash_range",
        r"Requires Flash-Attention version",
        "This xformers accepts only certain versions of flash-attn, and another one is installed beside it.",
        "github.com/facebookresearch/xformers, xformers/ops/fmha/flash.py",
        ("xformers",),
    ),
    Cause(
        "no_kernel_image",
        r"no kernel image is available|cudaErrorNoKernelImageForDevice",
        "It was built without code for this GPU's architecture.",
        "docs.nvidia.com, CUDA runtime API, cudaErrorNoKernelImageForDevice",
    ),
    Cause(
        "xformers_hopper",
        r"CUDA error.*invalid argument|hopper.*invalid argument",
        "xformers 0.0.30 to 0.0.32.post2 sends GPUs newer than Hopper to Hopper's kernels, which end the process.",
        "github.com/facebookresearch/xformers/issues/1251",
        ("xformers",),
    ),
    Cause(
        "ampere_only",
        r"only supports Ampere GPUs or newer",
        "FlashAttention 2 runs on sm_80 (Ampere) and newer, and this GPU is older.",
        "github.com/Dao-AILab/flash-attention, csrc/flash_attn/flash_api.cpp",
        install=False,
    ),
    Cause(
        "sage_arch",
        r"Unsupported CUDA architecture|SM\d+ kernel is not available",
        "This build of SageAttention does not know this GPU's architecture.",
        "github.com/thu-ml/SageAttention, sageattention/core.py",
        ("sageattention",),
    ),
    Cause(
        "other_torch",
        r"undefined symbol|DLL load failed.*procedure|Symbol not found",
        "Its compiled part was built for another version of PyTorch or of Python.",
        _TORCH_ABI,
    ),
    Cause(
        "missing_library",
        r"lib(cudart|cublas|nvrtc|torch)[\w.-]*\.so[.\d]*: cannot open shared object|DLL load failed",
        "A library that it was built against is not there: it was most likely built for another CUDA or PyTorch.",
        _FIELD,
    ),
    Cause(
        "glibc",
        r"GLIBC(XX)?_[\d.]+' not found",
        "It was built on a newer Linux than this one.",
        "ld.so(8): symbol versions",
    ),
    Cause(
        "compiled_part",
        r"No module named '(flash_attn_2_cuda|flash_attn_3\._C|fp4attn_cuda|fp4quant_cuda|sageattention\._\w+|"
        r"_qattn\w*|_fused\w*|xformers\._C\w*)'",
        "Its compiled part is missing: the build was not finished, or it was made for another Python.",
        _FIELD,
    ),
    Cause(
        "numpy_1",
        r"compiled using NumPy 1\.x cannot be run in",
        "It was compiled for NumPy 1, and NumPy 2 is installed.",
        "numpy.org/doc/stable/numpy_2_0_migration_guide.html",
    ),
    Cause(
        "old_driver",
        r"driver version is insufficient|PTX was compiled with an unsupported toolchain",
        "The GPU driver is older than the CUDA that this package was built with.",
        "docs.nvidia.com/deploy/cuda-compatibility",
        install=False,
        cure="Install a newer GPU driver.",
    ),
    Cause(
        "python_headers",
        r"Python\.h: No such file|cannot open include file: 'Python\.h'",
        "Triton compiles a small C file at its first use, and Python's headers are missing.",
        "github.com/woct0rdho/triton-windows (section on embedded Python); github.com/triton-lang/triton issues",
        install=False,
        cure="Install the headers of this Python (the python3-dev package of your Linux; on Windows with the embedded "
        "Python, the folders include and libs that triton-windows offers for it).",
    ),
    Cause(
        "c_compiler",
        r"Failed to find C compiler",
        "Triton needs a C compiler at its first use and found none.",
        "github.com/triton-lang/triton, python/triton/runtime/build.py",
        install=False,
        cure="Install a C compiler (gcc), or name one in the environment variable CC.",
    ),
    Cause(
        "old_ptxas",
        r"ptxas.*is not defined for option 'gpu-name'|ptxas fatal",
        "Triton's own assembler (ptxas) is older than this GPU.",
        "github.com/triton-lang/triton issues on sm_120 and sm_121",
        install=False,
        cure="Use a newer PyTorch with the Triton that belongs to it.",
    ),
    Cause(
        "triton_cache",
        r"triton.{0,200}cache.{0,200}(Error|denied|corrupt)|(Error|denied).{0,200}\.triton",
        "Triton's cache of compiled kernels cannot be used.",
        "github.com/triton-lang/triton, python/triton/runtime/cache.py",
        install=False,
        cure="Empty it: `attune cache clear --triton`. It is filled again by itself.",
    ),
    Cause(
        "other_triton",
        r"(cannot import name .* from|module|No module named) '?triton",
        "It was written for another version of Triton than the installed one.",
        "github.com/woct0rdho/triton-windows: each PyTorch needs its own Triton",
        install=False,
        cure="Install the Triton that belongs to this PyTorch.",
    ),
    Cause(
        "cudnn_plans",
        r"no valid execution plans",
        "cuDNN has no attention kernel for this GPU and this kind of call.",
        "github.com/pytorch/pytorch issues on cuDNN attention",
        ("torch",),
        install=False,
    ),
    Cause(
        "illegal_access",
        r"illegal memory access",
        "It read or wrote memory that is not its own. After that, nothing in the same process can use the GPU.",
        "docs.nvidia.com, CUDA runtime API, cudaErrorIllegalAddress; xformers' FlashAttention 3 does so on sm_89",
    ),
)

ADVICE = {
    "flash3": "FlashAttention 3 is for Hopper (H100, H200) alone.",
    "sage3": "SageAttention 3 is worth it only for long sequences (below about 1,000 tokens it is slower than SDPA) "
    "and many steps (20 or more, no 4-step LoRA).",
}
