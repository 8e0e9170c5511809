"""Requests to stop, one process: when the flag is set, when the process leaves at once, and with which code."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT
from unlearn_ds.cluster.signals import EXIT_RESUMABLE

PROGRAM = """
import time
from unlearn_ds.cluster.signals import StopRequest
stop = StopRequest()
if {deferred}:
    with stop.deferred():
        print("ready", flush=True)
        while not stop.name:
            time.sleep(0.01)
        print(stop.name, flush=True)
        time.sleep(30)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.fixture
def start():
    started = []

    def start(deferred: bool) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM.format(deferred=deferred)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_outside_the_loop_there_is_nothing_to_save(start, number):
    process = start(deferred=False)
    process.send_signal(number)
    assert process.wait(10) == EXIT_RESUMABLE
    assert f"{number.name}: nothing to save, leaving" in process.stderr.read()


def test_in_the_loop_the_flag_is_set_and_a_second_sigterm_leaves(start):
    process = start(deferred=True)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGTERM)  # the same request, delivered twice
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert "second SIGTERM: leaving at once, without saving" in process.stderr.read()
