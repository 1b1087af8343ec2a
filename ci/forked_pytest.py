"""Run pytest in forks of a process that has imported torch already: half of a short run is imports.

For `ci/mutate.py`. Every line of standard input asks for one run, as JSON: the folder, pytest's
arguments, a file for its output, limits of processor time and of real time in seconds. The answer
is a line with the exit status, negative for a signal. The package under test is imported by the
fork alone, so each run sees the folder's files as they are then.
"""

import json
import os
import resource
import signal
import sys

import pytest
import torch._dynamo  # noqa: F401


def run(folder: str, arguments: list[str], output: str, cpu_seconds: int, seconds: int) -> int:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    signal.alarm(seconds)
    os.chdir(folder)
    sys.path.insert(0, folder)
    return int(pytest.main(arguments))


def main() -> None:
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = 3  # pytest's for an internal error
            try:
                status = run(*json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
