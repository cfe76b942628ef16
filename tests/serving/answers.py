"""Answers of an engine in a process of its own: python -m tests.serving.answers CHECKPOINT COUNT TOKENS OUT OPTIONS

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


def main(folder: Path, count: int, tokens: int, out: Path, options: dict[str, Any]) -> None:
    from tests.serving.engine import engine, metric, prompts, served

    llm = engine(folder, {"ratio": 0.5}, disable_log_stats=False, **options)
    answers = served(llm, folder, prompts(count), tokens=tokens)
    driver = getattr(llm.llm_engine.model_executor, "driver_worker", None)
    said = {
        "answers": [asdict(each) for each in answers],
        "runner": None if driver is None else type(driver.worker.model_runner).__module__,
        "preemptions": metric(llm, "vllm:num_preemptions"),
        "accepted": metric(llm, "vllm:spec_decode_num_accepted_tokens"),
    }
    out.write_text(json.dumps(said))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        let_triton_be_interpreted()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), json.loads(sys.argv[5]))
