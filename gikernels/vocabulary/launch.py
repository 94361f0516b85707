"""How a kernel over tiles of logits is launched: block shapes, arguments, and cuBLAS's share.

Read downward: block shapes, arguments of a launch, products, cases for ahead-of-time compilation.
Importing this module imports triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gikernels.backends import dispatch

GROUP = 16  # row blocks that share a slab of the weight: 16 x 128 x 4096 bf16 are 16 MB of hidden


class Blocks(NamedTuple):
    """The shape of a program's tile of logits and how it is run."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    parts: int  # in which an epilogue of many registers takes the columns
    tma: bool  # whether operands are read through descriptors: a product of aligned rows
    # Whether the loops over tiles and depth become one, so that loads run on from tile to tile. Two
    # upstream reports say that it can lose on Hopper; bench.gpu times both.
    flatten: bool = False


def blocks(arch: int | str, itemsize: int, products: int, aligned: bool) -> Blocks:
    """For compute capability `arch` (90), "gfx942", or "interpreter"; `products` accumulators live.

    A table and no autotuning: the same call gives the same bits, and a run starts at once. A stage
    holds (rows + cols) * depth elements in shared memory, of which there are 227 KB on 90 and 100,
    163 KB on 80, 99 KB on 86, 89 and 120, 64 KB on gfx942. The accumulators of two products of
    128 x 256 would not fit into 255 registers a thread.
    """
    tma = aligned and (arch == "interpreter" or (isinstance(arch, int) and arch >= 90))
    if arch == "interpreter":
        return Blocks(32, 128, 32, 4, 1, 2, tma)
    if itemsize == 4:  # exact fp32 products run on the ordinary cores, from registers
        return Blocks(64, 64, 16, 8, 2, 2, tma)
    if arch in (90, 100, 103) and tma:
        return Blocks(128, 256 // products, 64, 8, 4, 4 // products, tma)
    if arch in (80, 90, 100, 103):
        # One stage is in registers while the others are on their way: 3 x 32 KB, or 3 x 16 KB.
        return Blocks(128, 128 // products, 64 if aligned and products == 1 else 32, 8, 4, 2, tma)
    return Blocks(128, 128 // products, 32, 8, 3 if isinstance(arch, int) else 2, 2, tma)


def blocks_for(
    x: Tensor, w: Tensor, ref_x: Tensor | None = None, ref_w: Tensor | None = None
) -> Blocks:
    given = [t for t in (x, w, ref_x, ref_w) if t is not None]
    aligned = all(map(_tma_can_read, given))
    return blocks(arch_of(x.device), max(t.element_size() for t in given), len(given) // 2, aligned)


def arch_of(device: torch.device) -> int | str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def ptx(x: Tensor) -> bool:
    """Whether kernels may speak PTX: on a GPU by NVIDIA, and not in the interpreter."""
    return x.is_cuda and torch.version.hip is None


def programs(device: torch.device, items: int) -> int:
    """Persistent programs: one for each multiprocessor."""
    if device.type == "cpu":
        return min(items, 3)
    return min(items, torch.cuda.get_device_properties(device).multi_processor_count)


# --- arguments of a launch ----------------------------------------------------------------------


def transform_constants(
    logit_scale: float, softcap: float | None, temperature: float
) -> tuple[float, float]:
    """(inner, outer) of `final_logits`. Per-row temperatures divide `outer` in the kernel."""
    if softcap is None:
        return logit_scale, 1 / temperature
    return logit_scale / softcap, softcap / temperature


def precision(dtype: torch.dtype) -> str:
    """fp32 products as exact as the user has asked PyTorch's own to be; no effect on 16 bits."""
    return "ieee" if dtype != torch.float32 or dispatch.exact_fp32() else "tf32"


def product_arguments(prefix: str, x: Tensor, w: Tensor, block: Blocks) -> dict[str, Any]:
    """A kernel's arguments for one `product_tile`, each name after `prefix`.

    Descriptors are made by the host: one made in a kernel needs an allocator that autograd's
    threads lose.
    """
    values: dict[str, Any] = {
        "x": TensorDescriptor.from_tensor(x, [block.rows, block.depth]) if block.tma else x,
        "w": TensorDescriptor.from_tensor(w, [block.cols, block.depth]) if block.tma else w,
        "D": x.shape[1],
        "x_n": x.stride(0),
        "x_d": x.stride(1),
        "w_v": w.stride(0),
        "w_d": w.stride(1),
        "PRECISION": precision(x.dtype),
    }
    return {prefix + name: value for name, value in values.items()}


def contiguous(x: Tensor | None) -> Tensor | None:
    """Vectors are read at stride 1; hidden states and weights at whatever strides they have."""
    return None if x is None else x.contiguous()


def launch_arguments(
    block: Blocks,
    x: Tensor,
    w: Tensor,
    ref_x: Tensor | None = None,
    ref_w: Tensor | None = None,
) -> dict[str, Any]:
    """A kernel's arguments that say what is multiplied, and how; `ref_*` with a reference only."""
    given: dict[str, Any] = {
        "N": len(x),
        "V": len(w),
        "ROWS": block.rows,
        "COLS": block.cols,
        "DEPTH": block.depth,
        "GROUP": GROUP,
        "TMA": block.tma,
        "PTX": ptx(x),
        "FLATTEN": block.flatten,
        "num_warps": block.num_warps,
        "num_stages": block.num_stages,
        **product_arguments("", x, w, block),
    }
    if ref_x is None or ref_w is None:
        return given
    return given | product_arguments("ref_", ref_x, ref_w, block)


def _tma_can_read(x: Tensor) -> bool:
    row_bytes = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and row_bytes > 0 and row_bytes % 16 == 0 and x.data_ptr() % 16 == 0


# --- products -----------------------------------------------------------------------------------


def scratch_dtype(hidden: Tensor) -> torch.dtype:
    """Of dZ, which the products want in the dtype of their other operand. The interpreter truncates
    fp32 to bf16 where a GPU rounds, so there it stays fp32."""
    return hidden.dtype if hidden.is_cuda else torch.float32


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in fp32, also of 16-bit matrices."""
    if a.dtype == b.dtype == torch.float32:
        out.addmm_(a, b)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def new_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, also of 16-bit matrices."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, accumulated in fp32 and rounded once."""
    if not out.is_cuda:
        out.copy_(a.float() @ b.float())
        return
    # cuBLAS cuts the long dimension where the output is too small to fill the GPU, and adds the
    # parts in 16 bits unless the output is fp32. 2^24 elements are 512 tiles of 128 x 256.
    if out.dtype != torch.float32 and out.numel() < 1 << 24:
        out.copy_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        torch.mm(a, b, out=out)


class Gradients:
    """Of hidden, weight and bias, added up from dZ of one chunk of rows after the other. dX and db
    are fp32; so is dW while several chunks are added, and that of fp16, which is scaled later."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunks: int, wanted: list[bool]) -> None:
        self.weight, self.wanted = weight, wanted
        self.exact = chunks > 1 or weight.dtype == torch.float16
        self.dx = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wanted[0] else None
        self.dw: Tensor | None = None
        self.db = hidden.new_zeros(len(weight), dtype=torch.float32) if wanted[2] else None

    def add(self, rows: slice | Tensor, x: Tensor, dz: Tensor) -> None:
        """dZ (n, V) of hidden states x (n, D), which are those at `rows`."""
        if self.dx is not None:
            self.dx[rows] = new_product(dz, self.weight)
        if self.wanted[1] and self.dw is not None:
            add_product(self.dw, dz.T, x)
        elif self.wanted[1] and self.exact:
            self.dw = new_product(dz.T, x)
        elif self.wanted[1]:
            self.dw = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
            write_product(self.dw, dz.T, x)
        if self.db is not None:
            self.db += dz.sum(0, dtype=torch.float32)

    def all(self) -> list[Tensor | None]:
        if self.wanted[1] and self.dw is None:  # no row has a gradient
            self.dw = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        return [self.dx, self.dw, self.db]


# --- ahead-of-time compilation ------------------------------------------------------------------


def aot_case(
    fn: Any,
    name: str,
    arch: int | str,
    others: dict[str, str],
    dtype: str = "bf16",
    ref: bool = False,
    softcap: bool = False,
    bias: bool = False,
    temperatures: bool = False,
    aligned: bool = True,
    constexprs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What triton.compile needs for a kernel over `product_tile`, at its default configuration.

    `others` are the types of the kernel's own arguments. Divisibility is declared as a launch at
    D 4096, V 128256 would find it: every pointer and every size that it is allowed to look at.
    """
    block = blocks(arch, 4 if dtype == "fp32" else 2, 2 if ref else 1, aligned)
    constexprs = {
        "SOFTCAP": softcap,
        "PARTS": block.parts,
        "PTX": isinstance(arch, int),
        "FLATTEN": block.flatten,
        "ROWS": block.rows,
        "COLS": block.cols,
        "DEPTH": block.depth,
        "GROUP": GROUP,
        "TMA": block.tma,
        "PRECISION": "ieee",
        "ref_PRECISION": "ieee",
        **(constexprs or {}),
    }

    def operand(rows: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {block.depth}]>" if block.tma else f"*{dtype}"

    types = {
        "x": operand(block.rows),
        "w": operand(block.cols),
        "targets": "*i64",
        "bias": f"*{dtype}" if bias else None,
        "temperatures": "*fp32" if temperatures else None,
        "ref_x": operand(block.rows) if ref else None,
        "ref_w": operand(block.cols) if ref else None,
        "dz": f"*{dtype}",
        "inner": "fp32",
        "outer": "fp32",
        **others,
    }
    # The strides of the last dimension are 1, as a launch would find.
    constexprs |= {k: 1 for k in fn.arg_names if k.endswith(("x_d", "w_d"))}
    constexprs |= {k: None for k, v in types.items() if v is None and k in fn.arg_names}
    signature = {k: "constexpr" if k in constexprs else types.get(k) or "i32" for k in fn.arg_names}
    ragged = () if aligned else ("D", "x_n", "w_v")
    ragged += tuple(p.name for p in fn.params if p.do_not_specialize)
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (k, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and k not in ragged)
    }
    constexprs = {k: v for k, v in constexprs.items() if k in fn.arg_names}
    return {
        "fn": fn,
        "name": name,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "num_warps": block.num_warps,
        "num_stages": block.num_stages,
    }
