"""A run's ranks on one machine or on several, from one command that hands on signals: what the launch scripts start.

    python -m unlearn_ds.cluster.launch --num_ranks 8 MODULE ARGUMENTS         (launch/train.sh)
    python -m unlearn_ds.cluster.launch --hostfile hosts MODULE ARGUMENTS      (launch/multinode.sh)

SIGUSR1 and SIGTERM reach every rank. When this process ends, however it ends, so do the ranks. On each machine DeepSpeed's
launcher starts them; no shell reads their arguments.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil

from unlearn_ds.cluster.hosts import Meeting, run_on_hosts
from unlearn_ds.cluster.lifetime import start_tied
from unlearn_ds.cluster.processes import deepspeed_command, free_port, rank_environment
from unlearn_ds.cluster.shared_memory import remove_buffers_of
from unlearn_ds.cluster.signals import EXIT_RESUMABLE


class Node:
    """The ranks of one machine under DeepSpeed's launcher."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        # A group of its own: what it starts can be ended with it, and Ctrl-C comes as the signal that this process hands on.
        self._process = start_tied(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self._stopped_early = False

    def signal(self, number: int) -> None:
        """Hand a signal to the ranks; without any yet there is nothing to save, and the launcher ends."""
        with contextlib.suppress(psutil.Error):
            ranks = psutil.Process(self._process.pid).children()
            for rank in ranks:
                with contextlib.suppress(psutil.Error):
                    rank.send_signal(number)
            if not ranks:
                self._stopped_early = True
                self.kill()

    def kill(self) -> None:
        """End the launcher and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, once no process is left: that of the first rank that failed."""
        code = self._process.wait()
        self.kill()  # what the ranks may have left
        if self._stopped_early:
            return EXIT_RESUMABLE
        return code if code >= 0 else 128 - code


def run_here(module: str, arguments: Sequence[str], num_ranks: int, port: int | None) -> int:
    """Run `num_ranks` ranks of `module` on this machine; the exit code."""
    port = port or free_port()
    node = Node(deepspeed_command(module, arguments, {"localhost": num_ranks}, port=port), rank_environment())

    def hand_on(number: int, frame: FrameType | None) -> None:
        node.signal(signal.SIGTERM if number == signal.SIGINT else number)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    code = node.wait()
    remove_buffers_of("127.0.0.1", port, range(num_ranks))
    return code


def run_as_one_of_several() -> int:
    """The far end of `run_on_hosts`: what to run comes on standard input, then a line a signal; its end ends the ranks."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    os.environ.update(order["environment"])
    meeting = Meeting(**order["meeting"])
    command = deepspeed_command(
        order["module"], order["arguments"], meeting.slots, meeting.port, meeting.address, order["node_rank"]
    )
    node = Node(command, rank_environment(one_machine=False))

    def listen() -> None:
        for line in sys.stdin:
            node.signal(signal.Signals[line.strip()])
        node.kill()

    threading.Thread(target=listen, daemon=True).start()
    code = node.wait()
    remove_buffers_of(meeting.address, meeting.port, range(sum(meeting.slots.values())))
    return code


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser("unlearn_ds.cluster.launch", description=__doc__, allow_abbrev=False)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--num_ranks", type=int, help="ranks on this machine")
    where.add_argument("--hostfile", help="machines, a line each: NAME slots=GPUS")
    where.add_argument("--node", action="store_true", help="one of several, told what to do on standard input")
    parser.add_argument("--master_addr", help="of the first machine (default: what `hostname -I` says there)")
    parser.add_argument("--master_port", type=int, help="of the rendezvous there (default: a free one, or any)")
    parser.add_argument("--ssh_port", type=int, help="of the ssh servers (default: ssh's)")
    parser.add_argument("--export", help="names of variables that the ranks get")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the module and its arguments")
    args = parser.parse_args(argv)
    if args.node:
        return run_as_one_of_several()
    if not args.command:
        parser.error("MODULE is missing: what the ranks run")
    module, *arguments = args.command
    if args.num_ranks is not None:
        return run_here(module, arguments, args.num_ranks, args.master_port)
    try:
        return run_on_hosts(args, module, arguments)
    except ValueError as error:
        print(f"unlearn-ds: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
