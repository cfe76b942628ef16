"""Every private name of torch, transformers, accelerate, PEFT and quantisers that is used, behind one that says why.

    dynamo.py      torch.compile: settings while a prefill is captured, backends, errors, AOTInductor's packages
    guards.py      what torch.compile's guards ask, and where
    models.py      transformers' models and caches, and the methods by which generate prepares a prompt
    accelerate.py  accelerate's hooks on a model's modules
    modes.py       what a call may run inside of: modes that see operators, tracers; hooks of every module
    peft.py        what PEFT puts on modules for one call, and how it reads weights
    quantisers.py  how layers of bitsandbytes, compressed-tensors and optimum-quanto are told
    exporters.py   transformers' exporters: their tables of patches and fixes

What passes and operators use stands beside them (`hawk_compile.passes.compat`, `hawk_compile.kernels.compat`). Each
name has a test in tests/test_compat.py, so that a new release fails there, by name; no other file may use one.
"""
