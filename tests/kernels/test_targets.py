"""Every kernel compiles to machine code for each GPU generation, from the arguments with which its launcher runs it."""

import importlib
import re

import pytest
import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from hawk_compile.kernels.score import triton_query

# Bytes of shared memory that a block of threads may have (CUDA C++ programming guide, "technical specifications").
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
SIZE, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 4096, 3584, 28, 4, 128


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def masks():
    return meta(1, SIZE, dtype=torch.bool), meta(1, SIZE, dtype=torch.bool)


def folded(dtype, normalization):
    return (
        meta(1, SIZE, WIDTH, dtype=dtype),
        *masks(),
        meta(HEADS * HEAD_DIM, WIDTH, dtype=dtype),
        meta(HEADS * HEAD_DIM, dtype=dtype),
        meta(KV_HEADS * HEAD_DIM, WIDTH, dtype=dtype),
        meta(KV_HEADS * HEAD_DIM, dtype=dtype),
        meta(HEADS, dtype=torch.float32),
        normalization,
    )


def projected(dtype):
    query, key = (meta(1, n, SIZE, HEAD_DIM, dtype=dtype) for n in (HEADS, KV_HEADS))
    return query, key, *masks(), meta(HEADS, dtype=torch.float32), "l2"


def select():
    return meta(1, SIZE, dtype=torch.float32), *masks(), meta(1, dtype=torch.int64), 1024


def greedy(rule):
    features, importance = meta(2, SIZE, WIDTH, dtype=torch.bfloat16), meta(2, SIZE, dtype=torch.float32)
    return features, importance, meta(2, SIZE, dtype=torch.bool), meta(2, dtype=torch.int64), rule, 0.5, 132


def gather(dtype, *trailing):
    return meta(1, SIZE, *trailing, dtype=dtype), meta(1, 1024, dtype=torch.int64)


ALL = {"_sum_voters", "_average", "_project", "_fold", "_raw_scores", "_statistics", "_combine"}
# The kernels whose code differs from bf16's in more than a conversion: another product, another normalisation.
PART = {"_raw_scores", "_statistics", "_combine"}
LAUNCHES = {
    "folded-bf16": ("score.launch_folded", folded(torch.bfloat16, "l2"), ALL),
    "folded-fp16": ("score.launch_folded", folded(torch.float16, "softmax"), PART),
    "folded-fp32": ("score.launch_folded", folded(torch.float32, "minmax"), PART),
    "projected-bf16": ("score.launch_projected", projected(torch.bfloat16), {"_average", "_raw_scores"}),
    "greedy-mmr": ("greedy.launch_greedy_order", greedy("mmr"), {"_take"}),
    "greedy-dpp": ("greedy.launch_greedy_order", greedy("dpp"), {"_take"}),
    "select": ("select.launch_select", select(), {"_select_row"}),
    "gather-bf16": ("gather.launch_gather", gather(torch.bfloat16, WIDTH), {"_copy_rows"}),
    "gather-bool": ("gather.launch_gather", gather(torch.bool), {"_copy_rows"}),
    "gather-int64": ("gather.launch_gather", gather(torch.int64), {"_copy_rows"}),
}


@pytest.fixture
def record(monkeypatch):
    """`record("score.launch_folded", arguments)`: the kernels it would launch, each with its arguments by name."""

    def run(launcher, arguments):
        operator, function = launcher.split(".")
        module = importlib.import_module(f"hawk_compile.kernels.{operator}.triton_kernel")
        calls = []

        class Recorder:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                return lambda *a, **k: calls.append(
                    (self.kernel, {**dict(zip(self.kernel.arg_names, a, strict=False)), **k})
                )

        for each in (module, triton_query):
            monkeypatch.setattr(each, "wrap_triton", Recorder)
        getattr(module, function)(*arguments)
        return calls

    return run


def as_launched(kernel, arguments):
    """(source, options) as the launch has them: 1 becomes a constant, multiples of 16 and pointers are aligned."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (parameter.name not in constants and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return ASTSource(kernel, signature, constants, attributes), options


def compile_kernel(kernel, arguments, target):
    source, options = as_launched(kernel, arguments)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def first_code(kernel, arguments):
    """Triton's own code of a kernel, as written: nothing is compiled any further."""
    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source, options = as_launched(kernel, arguments)
    options = backend.parse_options(options)
    builders = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target, options, *builders, context))


@pytest.mark.parametrize("target", SHARED_MEMORY)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for(name, target, record):
    launcher, arguments, wanted = LAUNCHES[name]
    calls = [(kernel, named) for kernel, named in record(launcher, arguments) if kernel.__name__ in wanted]
    assert {kernel.__name__ for kernel, _ in calls} == wanted
    for kernel, named in calls:
        compiled = compile_kernel(kernel, named, target)
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= SHARED_MEMORY[target]


def strided(dtype, *shape):
    """A tensor whose last dimension is not dense, as of something larger or transposed."""
    return meta(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


STRIDED = {
    "score": ("score.launch_folded", tuple(strided(each.dtype, *each.shape) if isinstance(each, Tensor)
                                           and each.dim() > 1 else each for each in folded(torch.bfloat16, "l2"))),
    "select": ("select.launch_select", (strided(torch.float32, 1, SIZE), *masks(), meta(1, dtype=torch.int64), 1024)),
    "greedy": ("greedy.launch_greedy_order", (strided(torch.bfloat16, 2, SIZE, WIDTH), *greedy("dpp")[1:])),
    "gather": ("gather.launch_gather", (strided(torch.bfloat16, 1, SIZE, WIDTH), meta(1, 1024, dtype=torch.int64))),
}  # fmt: skip


@pytest.mark.parametrize("name", STRIDED)
def test_no_stride_is_multiplied_in_32_bits(name, record):
    """A position or a column times its stride passes 2^31 in a prompt of 65,536 positions and 32,768 columns."""
    launcher, arguments = STRIDED[name]
    strides = 0
    for kernel, given in record(launcher, arguments):
        assert narrow_products(first_code(kernel, given)) == [], kernel.__name__
        strides += sum(parameter.name.endswith(STRIDES) and given[parameter.name] != 1 for parameter in kernel.params)
    assert strides > 0


def test_a_narrow_product_is_seen():
    code = """
      %d = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
      %wide = tt.splat %values_column : i32 -> tensor<64xi32>
      %at = arith.muli %d, %wide : tensor<64xi32>
      %ok = arith.muli %row, %other : tensor<64xi64>
    """
    assert narrow_products(code) == ["%at = arith.muli %d, %wide : tensor<64xi32>"]


STRIDES = ("_batch", "_head", "_row", "_column")


def narrow_products(code):
    """Lines of Triton's code that multiply with a stride, an argument of the kernel, in 32 bits."""
    lines = [line.strip() for line in code.splitlines()]
    holding = set()  # values that are a stride, for each element the same
    found = []
    for line in lines:
        result, _, operation = line.partition(" = ")
        operands = re.findall(r"%[A-Za-z_]\w*", operation)
        named = [each for each in operands if each.endswith(STRIDES) or each in holding]
        if named and operation.startswith(("tt.splat", "tt.broadcast", "tt.expand_dims")):
            holding.add(result)
        elif named and operation.startswith("arith.muli") and "i32" in operation.split(" loc(")[0]:
            found.append(line)
    return found
