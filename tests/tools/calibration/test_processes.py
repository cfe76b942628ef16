"""Processes that calibrate together: the same bytes as one, killed and resumed, and failures that all hear of.

The two processes of the test get the environment that `accelerate launch` and `torchrun` make.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hawk_compile.errors import ConfigError, InputError
from hawk_compile.progress import Progress
from hawk_compile.tools.calibration import record
from hawk_compile.tools.calibration.calibrate import calibrate, check_alike
from hawk_compile.tools.calibration.processes import Processes, own_device
from tests.exporting import demo

ROOT = Path(__file__).parents[3]
SETTINGS = {"limit": 4, "batch": 1, "heads_at_once": 8, "ablation": "output", "metric": "likelihood"}


def calibrated(**settings):
    return calibrate(demo.model(), demo.processor(), "demo:calibration", **{**SETTINGS, **settings})


def killer(now: Progress) -> None:
    if now.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def member(folder: Path) -> None:
    """What one of two processes does; the main one is killed in the end. It alone knows what day it is."""
    number = Processes(torch.device("cpu")).number
    if number == 1:
        record.datetime = None
    told: list[tuple[int, int]] = []
    found = calibrated(progress_file=folder / "fresh", progress=lambda now: told.append((now.done, now.total)))
    found.write(folder / f"{number}.json")
    assert told == [(done, 4) for done in range(5)] * (number == 0)
    calibrated(progress_file=folder / "cut").write(folder / f"cut{number}.json")

    def metric(said, answers):
        if number == 1:
            raise RuntimeError("out of luck")
        return 1.0

    kind, match = [(InputError, r"^process 1 .*RuntimeError: out of luck"), (RuntimeError, "^out of luck")][number]
    with pytest.raises(kind, match=match):
        calibrated(metric=metric)
    with pytest.raises(ConfigError, match="got other seed in process 1 than in process 0"):
        calibrated(seed=number)
    with pytest.raises(InputError, match=["^progress_file", "^process 0 .*InputError: progress_file"][number]):
        calibrated(progress_file=folder / "no" / "folder")
    (folder / f"{number} ran").touch()
    calibrated(progress_file=folder / "killed", progress=killer)


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tmp_path):
    def cut(now):
        if now.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(progress_file=tmp_path / "cut", progress=cut)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": str(torch.get_num_threads())}  # fmt: skip
    code = "import sys, pathlib, tests.tools.calibration.test_processes as test; test.member(pathlib.Path(sys.argv[1]))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env={**common, "RANK": number, "LOCAL_RANK": number},
            stderr=subprocess.PIPE, text=True,
        )
        for number in ("0", "1")
    ]  # fmt: skip
    calibrated().write(tmp_path / "one.json")
    try:
        said = [each.communicate(timeout=120)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert all((tmp_path / f"{number} ran").exists() for number in range(2)), "\n".join(said)
    assert running[0].returncode == -signal.SIGKILL and running[1].returncode
    assert len((tmp_path / "killed").read_text().splitlines()) == 1 + 2
    calibrated(progress_file=tmp_path / "killed").write(tmp_path / "killed.json")
    wanted = (tmp_path / "one.json").read_bytes()
    for name in ("0", "1", "cut0", "cut1", "killed"):
        assert (tmp_path / f"{name}.json").read_bytes() == wanted, name


def test_two_members_tell_one_another(monkeypatch):
    """As processes do, but two threads that meet where accelerate would gather: texts of unequal length, failures."""
    met, parts, here = threading.Barrier(2, timeout=60), [None, None], threading.local()

    def gather(part):
        parts[here.number] = part
        met.wait()
        whole = torch.cat(parts)
        met.wait()
        return whole

    def state(cpu):
        assert cpu
        return SimpleNamespace(num_processes=2, process_index=here.number, device=torch.device("cpu"))

    def fail():
        raise RuntimeError("out of luck")

    def member(number):
        here.number = number
        own = Processes(torch.device("cpu"))
        assert (own.count, own.number, own.main) == (2, number, number == 0)
        assert own.share({"a": [0.1] * (1 + 5 * number), "b": "\u00e9"}) == [
            {"a": [0.1], "b": "\u00e9"}, {"a": [0.1] * 6, "b": "\u00e9"}
        ]  # fmt: skip
        assert own.each(lambda: 10 + number) == [10, 11]
        kind, match = [(InputError, r"^process 1 .*RuntimeError: out of luck"), (RuntimeError, "^out of luck")][number]
        with pytest.raises(kind, match=match):
            own.each(fail if number == 1 else lambda: 1)
        return True

    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setattr("accelerate.utils.gather", gather)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(member, range(2)))


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    alone = Processes(torch.device("cpu"))
    assert (alone.count, alone.main, alone.share({"a": [0.1]})) == (1, True, [{"a": [0.1]}])
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Processes(torch.device("cpu")).count == 1  # no launcher, which would set LOCAL_RANK
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (own_device("cuda"), own_device("cuda:0"), own_device(None)) == ("cuda:1", "cuda:0", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'WORLD_SIZE must be 1 .* got 2: pip install "hawk-compile\[distributed\]"'):
        Processes(torch.device("cpu"))


def test_what_processes_must_share():
    check_alike([{"batch": 8, "seed": 0}] * 3)
    with pytest.raises(ConfigError, match="got other batch, seed in process 2 than in process 0"):
        check_alike([{"batch": 8, "seed": 0}] * 2 + [{"batch": 4, "seed": 1}])
