"""`mcv-serve`: a bundle behind HTTP."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from mcv_runtime import OptionError, load
from mcv_runtime.command import terminal
from mcv_runtime.command.cli_options import CacheDir, CacheDirMb, GroupedCommand, Kv, LowMemory, MemoryMb, Provider, Threads
from mcv_runtime.files import at_home, read_text
from mcv_runtime.pictures.images import MAX_PIXELS
from mcv_serve.server import Server, serve
from mcv_serve.service import Service
from mcv_serve.settings import LIMITS, NETWORK, SAFETY, Settings
from mcv_serve.state_routes import server_version

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _option(*names: str, help: str, panel: str) -> Any:  # noqa: A002 - typer's name
    return typer.Option(*names, help=help, rich_help_panel=panel)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mcv-serve {server_version()}")
        raise typer.Exit


def run(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the model; else $MCV_BUNDLE, else the demo.")] = None,
    host: Annotated[str, _option("--host", help="Address to listen at.", panel=NETWORK)] = "127.0.0.1",
    port: Annotated[int, _option("--port", "-p", help="Port to listen at.", panel=NETWORK)] = 8000,
    api_key: Annotated[
        list[str] | None, _option("--api-key", help="Serve only who shows it; may be repeated; $MCV_API_KEY.", panel=SAFETY)
    ] = None,
    api_key_file: Annotated[Path | None, _option("--api-key-file", help="A file with one key a line.", panel=SAFETY)] = None,
    max_pixels: Annotated[int, _option("--max-pixels", help="Refuse larger pictures.", panel=LIMITS)] = MAX_PIXELS,
    threads: Threads = None,
    memory_mb: MemoryMb = None,
    cache_dir: CacheDir = None,
    cache_dir_mb: CacheDirMb = None,
    low_memory: LowMemory = False,
    kv: Kv = None,
    provider: Provider = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    **values: Any,
) -> None:
    """Serve a MiniCPM-V model over HTTP, in the dialects of OpenAI and Ollama."""
    chosen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    settings = Settings(api_keys=_keys(api_key or (), api_key_file), **chosen)
    named = bundle or os.environ.get("MCV_BUNDLE")
    options: dict[str, Any] = {
        "threads": threads,
        "memory_mb": memory_mb,
        "cache_dir": cache_dir,
        "cache_dir_mb": cache_dir_mb,
        "low_memory": low_memory or None,
        "kv": kv,
        "provider": provider,
    }
    given = {name: value for name, value in options.items() if value is not None}

    def opened() -> Service:
        engine = load(at_home(named) if named else None, max_pixels=max_pixels, max_rows=settings.concurrent, **given)
        return Service(engine, settings, max_pixels=max_pixels)

    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form, force=True)  # instead of a command's notices
    logging.getLogger(__name__).info("listening at http://%s:%d", host, port)
    serve(Server(settings, opened, host=host, port=port))


def _with_settings() -> Callable[..., None]:
    """The command with a flag for every setting."""
    own = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
    hints = get_type_hints(Settings)
    added = []
    for setting in dataclasses.fields(Settings):
        if not setting.metadata:
            continue
        flag = setting.metadata["flag"] or f"--{setting.name.replace('_', '-')}"
        option = _option(flag, help=setting.metadata["help"], panel=setting.metadata["group"])
        listed = get_origin(hints[setting.name]) is tuple
        kind, default = (list[str], []) if listed else (hints[setting.name], setting.default)
        annotation: Any = Annotated[kind, option]
        added.append(inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    ordered = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own[:3], *added, *own[3:]]]

    def command(**values: Any) -> None:
        run(**values)

    command.__doc__ = run.__doc__
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return command


app.command(cls=GroupedCommand)(_with_settings())


def _keys(given: Any, file: Path | None) -> tuple[str, ...]:
    keys = [*given, *filter(None, [os.environ.get("MCV_API_KEY")])]
    if file is not None:
        lines = read_text(file, error=OptionError, missing=OptionError).splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise OptionError(f"{file} has no key")
        keys += found
    return tuple(keys)


def main() -> None:
    """The command; a known mistake is one line and exit code 2."""
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata and large pictures: the client has our own line
    terminal.run(app, "mcv-serve")


if __name__ == "__main__":
    main()
