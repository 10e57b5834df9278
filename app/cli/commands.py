"""The command line ``fluxd``: its commands, their arguments and their help.

Wiring only. Everything heavy is imported inside the commands, so that help and
usage errors come at once. Exit status: 0 done, 2 wrong usage or parameters, 1 any
other failure; errors are one plain message on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.console import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, UsageError
from fluxcore.host_memory import keep_freed_memory
from fluxcore.version import __version__

if TYPE_CHECKING:
    from app.settings import LoadedSettings


# The settings know them as none of theirs.
SERVER_VARIABLE = "FLUXD_SERVER"
KEY_VARIABLE = "FLUXD_KEY"

cli = typer.Typer(
    name="fluxd",
    help="Local image generation with FLUX.2 [klein].",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Square brackets in texts are not markup.
    rich_markup_mode=None,
)

Model = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="Checkpoint directory.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, mps, cuda or cuda:N.")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Settings file. Default: config/fluxd.toml, if it exists."
    ),
]
Host = Annotated[
    str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
]
Port = Annotated[int | None, typer.Option("--port", metavar="N", help="Port to listen on.")]
LogLevel = Annotated[
    str | None,
    typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error."),
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        envvar=SERVER_VARIABLE,
        help="Draw with the service at this address, not in this process.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", envvar=KEY_VARIABLE, help="The API key for --server."),
]
ShowSteps = Annotated[
    bool, typer.Option("--show-steps", help="Show the steps on the terminal as they come.")
]
Graphics = Annotated[
    str | None,
    typer.Option(
        "--graphics",
        metavar="FORM",
        help="How to show pictures: auto, kitty, iterm2, sixel or blocks. Default: auto.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting; repeatable. 'fluxd settings' lists them.",
    ),
]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"fluxd {__version__}")
        raise typer.Exit


@cli.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    server: Server = None,
    key: Key = None,
    show_steps: ShowSteps = False,
    graphics: Graphics = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Local image generation with FLUX.2 [klein].

    Without a command, on a terminal: draws what is typed, line by line.
    """
    with plain_errors():
        if context.invoked_subcommand is not None:
            _refuse_options_before(context, context.invoked_subcommand)
            return
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            typer.echo(context.get_help(), err=True)
            raise typer.Exit(EXIT_USAGE)
        loaded = _load_drawing(server, model, device, dtype, config)

        from app.cli.prompt import interact

        interact(
            loaded.values,
            server=server,
            key=key,
            graphics=graphics or "auto",
            shows_steps=show_steps,
        )


@cli.command()
def serve(
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    host: Host = None,
    port: Port = None,
    log_level: LogLevel = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Load a model once and answer HTTP requests until a signal ends it."""
    with plain_errors():
        given = {
            "model": model,
            "device": device,
            "dtype": dtype,
            "host": host,
            "port": port,
            "log_level": log_level,
        }
        loaded = _load(given, config, assignments)

        from app.cli.startup import startup_watch
        from app.main import serve_checkpoint

        with startup_watch() as watch:
            if watch is None:
                status = serve_checkpoint(loaded.values)
            else:
                status = serve_checkpoint(loaded.values, watch.log, watch.follow)
    raise typer.Exit(status)


@cli.command()
def settings(
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    host: Host = None,
    port: Port = None,
    log_level: LogLevel = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Print every setting in effect, where it comes from and what it is for, as TOML."""
    with plain_errors():
        given = {
            "model": model,
            "device": device,
            "dtype": dtype,
            "host": host,
            "port": port,
            "log_level": log_level,
        }
        typer.echo(_load(given, config, assignments).as_toml(), nl=False)


@cli.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; - reads standard input.")],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Where to: .png, .jpg or .webp; - writes PNG to standard output.",
        ),
    ] = "out.png",
    model: Model = None,
    width: Annotated[int | None, typer.Option(help="Pixels; a multiple of 16.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; a multiple of 16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Has an effect on base models.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: random.")] = None,
    n: Annotated[int, typer.Option("--n", help="Pictures; several get numbered names.")] = 1,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    schedule: Annotated[str, typer.Option(help="flux, linear or power.")] = "flux",
    power_alpha: Annotated[float, typer.Option(help="Exponent of the power schedule.")] = 2.0,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A reference picture; repeatable."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What to draw again on the first reference."),
    ] = None,
    strength: Annotated[float, typer.Option(help="With a mask: above 0 to 1.")] = 1.0,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 90,
    show: Annotated[
        bool, typer.Option("--show", help="Show the pictures on the terminal.")
    ] = False,
    show_steps: ShowSteps = False,
    graphics: Graphics = None,
    server: Server = None,
    key: Key = None,
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
) -> None:
    """Draw pictures, in this process or with a service, and write them to files."""
    with plain_errors():
        loaded = _load_drawing(server, model, device, dtype, config)
        is_shown = show or show_steps or graphics is not None

        from app.cli.one_shot import Wanted, draw

        draw(
            Wanted(
                prompt=prompt,
                output=output,
                params={
                    "width": width,
                    "height": height,
                    "steps": steps,
                    "guidance": guidance,
                    "seed": seed,
                    "n": n,
                    "negative_prompt": negative,
                    "schedule": schedule,
                    "power_alpha": power_alpha,
                    "strength": strength,
                },
                references=tuple(image or ()),
                mask=mask,
                quality=quality,
                server=server,
                key=key,
                graphics=(graphics or "auto") if is_shown else None,
                shows_steps=show_steps,
            ),
            loaded.values,
        )


@cli.command()
def openapi(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As a page to read, such as docs/api.md.")
    ] = False,
    config: Config = None,
) -> None:
    """Print the description of all routes for programs, as JSON; nothing is started."""
    with plain_errors():
        import json

        from app.api.reference import reference_page
        from app.main import openapi_document

        document = openapi_document(_load({}, config, None).values)
        text = reference_page(document) if markdown else json.dumps(document, indent=2) + "\n"
        typer.echo(text, nl=False)


@cli.command()
def bench(
    more_sizes: Annotated[
        list[str] | None, typer.Argument(metavar="[SIZE]...", help="More sizes.")
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE...", help="256 or 512x768; default: the model's."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Warm pictures of each size.")] = 5,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same for all pictures.")] = 0,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,VALUE",
            help="Measure with each value of a setting, such as dtype; repeatable.",
        ),
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw stages and floor into a PNG file.")
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Measure each stage of a picture beside its floor: a table, then a line of JSON."""
    with plain_errors():
        flags = _flags({"model": model, "device": device, "dtype": dtype}, assignments)

        from app.cli import bench as measuring

        asked = measuring.Asked(
            sizes=(*(sizes or ()), *(more_sizes or ())),
            runs=runs,
            steps=steps,
            seed=seed,
            varied=tuple(vary or ()),
            chart=chart,
        )
        measuring.bench(asked, flags, config)


@cli.command()
def doctor(model: Model = None, device: Device = None, config: Config = None) -> None:
    """Check that this machine computes what it should; print what to report."""
    with plain_errors():
        values = _load({"model": model, "device": device}, config, None).values

        from app.cli.doctor import examine

        is_sound = examine(values.device, values.model)
    raise typer.Exit(0 if is_sound else EXIT_FAILURE)


@cli.command("random-checkpoint")
def random_checkpoint(
    directory: Annotated[Path, typer.Argument(help="Must not exist yet, or be empty.")],
    preset: Annotated[str, typer.Option(help="tiny, 4b or 9b.")] = "tiny",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    base: Annotated[
        bool, typer.Option("--base", help="A base model (50 steps, guidance), not a distilled one.")
    ] = False,
) -> None:
    """Write a checkpoint of random weights, to try the service or a machine."""
    with plain_errors():
        from app.cli.console import byte_progress
        from fluxcore.weights.random_checkpoint import write_random_checkpoint

        with byte_progress("writing") as progress:
            path = write_random_checkpoint(
                directory, preset, seed=seed, is_distilled=not base, progress=progress
            )
        typer.echo(path)


@cli.command("hash-key")
def hash_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; stands in logs.")],
    from_stdin: Annotated[
        bool,
        typer.Option("--stdin", help="Read a key that you have from standard input, make none."),
    ] = False,
    per_minute: Annotated[
        int | None,
        typer.Option("--per-minute", min=0, metavar="N", help="This key's own rate limit."),
    ] = None,
) -> None:
    """Make an API key, and the line with its hash for the settings."""
    with plain_errors():
        from app.keys import ApiKey, check_key, digest_of, new_key

        key = sys.stdin.readline().strip() if from_stdin else new_key()
        try:
            check_key(key)
            entry = ApiKey(name, digest_of(key), per_minute).entry
        except ValueError as error:
            raise UsageError(str(error)) from None
        if not from_stdin:
            typer.echo("The key, shown this once; give it to the client:", err=True)
            typer.echo(key)
        typer.echo("Its hash, for the settings:", err=True)
        typer.echo(f'api_keys = ["{entry}"]')


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn expected failures into one message and an exit status."""
    try:
        yield
    except UsageError as error:
        _fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        status = _status_of(error)
        if status is None:
            raise
        _fail(error, status)


def _status_of(error: Exception) -> int | None:
    """The exit status for a failure that is expected; None for any other."""
    from app.cli.drawing import DrawingError
    from app.errors import InvalidRequestError, ServiceError
    from app.settings import SettingsError
    from fluxcore.errors import FluxError, InvalidParamsError

    match error:
        case SettingsError() | InvalidParamsError() | InvalidRequestError():
            return EXIT_USAGE
        case DrawingError():
            return EXIT_USAGE if error.is_wrong_order else EXIT_FAILURE
        case FluxError() | ServiceError() | OSError():
            return EXIT_FAILURE
    return None


def main() -> None:
    """The console script."""
    keep_freed_memory()
    cli(prog_name="fluxd")


def _fail(message: object, status: int) -> None:
    typer.echo(f"fluxd: {message}", err=True)
    raise typer.Exit(status)


def _refuse_options_before(context: typer.Context, command: str) -> None:
    """Options before a command are for no command, and would be ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"{parameter.opts[0]} before {command!r} has no effect; give it after the command"
            )


def _load_drawing(
    server: str | None,
    model: Path | None,
    device: str | None,
    dtype: str | None,
    config: Path | None,
) -> LoadedSettings:
    """The settings for a command that draws, here or elsewhere."""
    given = {"model": model, "device": device, "dtype": dtype}
    for name, value in given.items():
        if server is not None and value is not None:
            raise UsageError(
                f"--{name} is for drawing in this process; leave it or --server (or "
                f"{SERVER_VARIABLE}) out"
            )
    return _load(given, config, None)


def _load(
    given: dict[str, Any], config: Path | None, assignments: list[str] | None
) -> LoadedSettings:
    from app.settings import load_settings

    return load_settings(_flags(given, assignments), config=config)


def _flags(given: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """The settings given on the command line, by name."""
    flags = {name: value for name, value in given.items() if value is not None}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE; got {assignment!r}")
        flags[name.strip().replace("-", "_")] = value.strip()
    return flags
