"""Run the benchmarks: ``python -m bench``.

python -m bench                    host overhead, small sizes, traffic model; on a GPU everything
python -m bench run --only resnet50 --seconds 60
python -m bench report FOLDER      table.md and plots from the raw files of a folder
python -m bench report --readme    the table of bench/README.md from all folders
python -m bench profile FOLDER     launches, copies, waits; DRAM bytes by ncu if it works
python -m bench sanitize FOLDER    a small step under compute-sanitizer, where it is installed
python -m bench tune FOLDER        sweep the launch constants on this GPU
python -m bench merge PART...      one folder from several (or archives) of one commit and GPU
python -m bench folder             the name that a new folder would have now
"""

from __future__ import annotations

import time

_STARTED = time.monotonic()  # before torch is imported, which is part of what a run may take

import argparse  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from bench import environment  # noqa: E402
from bench.budget import Budget  # noqa: E402

SUITES = ("test_step_gpu.py", "test_norms.py", "test_step_host.py")
ON_A_GPU = {"profile": 90, "sanitize": 90, "tune": 240}  # seconds
COMMANDS = ("run", "report", *ON_A_GPU, "merge", "note", "folder")


def parse(arguments: list[str]) -> argparse.Namespace:
    if not arguments or (arguments[0] not in COMMANDS and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="the suites, then the report")
    run.add_argument("--output", type=Path, help="folder; default bench/results/<date>-<gpu>-<sha>")
    run.add_argument("--only", default="", help="pytest -k expression, such as resnet50 or sweep")
    run.add_argument(
        "--seconds", type=float, default=1500, help="what has not started by then is skipped"
    )
    run.add_argument("--no-report", action="store_true", help="skip table.md and plots")
    show = commands.add_parser("report", help="tables and plots from raw files")
    show.add_argument("folder", type=Path, nargs="?")
    show.add_argument("--readme", action="store_true", help="write the table in bench/README.md")
    for name, seconds in ON_A_GPU.items():
        part = commands.add_parser(name)
        part.add_argument("folder", type=Path, nargs="?")
        part.add_argument("--seconds", type=float, default=seconds)
        part.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    merged = commands.add_parser("merge", help="folders or .tar.gz archives of them")
    merged.add_argument("parts", type=Path, nargs="+", metavar="PART")
    merged.add_argument("--into", type=Path, default=environment.RESULTS, help="parent folder")
    noted = commands.add_parser("note", help="how a part of a run ended")
    noted.add_argument("folder", type=Path)
    noted.add_argument("statuses", nargs="+", metavar="NAME=STATUS")
    named = commands.add_parser("folder")
    named.add_argument(
        "--quotable", action="store_true", help="fail where no figure of this tree could be quoted"
    )
    named.add_argument("--keep", type=Path, help="make it in this folder, with environment.json")
    chosen = parser.parse_args(arguments)
    if chosen.command == "report" and not (chosen.folder or chosen.readme):
        parser.error("report needs a folder, or --readme")
    return chosen


def run(chosen: argparse.Namespace) -> int:
    import torch

    from bench.supervise import supervised

    budget = Budget(chosen.seconds, _STARTED)
    folder = chosen.output or environment.folder()
    if chosen.output is None:  # a whole run begins anew; parts of one add to its folder
        for name in ("raw.csv", "environment.json"):
            (folder / name).unlink(missing_ok=True)
    given = sys.argv[1:] if sys.argv[0].endswith("__main__.py") else []
    environment.note(folder, **environment.facts(" ".join(["python -m bench", *given])))
    here, taken = Path(__file__).parent, len([*folder.glob("benchmark*.json")])
    json = folder / f"benchmark{f'-{taken + 1}' if taken and chosen.output else ''}.json"
    command = [sys.executable, "-m", "pytest", *(str(here / suite) for suite in SUITES)]
    command += ["-q", "-s", "-r", "fE", "-p", "no:cacheprovider"]
    command += ["--benchmark-columns=median,iqr,rounds"]
    command += ["--benchmark-sort=name", f"--benchmark-json={json}"]
    command += ["-k", chosen.only] if chosen.only else []
    env = {
        **os.environ,
        **budget.environment(),
        "PYTHONUNBUFFERED": "1",
        "LARS_FUSED_BENCH_FOLDER": str(folder.resolve()),
    }
    status = supervised(command, folder, budget, env)
    if not torch.cuda.is_available():
        output = os.path.relpath(folder / "traffic.csv", environment.ROOT)
        traffic = [sys.executable, "-m", "bench.traffic", "--default", "--output", output]
        status = status or subprocess.run(traffic, cwd=environment.ROOT).returncode
    environment.note_status(folder, "suites", status)
    if chosen.no_report:
        return status
    from bench import report

    return report.write(folder) or status


def on_a_gpu(chosen: argparse.Namespace) -> int:
    """A part that needs a GPU: this process supervises, a child does it piece by piece."""
    import torch

    from bench.supervise import supervised

    if not torch.cuda.is_available():
        print(f"python -m bench {chosen.command}: needs a GPU: torch.cuda finds none")
        return 1
    folder = (chosen.folder or environment.folder()).resolve()
    if chosen.child:
        from bench import profiler, sanitizer, tune

        part = {"profile": profiler.main, "sanitize": sanitizer.main, "tune": tune.main}
        return part[chosen.command](folder, Budget.inherited())
    budget = Budget(chosen.seconds, _STARTED)
    if "sha" not in environment.read(folder):
        environment.note(folder, **environment.facts(f"python -m bench {chosen.command}"))
    command = [sys.executable, "-m", "bench", chosen.command, str(folder), "--child"]
    env = {**os.environ, **budget.environment(), "PYTHONUNBUFFERED": "1"}
    return supervised(command, folder, budget, env)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(sys.argv[1:] if arguments is None else arguments)
    if chosen.command == "run":
        return run(chosen)
    if chosen.command in ON_A_GPU:
        return on_a_gpu(chosen)
    if chosen.command == "merge":
        from bench import merge

        print(f"written: {merge.merge(chosen.parts, chosen.into)}")
    elif chosen.command == "note":
        for name, status in (entry.split("=") for entry in chosen.statuses):
            environment.note_status(chosen.folder, name, int(status))
    elif chosen.command == "folder":
        why = environment.unquotable_tree()
        if chosen.quotable and why:
            print(f"nothing measured here could be quoted: {why}", file=sys.stderr)
            return 1
        folder = environment.folder(chosen.keep or environment.RESULTS)
        if chosen.keep and "sha" not in environment.read(folder):
            environment.note(folder, **environment.facts("ci/gpu.sh"))
        print(folder.name)
    elif chosen.command == "report":
        from bench import promises, report

        if chosen.readme:
            promises.write()
        return report.write(chosen.folder) if chosen.folder else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
