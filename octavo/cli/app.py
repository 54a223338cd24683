"""The program: exit code 0 for success, 1 for an error in one paragraph, 2 for wrong usage."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from octavo.cli import bench, commands, inspect
from octavo.core.errors import OctavoError, OctavoWarning
from octavo.core.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="octavo",
    help="Folds a model into eight bits, makes it fast, and proves what that cost and gained.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command("demo")(commands.demo)
app.command("calibrate")(commands.calibrate)
app.command("build")(commands.build)
app.command("run")(commands.run)
app.command("compare")(commands.compare)
app.command("inspect")(inspect.inspect)
app.command("doctor")(inspect.doctor)
app.command("bench")(bench.bench)
app.command("export-triton-server")(commands.export_triton_server)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),  # noqa: ARG001 - taken out of the arguments by main
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: as on the command line, without the program's name; by default sys.argv.

    Returns:
        the exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    warnings.showwarning = _show_warning  # type: ignore[assignment] # the same call, less text
    try:
        app(given, prog_name="octavo")
    except SystemExit as stop:  # typer ends so, also after help and wrong usage
        return stop.code if isinstance(stop.code, int) else 0
    except OctavoError as error:
        if debug:
            raise
        typer.echo(f"octavo: {error}", err=True)
        return 1
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split())[:500]
        typer.echo(
            f"octavo: unexpected {type(error).__name__}: {text}. This is a defect of Octavo; run "
            "the command again with --debug and report what it prints.",
            err=True,
        )
        return 1
    return 0


def _show_warning(message: Warning | str, category: type[Warning], *_rest: object) -> None:
    """Our own warnings in a line; those of other packages are not for the user of a command."""
    if issubclass(category, OctavoWarning):
        typer.echo(f"octavo: warning: {message}", err=True)
