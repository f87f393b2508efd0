"""The kernels' suites run in processes of their own beside the other tests, one after the other, and `test_triton.py` waits for them."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


class Beside:
    """Groups of suites that were asked for, in a queue of one; `kill` ends the one that runs."""

    def __init__(self) -> None:
        self.pool, self.running, self.done = ThreadPoolExecutor(1), None, {}

    def start(self, suites: tuple[str, ...], noise: str) -> None:
        self.done[suites, noise] = self.pool.submit(self._run, suites, noise)

    def _run(self, suites: tuple[str, ...], noise: str) -> tuple[int, str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
                       "GROKKING_TEST_NOISE": noise}
        environment.pop("TRITON_INTERPRET", None)
        if os.environ.get("GROKKING_TEST_GPU") != "1":
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *(str(TESTS / suite) for suite in suites)]
        if noise:
            command += ["-m", "not bits"]
        self.running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = self.running.communicate()[0]
        return self.running.returncode, output

    def kill(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.running and self.running.poll() is None:
            self.running.kill()


@pytest.fixture(autouse=True)
def figures_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs a user a line is a fault here."""
    monkeypatch.setattr("lab.figures.FORGIVEN", ())


def pytest_configure(config: pytest.Config) -> None:
    config.beside = Beside()
    config.addinivalue_line("markers", "bits: of a kernel suite, what no arithmetic changes: equal bits and bookkeeping; run once")


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items if not session.config.option.collectonly else ():
        if item.path.name == "test_triton.py":
            session.config.beside.start(*(item.callspec.params[name] for name in ("suites", "noise")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.beside.kill()
