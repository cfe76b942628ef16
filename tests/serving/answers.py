"""Answers of an engine in a process of its own.

    python -m tests.serving.answers CHECKPOINT HAWK COUNT TOKENS OUT OPTIONS      # HAWK: settings, or null without any

With TRITON_INTERPRET=1, vLLM's second model runner, whose kernels are Triton's, runs on a CPU.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def let_triton_be_interpreted() -> None:
    """vLLM takes Triton on a CPU only with a backend for it."""
    from triton.backends import backends

    known: dict[str, Any] = backends
    known["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def main(
    folder: Path, hawk: dict[str, Any] | None, count: int, tokens: int, out: Path, options: dict[str, Any]
) -> None:
    from tests.serving.engine import engine, metric, prompts, served

    llm = engine(folder, hawk, disable_log_stats=False, **options)
    answers = served(llm, folder, prompts(count), tokens=tokens)
    driver = getattr(llm.llm_engine.model_executor, "driver_worker", None)
    said = {
        "answers": [asdict(each) for each in answers],
        "plugged": "hawk_compile.serving.vllm.plugin" in sys.modules,
        "runner": None if driver is None else type(driver.worker.model_runner).__module__,
        "preemptions": metric(llm, "vllm:num_preemptions"),
        "accepted": metric(llm, "vllm:spec_decode_num_accepted_tokens"),
    }
    out.write_text(json.dumps(said))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        let_triton_be_interpreted()
    folder, hawk, count, tokens, out, options = sys.argv[1:]
    main(Path(folder), json.loads(hawk), int(count), int(tokens), Path(out), json.loads(options))
