"""Do the whole experiment of benchmarks/hopper.md, one step after the other, whatever a step says.

    python benchmarks/hopper/run.py OUT --pieces FOLDER [--work FOLDER] [--limit SECONDS]
    python benchmarks/hopper/run.py --dry

OUT gets a log of each step, the results and run.json; large files stay in the work folder. No step may take longer than
its own limit, nor all of them longer than --limit. --dry runs what can run without a GPU, in a temporary folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEAN_VERSIONS = ("10.16.1.11", "11.4.0.106")
PLANS = ("with-lean", "without-lean")
LIMIT_S = 540


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, what it needs in its environment, and for how many seconds it may run."""

    name: str
    command: Sequence[str | Path]
    limit_s: int
    environment: dict[str, str] = field(default_factory=dict)


def join(*paths: Path | str) -> str:
    """Join folders as PATH does; leave out what is empty."""
    return ":".join(str(path) for path in paths if str(path))


def plan_steps(out: Path, pieces: Path, work: Path) -> Iterator[Step]:
    """List the steps. Those with the likeliest answers come first."""
    tensorrt, python310 = work / "tensorrt-8.6.0", work / "python310"
    old = {
        "PYTHONHOME": str(python310),
        "PYTHONPATH": str(tensorrt),
        "LD_LIBRARY_PATH": join(python310 / "lib", tensorrt / "tensorrt", tensorrt / "stubs"),
        "CUDA_MODULE_LOADING": "LAZY",
    }
    outer = os.environ.get("PYTHONPATH", "")  # torch may come from there
    own = {"PYTHONPATH": join(ROOT / "runtime", ROOT, outer)}
    yield Step(name="machine", command=("nvidia-smi",), limit_s=20)
    unpack = 'mkdir -p "$2" && cat "$1"/tensorrt-8.6.0-sm*.tar.xz.* | tar xJ -C "$2"'
    yield Step(name="unpack-tensorrt", command=("bash", "-euc", unpack, "-", pieces, tensorrt), limit_s=90)
    unpack = 'mkdir -p "$2" && tar xJf "$1"/python310.tar.xz -C "$2"'
    yield Step(name="unpack-python", command=("bash", "-euc", unpack, "-", pieces, python310), limit_s=30)
    command: tuple[str | Path, ...]
    yield Step(name="graph", command=(sys.executable, HERE / "graph17.py", work), limit_s=120, environment=own)
    old_python = python310 / "bin" / "python3.10"
    for plan in reversed(PLANS):
        command = (old_python, HERE / "build_version_compatible.py", work, plan)
        yield Step(name=f"build-{plan}", command=command, limit_s=200, environment=old)
    for plan in PLANS:
        command = (old_python, HERE / "run_own.py", work, plan, out / f"own-{plan}.json")
        yield Step(name=f"own-{plan}", command=command, limit_s=60, environment=old)
    command = (sys.executable, HERE / "compare.py", work, out / "compare.json")
    yield Step(name="compare", command=command, limit_s=40, environment=own)
    for version in LEAN_VERSIONS:
        lean = work / f"lean-{version}"
        environment = {
            "PYTHONPATH": join(lean, ROOT / "runtime", ROOT, outer),
            "LD_LIBRARY_PATH": str(lean / "tensorrt_lean_libs"),
            "PYTHONFAULTHANDLER": "1",
        }
        for plan in PLANS:
            name = f"lean-{version}-{plan}"
            command = (sys.executable, HERE / "run_lean.py", work, plan, out / f"{name}.json")
            yield Step(name=name, command=command, limit_s=180, environment=environment)


def unpack_lean(pieces: Path, work: Path) -> None:
    """Unpack the wheels of each lean runtime that was carried; a missing one shows in its step."""
    for version in LEAN_VERSIONS:
        for wheel in sorted((pieces / f"lean-{version}").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(work / f"lean-{version}")


def run_step(step: Step, log: Path, limit_s: float) -> int | str:
    """Run a step and return its exit status, or that it took too long. What it started ends with it."""
    environment = {**os.environ, **step.environment}
    if outer := os.environ.get("LD_LIBRARY_PATH"):  # where the driver may be
        environment["LD_LIBRARY_PATH"] = join(step.environment.get("LD_LIBRARY_PATH", ""), outer)
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                list(map(str, step.command)),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as err:
            stream.write(f"{err}\n".encode())
            return "could not start"
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"took longer than {limit_s:.0f} s"


def run_all(steps: Sequence[Step], out: Path, limit_s: float) -> list[dict[str, object]]:
    """Run each step and keep run.json up to date."""
    results: list[dict[str, object]] = []
    end = time.monotonic() + limit_s
    for index, step in enumerate(steps, 1):
        start = time.monotonic()
        left = end - start
        status: int | str = "no time was left"
        if left > 1:
            status = run_step(step, out / f"{index:02}-{step.name}.log", min(step.limit_s, left))
        results.append({"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1)})
        (out / "run.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"{step.name}: {status}, {results[-1]['seconds']} s", flush=True)
    return results


def dry_steps(work: Path) -> list[Step]:
    """List what can run without a GPU, and two steps that have to fail in known ways."""
    own = {"PYTHONPATH": join(ROOT / "runtime", ROOT), "CUDA_VISIBLE_DEVICES": ""}
    graph = (sys.executable, "-W", "ignore", HERE / "graph17.py", work, "--small")
    return [
        Step(name="graph", command=graph, limit_s=120, environment=own),
        Step(name="compare", command=(sys.executable, HERE / "compare.py", work, work / "compare.json"), limit_s=60),
        Step(name="runner", command=(sys.executable, HERE / "dry_runner.py"), limit_s=60, environment=own),
        Step(name="missing", command=(work / "no-such-program",), limit_s=5),
        Step(name="slow", command=("sleep", "30"), limit_s=1),
    ]


DRY = {"graph": 0, "compare": 0, "runner": 0, "missing": "could not start", "slow": "took longer than 1 s"}


def run_dry() -> None:
    """Check the scripts without a GPU; exit with 1 if a step ends otherwise than it should."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        steps = list(plan_steps(work, work, work))
        missing = [
            str(each)
            for step in steps
            for each in step.command
            if str(each).endswith(".py") and not Path(each).exists()
        ]
        results = run_all(dry_steps(work), work, LIMIT_S)
        wrong = [str(each["step"]) for each in results if each["status"] != DRY[str(each["step"])]]
        for index, each in enumerate(results, 1):
            if each["step"] in wrong:
                print((work / f"{index:02}-{each['step']}.log").read_text()[-2000:])
    if missing or wrong:
        sys.exit(f"missing: {missing}; ended otherwise than expected: {wrong}")
    print(f"all as expected; with a GPU there are {len(steps)} steps: {', '.join(step.name for step in steps)}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="gets logs and results")
    parser.add_argument("--pieces", type=Path, help="what was carried here, as hopper.md lists it")
    parser.add_argument("--work", type=Path, help="for large files; by default a temporary folder")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS")
    parser.add_argument("--dry", action="store_true", help="run what needs no GPU")
    given = parser.parse_args()
    if given.dry:
        run_dry()
        return
    if not (given.out and given.pieces):
        parser.error("OUT and --pieces are needed, or --dry")
    if not given.pieces.is_dir():
        parser.error(f"{given.pieces} is not a folder")
    out = given.out.resolve()
    work = (given.work or Path(tempfile.mkdtemp(prefix="hopper-"))).resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    pieces = given.pieces.resolve()
    unpack_lean(pieces, work)
    run_all(list(plan_steps(out, pieces, work)), out, given.limit)


if __name__ == "__main__":
    main()
