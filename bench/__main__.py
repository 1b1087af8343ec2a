"""Run the benchmarks: ``python -m bench``.

python -m bench                    host overhead, small sizes, traffic model; on a GPU everything
python -m bench run --only resnet50 --seconds 60
python -m bench report FOLDER      table.md and plots from the raw files of a folder
python -m bench report --readme    the table of bench/README.md from all folders
python -m bench profile FOLDER     launches, copies, waits; DRAM bytes by ncu where it works
python -m bench tune FOLDER        sweep the launch constants on this GPU
python -m bench folder             the name that a folder made now would have
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench import environment, promises, report

SUITES = ("test_step_host.py", "test_norms.py", "test_step_gpu.py")
COMMANDS = ("run", "report", "profile", "tune", "note")


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
        "--seconds", type=float, default=1500, help="what has not begun by then is left"
    )
    run.add_argument("--no-report", action="store_true", help="leave table.md and plots out")
    show = commands.add_parser("report", help="tables and plots from raw files")
    show.add_argument("folder", type=Path, nargs="?")
    show.add_argument("--readme", action="store_true", help="write the table in bench/README.md")
    for name, seconds in (("profile", 90), ("tune", 150)):
        part = commands.add_parser(name)
        part.add_argument("folder", type=Path, nargs="?")
        part.add_argument("--seconds", type=float, default=seconds)
    noted = commands.add_parser("note")
    noted.add_argument("folder", type=Path)
    noted.add_argument("statuses", nargs="+", metavar="NAME=STATUS")
    chosen = parser.parse_args(arguments)
    if chosen.command == "report" and not (chosen.folder or chosen.readme):
        parser.error("report needs a folder, or --readme")
    return chosen


def run(chosen: argparse.Namespace) -> int:
    folder = chosen.output or environment.folder()
    if chosen.output is None:  # a whole run begins anew; parts of one add to its folder
        for name in ("raw.csv", "environment.json"):
            (folder / name).unlink(missing_ok=True)
    given = sys.argv[1:] if sys.argv[0].endswith("__main__.py") else []
    environment.note(folder, **environment.facts(" ".join(["python -m bench", *given])))
    here, taken = Path(__file__).parent, len([*folder.glob("benchmark*.json")])
    json = folder / f"benchmark{f'-{taken + 1}' if taken and chosen.output else ''}.json"
    command = [sys.executable, "-m", "pytest", *(str(here / suite) for suite in SUITES)]
    command += ["-q", "-r", "fE", "-p", "no:cacheprovider", "--benchmark-columns=median,iqr,rounds"]
    command += ["--benchmark-sort=name", f"--benchmark-json={json}"]
    command += ["-k", chosen.only] if chosen.only else []
    env = {
        **os.environ,
        "LARS_FUSED_BENCH_FOLDER": str(folder.resolve()),
        "LARS_FUSED_BENCH_SECONDS": str(chosen.seconds),
    }
    status = subprocess.run(command, cwd=environment.ROOT, env=env).returncode
    if not torch.cuda.is_available():
        output = os.path.relpath(folder / "traffic.csv", environment.ROOT)
        traffic = [sys.executable, "-m", "bench.traffic", "--default", "--output", output]
        status = status or subprocess.run(traffic, cwd=environment.ROOT).returncode
    environment.note(folder, suites={"exit status": status})
    return status if chosen.no_report else report.write(folder) or status


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(sys.argv[1:] if arguments is None else arguments)
    if chosen.command == "run":
        return run(chosen)
    if chosen.command == "note":
        for name, status in (entry.split("=") for entry in chosen.statuses):
            environment.note(chosen.folder, **{name: {"exit status": int(status)}})
        return 0
    if chosen.command == "report":
        if chosen.readme:
            promises.write()
        return report.write(chosen.folder) if chosen.folder else 0
    if not torch.cuda.is_available():
        print(f"python -m bench {chosen.command}: needs a GPU: torch.cuda finds none")
        return 1
    from bench import profiler, tune

    part = {"profile": profiler.main, "tune": tune.main}[chosen.command]
    return part(chosen.folder or environment.folder(), chosen.seconds)


if __name__ == "__main__":
    sys.exit(main())
