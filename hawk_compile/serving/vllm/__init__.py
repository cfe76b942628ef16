"""Pruning inside vLLM: a plugin that it finds by itself (the entry point `vllm.general_plugins`).

    vllm serve CHECKPOINT --hf-overrides '{"hawk": {"ratio": 0.8}}'

    the configuration   with `hawk` in it, the checkpoint is served by a class of ours over vLLM's own    plugin.py
    the processor       finds each item's question, shortens its placeholders, and makes question and
                        settings part of its identity, so that every cache of the engine tells items
                        of different questions apart                                                       processor.py
    the model           scores the visual tokens of an item as it leaves the encoder, and returns the
                        best of them with the positions that they had                                      model.py

Without `hawk` in the configuration vLLM's own classes serve, untouched. Names that are vLLM's private ones stand in
compat/. An item is an image or a video.
"""
