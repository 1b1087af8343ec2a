"""`lars-study`: the laboratory's command line, also `python -m lars_fused.study`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    import click

    from lars_fused.study.commands import (
        batch_size,
        layers,
        minibatch,
        noise,
        options,
        recipes,
        report,
        rules,
        sharpness,
        train,
    )
    from lars_fused.study.errors import StudyError
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.startswith("lars_fused"):
        raise
    raise SystemExit(
        f"lars-study needs {missing.name}, which is not installed: pip install 'lars_fused[study]' "
        "(from a checkout: pip install '.[study]')"
    ) from missing


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.pass_context
def cli(context: click.Context) -> None:
    """Large-batch training on your own data: the experiments behind LARS as commands.

    Everything runs on scikit-learn's handwritten digits by default. `lars-study COMMAND --help`
    lists the options of a command.
    """
    if context.invoked_subcommand != "train":
        options.take_one_core()


COMMANDS = (train, batch_size, layers, minibatch, sharpness, noise, rules, recipes, report)
for one in COMMANDS:
    cli.add_command(one.command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what went wrong is told in one line, and in the exit status."""
    try:
        status = cli.main(arguments, prog_name="lars-study", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        message, status = " ".join(error.format_message().split()), error.exit_code
    except StudyError as error:
        message, status = " ".join(str(error).split()), 1
    except OSError as error:
        message, status = f"{error.filename or 'file'}: {error.strerror}", 1
    except (KeyboardInterrupt, click.Abort):
        message, status = "interrupted; the same command goes on where this one stopped", 130
    print(f"lars-study: {message}", file=sys.stderr)
    return status
