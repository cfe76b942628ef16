"""What a user sees of an error that nobody catches: the error itself at the end, and no dump of torch's before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 200

SCENE = """
import threading, torch, hawk_compile
from tests import zoo
from tests.runtime.models import picture

def branches(self, hidden_states, *args, **kwargs):
    if hidden_states.sum() > 0:
        hidden_states = hidden_states + 1
    return type(self).forward(self, hidden_states, *args, **kwargs)

def broken():
    model = zoo.build("llava", layers=2)
    layer = model.get_submodule("model.language_model.layers.1")
    layer.forward = branches.__get__(layer)
    return model

def wrong(scores):
    return scores[:, :1]

inputs = picture("llava")
"""

SCENES = {
    "in a forward": (
        "hawk_compile.optimize(broken(), ratio=0.5, backend='eager')(**inputs)",
        "hawk_compile.errors.CaptureError: the forward of LlavaForConditionalGeneration cannot be captured",
    ),
    "in generate, in a thread": (
        "model = hawk_compile.optimize(broken(), ratio=0.5, backend='eager')\n"
        "thread = threading.Thread(target=lambda: model.generate(**inputs, max_new_tokens=2))\n"
        "thread.start(); thread.join(); raise SystemExit(1)",
        "hawk_compile.errors.CaptureError: the forward of LlavaForConditionalGeneration cannot be captured",
    ),
    "in an export": (
        "hawk_compile.export(broken(), inputs, OUT, format='aoti', ratio=0.5)",
        "hawk_compile.errors.CaptureError: the component prefill cannot be captured",
    ),
    "in a pass": (
        "hawk_compile.optimize(zoo.build('llava'), ratio=0.5, backend='eager', selector=wrong)(**inputs)",
        "hawk_compile.passes.errors.GraphError: selector wrong must return a float tensor",
    ),
    "in the backend": (
        "torch.compile(zoo.build('llava'), backend='hawk', options={'ratio': 3}, dynamic=True)(**inputs)",
        "hawk_compile.errors.ConfigError: ratio is the fraction of visual tokens removed",
    ),
    "without a C++ compiler": (
        "hawk_compile.optimize(zoo.build('llava'), ratio=0.5)(**inputs)",
        "hawk_compile.errors.CompileError: the forward of LlavaForConditionalGeneration was captured",
    ),
}
"""What is run, and how the last line of stderr begins."""


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_the_error_ends_what_is_shown(scene: str, tmp_path: Path) -> None:
    code, expected = SCENES[scene]
    variables = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    if scene == "without a C++ compiler":
        variables["CXX"] = str(tmp_path / "none")
    script = SCENE + code.replace("OUT", repr(str(tmp_path / "out")))
    ran = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **variables}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    lines = ran.stderr.rstrip().splitlines()
    assert ran.returncode == 1 and lines[-1].startswith(expected), ran.stderr[-2000:]
    assert len(lines) < MOST_LINES, len(lines)
