"""What a GPU has to show, in steps of minutes that one can stop and take up again: tests, kernels, whole updates, a profile.

launch/gpu_check.sh is the door. A step is a list of cases, each a process of its own that writes its own JSON. After every case
OUT/summary.json says what ran, and one archive holds everything but the traces. A case that is done is not run again: the same
command goes on where the last one stopped, and `--from ARCHIVE` takes up what another machine brought home.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unlearn_ds.bench.case_records import merged, read_summary, take_up
from unlearn_ds.bench.record import positive_int, write_json
from unlearn_ds.cluster.lifetime import start_tied
from unlearn_ds.options import OptionError, did_you_mean

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHIVE_BYTES = 15 << 20  # before compression; the largest files stay out where that is exceeded
WHOLE_MODEL_BYTES = 130 << 30  # of device memory, for all layers of Yi-6B: weights, gradients and optimizer are 101 GiB
KEPT_LINES = 4000  # of a log
_END_S = 5  # for a process that is told to stop

_FULL = ("--activation_checkpointing", "full")


@dataclass(frozen=True)
class Case:
    """One process: what it is called, what it runs, how long that takes on one Hopper GPU (an estimate, with its start)."""

    name: str
    words: tuple[str, ...]  # after `python -m`
    seconds: int


@dataclass(frozen=True)
class Step:
    """Cases that answer one question."""

    name: str
    about: str
    cases: tuple[Case, ...]

    @property
    def seconds(self) -> int:
        return sum(case.seconds for case in self.cases)


def _bench(name: str, seconds: int, command: str, *options: str) -> Case:
    return Case(name, ("unlearn_ds.cli", "bench", command, *options, "--json", f"{{out}}/{name}.json"), seconds)


def _tests(name: str, seconds: int, *words: str) -> Case:
    return Case(name, ("pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={{out}}/{name}.xml", *words), seconds)


def _update(name: str, seconds: int, on_cpu: bool, *options: str) -> Case:
    if on_cpu:
        shape = "--model tiny:1 --seq_len 64 --global_batch_size 4 --num_ranks 1 --warmup_steps 1 --steps 1"
    else:
        shape = "--model yi-6b:12 --seq_len 4096 --global_batch_size 8 --num_ranks 1 --warmup_steps 2 --steps 6"
    folders = ("--keep_logs", f"{{out}}/ranks/{name}", "--traces", f"{{out}}/traces/{name}")
    return _bench(name, seconds, "step", *shape.split(), *folders, *options)


def _kernels(vocab_size: int, ops: dict[str, int], on_cpu: bool) -> tuple[Case, ...]:
    cases = []
    for op, seconds in ops.items():
        shape = ("--device", "cpu", "--shapes", f"64,64,{vocab_size // 64}") if on_cpu else ()
        shape = shape or ("--shapes", f"16384,4096,{vocab_size}")
        repeats = "1" if on_cpu else "6"
        cases.append(
            _bench(f"kernels_{vocab_size}_{op}", seconds, "kernels", *shape, "--ops", op, "--repeats", repeats)
        )
    return tuple(cases)


def steps(on_cpu: bool) -> dict[str, Step]:
    """All steps in the order of what is wanted most; on CPU the same commands with small shapes."""
    ordered = [*_speed(on_cpu), *_correctness(on_cpu)]
    if on_cpu or torch.cuda.mem_get_info()[1] >= WHOLE_MODEL_BYTES:
        model = "tiny" if on_cpu else "yi-6b"
        ordered.append(Step("whole", "all layers of Yi-6B", (_update("whole", 120, on_cpu, *_FULL, "--model", model),)))
    return {step.name: step for step in ordered}


def _speed(on_cpu: bool) -> tuple[Step, ...]:
    device = "cpu" if on_cpu else "cuda"

    def update(name: str, seconds: int, *options: str) -> Case:
        return _update(name, seconds, on_cpu, *options)

    two = ("--per_device_train_batch_size", "2")
    kl = ("--method", "ascent_plus_kl_divergence")
    return (
        Step(
            "versions", "does the code fit what is installed", (_bench("versions", 30, "versions", "--device", device),)
        ),
        Step(
            "update",
            "an update of ours as it chooses itself; activations kept, recomputed, compiled; one and two rows",
            (
                update("auto", 40, "--activation_checkpointing", "auto", "--per_device_train_batch_size", "auto"),
                update("none_1", 40),
                update("full_1", 40, *_FULL),
                update("none_2", 40, *two),
                update("full_2", 40, *_FULL, *two),
                update("compiled_1", 65, "--torch_compile"),
                update("compiled_2", 65, "--torch_compile", *two),
            ),
        ),
        Step("baseline", "the published way beside ours, in one run", (update("baseline", 80, "--baseline", *_FULL),)),
        Step("kernels_64000", "loss ops beside every peer", _kernels(64000, {"cross_entropy": 60, "kl": 60}, on_cpu)),
        Step("kernels_128256", "the same", _kernels(128256, {"cross_entropy": 70, "kl": 70}, on_cpu)),
        Step(
            "kl",
            "KL with the reference live and cached, beside descent and the published way",
            (
                update("kl", 80, *kl, *_FULL, "--reference", "live", "cache"),
                update("descent", 40, "--method", "ascent_plus_descent", *_FULL),
                update("kl_baseline", 80, *kl, *_FULL, "--baseline"),
            ),
        ),
        Step(
            "profile",
            "the trace of an update of one micro-step",
            (update("profile", 40, "--global_batch_size", "2", "--steps", "2"),),
        ),
    )


def _correctness(on_cpu: bool) -> tuple[Step, ...]:
    def tests(name: str, seconds: int, words: str) -> Case:
        return _tests(name, seconds, *shlex.split("tests/model/test_attention.py -k choice" if on_cpu else words))

    first = (
        "tests/kernels/test_kernels_gpu.py tests/kernels/test_kernel_stats.py "
        "tests/model/test_attention.py tests/data/test_loader.py"
    )
    return (
        Step(
            "tests",
            "the kernels against fp64, attention, loader, on the device",
            (
                tests("tests_first", 180, f"{first} -k not\\ sanitizer"),
                tests("tests_grid", 150, "tests/kernels/test_kernels.py tests/kernels/test_kernel_sequence.py"),
            ),
        ),
        Step(
            "kernels_more",
            "the ops of which less depends",
            _kernels(64000, {"cross_entropy_half": 50, "npo": 35, "token_stats": 35}, on_cpu),
        ),
        Step(
            "sanitizer",
            "compute-sanitizer over our kernels",
            (tests("sanitizer", 150, "tests/kernels/test_kernels_gpu.py -k sanitizer"),),
        ),
    )


def run_case(case: Case, out: Path, limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run to the end or to the limit; its output goes to OUT/NAME.log and to the terminal's last lines if it fails."""
    words = [word.replace("{out}", str(out)) for word in case.words]
    started = time.monotonic()
    log = out / f"{case.name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = start_tied(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit_s:.0f} s"
            _stop(process)
    record = {"name": case.name, "exit_code": code, "seconds": round(time.monotonic() - started, 1)}
    if code != 0:
        record["reason"] = _tail(log)
    return record


def _stop(process: subprocess.Popen) -> None:
    """End a case with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_END_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _tail(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def pack(out: Path, target: Path) -> None:
    """Everything in OUT but traces and what is too large, as one archive; a long log keeps its end."""
    for log in out.rglob("*.log"):
        _shorten(log)
    files = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] != "traces"]
    files = [path for path in files if not path.name.endswith((".tar.gz", ".partial"))]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    room = ARCHIVE_BYTES
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(files, key=lambda path: (path.stat().st_size, path)):
            room -= path.stat().st_size
            if room < 0:
                print(f"not in the archive, too large: {path}")
                continue
            tar.add(path, str(path.relative_to(out)))
    partial.replace(target)


def _shorten(log: Path) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if len(lines) > KEPT_LINES:
        log.write_text("".join(lines[-KEPT_LINES:]), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `launch/gpu_check.sh`."""
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", default=Path("output/gpu_check"))
    parser.add_argument("device", nargs="?", default="cuda", help="cuda, or cpu: the same steps with small shapes")
    parser.add_argument("chosen", nargs="*", metavar="STEP", help="default: all, as far as the budget goes")
    parser.add_argument(
        "--budget_s",
        type=positive_int,
        help="stop in time for this; a case that would not fit is left for the next call",
    )
    parser.add_argument("--limit_s", type=positive_int, default=600, help="for one case (default: 600)")
    parser.add_argument(
        "--from", type=Path, dest="earlier", metavar="ARCHIVE", help="results.tar.gz of an earlier call"
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help="default: OUT/results.tar.gz")
    parser.add_argument("--again", action="store_true", help="run also what is done")
    parser.add_argument("--list", action="store_true", help="say what there is and how long it takes, and stop")


def main(args: argparse.Namespace) -> int:
    """Run what is chosen, not done and fits; 0 if everything that ran, before or now, succeeded."""
    started = time.monotonic()
    if args.device not in ("cuda", "cpu"):
        raise OptionError(f"gpu_check: device '{args.device}': cuda or cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"gpu_check: torch sees no CUDA device; 'bash launch/gpu_check.sh {args.out} cpu' checks the script alone"
        )
    known = steps(args.device == "cpu")
    for name in args.chosen:
        if name not in known:
            raise OptionError(f"gpu_check: step '{name}': one of {', '.join(known)}.{did_you_mean(name, known)}")
    chosen = [known[name] for name in args.chosen] or list(known.values())
    if args.list:
        for step in chosen:
            print(f"{step.name:<16}{step.seconds:>5} s  {step.about} ({', '.join(case.name for case in step.cases)})")
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    archive = args.archive or out / "results.tar.gz"
    records = (take_up(args.earlier, out) if args.earlier else {}) | read_summary(out)
    _describe_gpu(out)
    left = _run_steps(args, chosen, out, archive, records, started)
    if left:
        print(f"left for the next call: {', '.join(left)}")
    failed = [name for name, record in records.items() if record["exit_code"] != 0]
    print(f"{len(records)} cases, failed: {', '.join(failed) or 'none'}; {archive}")
    return 1 if failed else 0


def _run_steps(
    args: argparse.Namespace,
    chosen: list[Step],
    out: Path,
    archive: Path,
    records: dict[str, dict[str, Any]],
    started: float,
) -> list[str]:
    """Run the cases that are not done, adding to `records`; returns the names of those that the budget had no room for."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1"}
    if args.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    left = []
    for step in chosen:
        for case in step.cases:
            if not args.again and records.get(case.name, {}).get("exit_code") == 0:
                continue
            rest_s = (args.budget_s or float("inf")) - (time.monotonic() - started)
            if case.seconds > rest_s:
                left.append(case.name)
                continue
            print(f"== {step.name}: {case.name}, about {case.seconds} s", flush=True)
            record = {"step": step.name} | run_case(case, out, min(args.limit_s, rest_s), environment)
            broken = _brought_the_device_down(out, case.name)
            if broken:
                print(f"   {broken} brought the device down: again without it", flush=True)
                again = replace(case, words=(*case.words, "--without", broken))
                record = {"step": step.name} | run_case(again, out, args.limit_s, environment) | {"without": broken}
            records[case.name] = record
            print(f"   {record['seconds']} s, exit code {record['exit_code']}", flush=True)
            if "reason" in record:
                print(record["reason"], flush=True)
            write_json(out / "summary.json", list(records.values()), device=args.device, commit=_commit(), left=left)
            write_json(out / "results.json", merged(out, list(records)), device=args.device, commit=_commit())
            pack(out, archive)
    return left


def _brought_the_device_down(out: Path, name: str) -> str | None:
    """The contestant of a case after which the device answered no more."""
    return next((row.get("impl") for row in merged(out, [name]) if row.get("not_timed") == "device lost"), None)


def _commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    return answer.stdout.strip() or "unknown"


def _describe_gpu(out: Path) -> None:
    try:
        answer = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return
    (out / "gpu.txt").write_text(answer.stdout, encoding="utf-8")


if __name__ == "__main__":
    from unlearn_ds.options import run_with_arguments

    try:
        sys.exit(run_with_arguments(add_arguments, main, "gpu_check", __doc__, sys.argv[1:]))
    except ValueError as refused:
        print(refused, file=sys.stderr)
        sys.exit(2)
