"""SIGTERM and SIGHUP stop whatever runs as Ctrl-C does, and work that must not be halved ends its step first."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from mgn_deploy.interrupt import SIGNALS, DeferredInterrupt, Stopped, stop_on_signals
from mgn_deploy.packages import import_problem

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _handlers_are_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_what_runs_and_knows_the_shells_exit_code(number):
    with pytest.raises(KeyboardInterrupt) as stopped, stop_on_signals():
        signal.raise_signal(number)
    assert stopped.value.exit_code == EXIT_CODES[number]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_and_the_second_stops(number):
    with stop_on_signals(), DeferredInterrupt() as interrupt:
        assert not interrupt.wanted
        signal.raise_signal(number)
        assert interrupt.wanted == number
        with pytest.raises(Stopped):
            signal.raise_signal(number)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signals(), DeferredInterrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.wanted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_handle_no_signals():
    problems = []

    def work():
        try:
            with stop_on_signals(), DeferredInterrupt():
                pass
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not problems


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_ends_with_the_signals_exit_code_and_cleans_up(number):
    program = f"""
import signal, sys, typer
from mgn_deploy.cli.app import app

@app.command()
def wait():
    try:
        signal.raise_signal({int(number)})
    finally:
        print("cleaned up")

sys.argv = ["mgn-deploy", "wait"]
app()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODES[number], "cleaned up\n", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_within_an_import_acts_after_it(number, tmp_path, monkeypatch):
    (tmp_path / f"swallows{number}.py").write_text(  # as the initialisation of an extension module does
        f"import signal\ntry:\n    signal.raise_signal({int(number)})\n"
        "except KeyboardInterrupt as stopped:\n    raise ImportError('initialization failed') from stopped\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with stop_on_signals():
        with pytest.raises(Stopped):
            import_problem(f"swallows{number}", "cpu")
        assert import_problem(f"swallows{number}", "cpu") is None
