"""Options that several commands share, and what all commands do with a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from threadpoolctl import threadpool_limits

from lars_fused.study import networks
from lars_fused.study.data import NAMES, Data, load
from lars_fused.study.loop import Trainer

Command = TypeVar("Command", bound=Callable[..., Any])
Part = TypeVar("Part")
Chosen = dict[str, Any]

DATA_HELP = "; ".join(f"{name}: {text}" for name, text in NAMES.items())
NETWORK_HELP = ", ".join(f"{name} ({n.about})" for name, n in networks.NETWORKS.items())


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated numbers of one kind; those of kind float also as fractions, 1/3."""

    def __init__(self, kind: type, words: tuple[str, ...] = (), *, zero: bool = False):
        self.kind, self.words, self.zero = kind, words, zero
        self.name = "a,b,c"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """The numbers; each of `words` stands for itself."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(p if p in self.words else self._number(p) for p in str(value).split(","))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is not a list of numbers like 1,2,3", param, ctx)
        numbers = [n for n in found if not isinstance(n, str)]
        if not all(0 <= n < float("inf") and (n or self.zero) for n in numbers):
            kind = "not negative" if self.zero else "positive"
            self.fail(f"{value!r}: the numbers must be {kind}", param, ctx)
        if len(set(found)) < len(found):
            self.fail(f"{value!r} names a number twice", param, ctx)
        return found

    def _number(self, text: str) -> Any:
        return float(Fraction(text)) if self.kind is float and "/" in text else self.kind(text)


class Share(click.ParamType):  # type: ignore[type-arg]
    """i/n: the i-th of n shares of a sweep, i from 1 to n."""

    name = "i/n"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """(i, n), i counted from 0."""
        if isinstance(value, tuple):
            return value[0], value[1]
        try:
            part, whole = map(int, str(value).split("/"))
        except ValueError:
            self.fail(f"{value!r} is not i/n, such as 1/4", param, ctx)
        if not 1 <= part <= whole:
            self.fail(f"{value!r}: i must lie in 1..n", param, ctx)
        return part - 1, whole


def several(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Many options as one decorator, in the order in which the help lists them."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def images(data: str) -> Callable[[Command], Command]:
    """What is trained on, with a command's own default."""
    return several(
        click.option("--data", default=data, show_default=True, help=DATA_HELP),
        click.option("--resolution", default=0, help="Pixels a side; 0 as they are."),
        click.option("--train-images", default=0, help="Training images to use; 0 for all."),
    )


def data_and_network(network: str, width: float) -> Callable[[Command], Command]:
    """What is trained, with a command's own defaults."""
    return several(
        images("digits"),
        click.option("--network", default=network, show_default=True, help=NETWORK_HELP),
        click.option("--width", default=width, show_default=True, help="Share of the channels."),
    )


def what(network: str, width: float, epochs: float) -> Callable[[Command], Command]:
    """What is trained and for how long."""
    return several(
        data_and_network(network, width),
        click.option("--epochs", default=float(epochs), show_default=True),
    )


def where(default: str) -> Callable[[Command], Command]:
    """Where results go."""
    return click.option(
        "--out",
        default=default,
        show_default=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for results; finished runs in it are not repeated.",
    )


only = click.option(
    "--only",
    type=Share(),
    metavar="I/N",
    help="Do the I-th of N shares of the runs, then stop; `report` merges what is there.",
)

tensorboard = click.option(
    "--tensorboard", is_flag=True, help="Write events for TensorBoard as well (needs tensorboard)."
)


def take_one_core() -> None:
    """Leave the other cores to other shares of a sweep, unless OMP_NUM_THREADS is set.

    Small networks gain nothing from a second thread, and where it has to wait for a core each step
    waits with it. With a GPU, threads prepare the images and stay.
    """
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(1)
        threadpool_limits(1, user_api="blas")  # numpy's, which torch does not know


def loaded(chosen: Chosen) -> Data:
    """The data that the options name."""
    return load(chosen["data"], chosen["resolution"], chosen["train_images"])


def settings(chosen: Chosen, *others: str) -> dict[str, Any]:
    """The options of `what`, as many as a command has, and `others`, as settings of a run."""
    what = ("data", "resolution", "train_images", "network", "width", "epochs")
    return {name: chosen[name] for name in (*what, *others) if name in chosen}


def counts(given: Iterable[Any], images: int) -> tuple[int, ...]:
    """Numbers of images, ascending and none twice; "all" are the `images` there are."""
    return tuple(sorted({images if count == "all" else count for count in given}))


def share_of(parts: Sequence[Part], only: tuple[int, int] | None) -> Sequence[Part]:
    """What --only leaves to do."""
    part, whole = only or (0, 1)
    return parts[part::whole]


def conclude(out: Path, only: tuple[int, int] | None, report: Callable[[Path], str]) -> None:
    """The report of the whole; after a share, where it is to be had."""
    if only is None:
        click.echo(report(out))
    else:
        click.echo(f"share {only[0] + 1}/{only[1]} is done: lars-study report {out}")


@contextmanager
def counter(total: int, label: str) -> Iterator[Callable[[], None]]:
    """A progress bar of whole runs, for sweeps of short ones; nothing without a terminal."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    with tqdm(total=total, unit="run", desc=label, leave=False, disable=hidden) as drawn:

        def done() -> None:
            drawn.update()

        yield done
    click.echo(f"{label}: {total} done")


@contextmanager
def bar(steps: int, label: str, quiet: bool = False) -> Iterator[Callable[[Trainer], None]]:
    """A progress bar of steps; nothing at all without a terminal."""
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=steps, unit="step", desc=label, leave=False, disable=hidden) as drawn:

        def progress(trainer: Trainer) -> None:
            if not drawn.n and trainer.step > 1:
                drawn.update(trainer.step - 1)  # resumed
            drawn.set_postfix_str(f"loss {trainer.history.losses[-1]:.3f}", refresh=False)
            drawn.update()

        yield progress
