"""Pruned models outside PyTorch: what is exported, in which formats, and how it is run there.

    write.py       `export`: components, one after another, into a folder with a manifest
    settings.py    which settings an export takes
    components.py  what a component is, and how it is traced
    encoder.py, prefill.py, decode.py    the components of a model; the passes on the prefill's graph
    modules.py     one module of an encoder as a component
    bounds.py      towers that get sizes of images and bounds of segments beside their index
    recording.py   which modules encode, and what of them is read
    caches.py      what a cache holds, as tensors by name
    mixers.py      linear attention in chunks, as a scan
    parts.py, folder.py    a component written; a folder that is there whole or not at all
    formats.py     which formats there are
    onnx.py, aoti.py, openvino.py, tensorrt.py, executorch.py    one format each: write a component, open it
    weights.py     what two ONNX files have in common, written once
    quantize.py    int8 weights in ONNX files
    profile.py     sizes that TensorRT engines and ExecuTorch programs are built for
    manifest.py    what a folder holds
    runner.py      `load`: transformers' generate around the exported components
    check.py       does an export answer as PyTorch does

Tracing is done by `transformers.exporters` (5.23). What was wrapped there, and why:

- Its decomposition of a generative model leaves the merge outside its components, and misses the encoder, which
  generate runs ahead of the prefill. Components of our own go through its exporters instead.
- Its attention for towers over packed patches needs images of one size; with others ONNX gives wrong results and no
  error. `modules.py` hands segments over as an index instead.
- Towers that undo a permutation by argsort export a sort, which TensorRT limits; a permutation is undone by a scatter.
- Masks are built by broadcasting in the first trace too, as its ONNX patches do in theirs: no pass can work out shapes
  inside vmap. Its other ONNX patches stay away from the first trace, since they put copies of the mask behind the
  attention, where the passes take them for positions.
- A GraphModule is wrapped in a module (`Rewritten`): its exporters replace a module's forward.
- Its rewrite of a stable sort loses the node's value; `onnx.py` translates the sort itself.
- Its notices and torch.onnx's progress are hidden (`quiet.py`).
"""
