"""int8 weights for exported decoders: ONNX Runtime's dynamic quantisation, as it stands."""

import tempfile
from pathlib import Path

METHODS = ("int8",)


def quantize(path: Path) -> None:
    """Replace an ONNX file by one whose products with weights hold int8 weights, one scale for each output channel.

    Activations are quantised as they come, so no calibration data is needed. The score's products are among them.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    data = path.with_name(f"{path.name}.data")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared, done = Path(folder) / "prepared.onnx", Path(folder) / path.name
        quant_pre_process(
            str(path), str(prepared), skip_symbolic_shape=True, skip_optimization=True, save_as_external_data=True,
            all_tensors_to_one_file=True,
        )  # fmt: skip
        quantize_dynamic(
            prepared, done, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True,
            op_types_to_quantize=["MatMul", "Gemm"], nodes_to_exclude=other_products(prepared),
        )  # fmt: skip
        done.replace(path)
        written = done.with_name(f"{done.name}.data")
        data.unlink(missing_ok=True)
        if written.is_file():
            written.replace(data)


def other_products(path: Path) -> list[str]:
    """The products whose right side is no matrix of weights, such as the angles of rotary positions."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [node.name for node in products if node.input[1] not in matrices]
