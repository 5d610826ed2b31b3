"""Exit codes, messages and tracebacks of the program, whatever the command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

import magic_fast as mf
from magic_fast.cli import doctor, main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            mf.InputError("x for y: expected a, got b. Do c."),
            2,
            "error: x for y: expected a, got b.",
        ),
        (mf.CheckpointError("bad file"), 2, "error: bad file"),
        (mf.OutputError("disk full"), 2, "error: disk full"),
        (mf.InternalError("ours"), 1, "error: ours"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 2, "No space left on device: f"),
        (MemoryError(), 2, "error: out of memory"),
        (ZeroDivisionError("oh"), 1, "internal error, ZeroDivisionError: oh. This is our fault"),
        (KeyboardInterrupt(), 130, "magic-fast: interrupted"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_error_becomes_exit_code(
    error: BaseException,
    code: int,
    message: str,
    debug: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert main(["doctor", *(["--debug"] if debug else [])]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert ("Traceback" in captured.err) is debug


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["blend"], "invalid choice: 'blend'"),
        (["merge", "c.yml"], "OUT"),
        (["merge", "c.yml", "out", "--max-shard-size", "5XB"], "expected a positive number"),
        (["merge", "c.yml", "out", "--dry"], "unrecognized arguments: --dry"),
        (["calibrate", "out"], "--base"),
        (
            ["calibrate", "--base=b", "--experts=e", "--merged=m", "--clamp=1", "out"],
            "expected LOW,HIGH or none",
        ),
        (["inspect", "--base=b", "--experts=e", "--top=0"], "whole number of at least 1"),
    ],
)
def test_usage_errors_are_the_users(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"magic-fast {mf.__version__}\n"


def test_termination_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(doctor, "run", lambda arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "magic-fast: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_went_away_is_no_error() -> None:
    """As in ``magic-fast doctor | head -0``."""
    command = [sys.executable, "-m", "magic_fast", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        messages = program.stderr.read()
    assert program.returncode == 0
    assert messages == b""


def test_a_command_imports_only_its_own_module() -> None:
    """What starts is what was asked for: the others' modules are not loaded."""

    program = (
        "import sys; from magic_fast.cli import main\n"
        "try: main(['verify', '--help'])\n"
        "except SystemExit: pass\n"
        "loaded = {m.rpartition('.')[2] for m in sys.modules if m.startswith('magic_fast.cli.')}\n"
        "print(sorted(loaded & {'merge', 'sweep', 'demo', 'doctor', 'verify'}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "['verify']"


def test_the_collector_is_put_back() -> None:
    import gc

    before = gc.get_threshold()
    with pytest.raises(SystemExit):
        main(["no-such-command"])
    assert gc.get_threshold() == before and gc.isenabled()
