"""`mcv-serve`: a bundle behind HTTP."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from mcv_runtime import OptionError, load
from mcv_runtime.command import terminal
from mcv_runtime.command.cli_options import MACHINE, CacheDir, CacheDirMb, Kv, LowMemory, MemoryMb, Provider, Threads
from mcv_runtime.files import at_home, read_text
from mcv_runtime.pictures.images import MAX_PIXELS
from mcv_serve.server import Server, serve
from mcv_serve.service import Service
from mcv_serve.settings import Settings
from mcv_serve.state_routes import server_version

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_DEFAULT = Settings()
_NETWORK, _LIMITS, _SAFETY = "Name and network", "Limits", "Safety"


def _option(*names: str, help: str, panel: str) -> Any:  # noqa: A002 - typer's name
    return typer.Option(*names, help=help, rich_help_panel=panel)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mcv-serve {server_version()}")
        raise typer.Exit


@app.command()
def run(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the model; else $MCV_BUNDLE, else the demo.")] = None,
    host: Annotated[str, _option("--host", help="Address to listen at.", panel=_NETWORK)] = "127.0.0.1",
    port: Annotated[int, _option("--port", "-p", help="Port to listen at.", panel=_NETWORK)] = 8000,
    model_name: Annotated[str | None, _option("--model-name", help="What to call the model.", panel=_NETWORK)] = None,
    temperature: Annotated[
        float, _option("--temperature", help="Of requests that name none; 0: the likeliest tokens.", panel=_NETWORK)
    ] = _DEFAULT.temperature,
    repeat_guard: Annotated[
        int, _option("--repeat-guard", help="End answers whose last N tokens say one thing over and over.", panel=_NETWORK)
    ] = _DEFAULT.repeat_guard,
    concurrent: Annotated[
        int, _option("--concurrent", help="Requests that are computed together.", panel=_LIMITS)
    ] = _DEFAULT.concurrent,
    queue: Annotated[int, _option("--queue", help="Requests that may wait for that.", panel=_LIMITS)] = _DEFAULT.queue,
    queue_mb: Annotated[
        float, _option("--queue-mb", help="Most of all requests that wait, in memory.", panel=_LIMITS)
    ] = _DEFAULT.queue_mb,
    deadline: Annotated[
        float, _option("--deadline", help="Seconds after which an answer ends as far as it is.", panel=_LIMITS)
    ] = _DEFAULT.deadline_s,
    drain: Annotated[
        float, _option("--drain", help="Seconds that requests may go on after SIGTERM.", panel=_LIMITS)
    ] = _DEFAULT.drain_s,
    keep_alive: Annotated[
        float, _option("--keep-alive", help="A stream says something at least so often (s).", panel=_LIMITS)
    ] = _DEFAULT.keep_alive_s,
    body_mb: Annotated[float, _option("--body-mb", help="Largest request.", panel=_LIMITS)] = _DEFAULT.body_mb,
    body_s: Annotated[float, _option("--body-s", help="Seconds to send a request.", panel=_LIMITS)] = _DEFAULT.body_s,
    pictures: Annotated[int, _option("--pictures", help="Pictures of a request.", panel=_LIMITS)] = _DEFAULT.pictures,
    picture_mb: Annotated[
        float, _option("--picture-mb", help="Largest picture, encoded.", panel=_LIMITS)
    ] = _DEFAULT.picture_mb,
    max_pixels: Annotated[int, _option("--max-pixels", help="Refuse larger pictures.", panel=_LIMITS)] = MAX_PIXELS,
    max_tokens: Annotated[
        int | None, _option("--max-tokens", help="Longest answer that may be asked for.", panel=_LIMITS)
    ] = None,
    answers: Annotated[int, _option("--answers", help="Most n of a request.", panel=_LIMITS)] = _DEFAULT.answers,
    api_key: Annotated[
        list[str] | None, _option("--api-key", help="Serve only who shows it; may be repeated; $MCV_API_KEY.", panel=_SAFETY)
    ] = None,
    api_key_file: Annotated[Path | None, _option("--api-key-file", help="A file with one key a line.", panel=_SAFETY)] = None,
    allow_image_host: Annotated[
        list[str] | None, _option("--allow-image-host", help="Fetch pictures from there, by https.", panel=_SAFETY)
    ] = None,
    fetch_s: Annotated[float, _option("--fetch-s", help="Seconds to fetch a picture.", panel=_SAFETY)] = _DEFAULT.fetch_s,
    allow_origin: Annotated[
        list[str] | None, _option("--allow-origin", help="Pages that a browser may let ask (CORS).", panel=_SAFETY)
    ] = None,
    log_content: Annotated[bool, _option("--log-content", help="Let what is asked stand in the log.", panel=_SAFETY)] = False,
    isolate: Annotated[
        bool, _option("--isolate", help="Decode pictures in a process that may open nothing.", panel=_SAFETY)
    ] = False,
    threads: Threads = None,
    memory_mb: MemoryMb = None,
    cache_dir: CacheDir = None,
    cache_dir_mb: CacheDirMb = None,
    save_state: Annotated[
        Path | None, _option("--save-state", help="File for the beginnings that were read, for a restart.", panel=MACHINE)
    ] = None,
    save_s: Annotated[
        float, _option("--save-every", help="Seconds between savings of that while nobody asks.", panel=MACHINE)
    ] = _DEFAULT.save_s,
    low_memory: LowMemory = False,
    kv: Kv = None,
    provider: Provider = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve a MiniCPM-V model over HTTP, in the dialects of OpenAI and Ollama."""
    settings = Settings(
        model_name=model_name,
        api_keys=_keys(api_key or (), api_key_file),
        concurrent=concurrent,
        queue=queue,
        queue_mb=queue_mb,
        deadline_s=deadline,
        drain_s=drain,
        keep_alive_s=keep_alive,
        body_mb=body_mb,
        body_s=body_s,
        pictures=pictures,
        picture_mb=picture_mb,
        max_tokens=max_tokens,
        answers=answers,
        temperature=temperature,
        repeat_guard=repeat_guard,
        image_hosts=tuple(allow_image_host or ()),
        fetch_s=fetch_s,
        origins=tuple(allow_origin or ()),
        log_content=log_content,
        isolate=isolate,
        state=save_state,
        save_s=save_s,
    )
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
        engine = load(at_home(named) if named else None, max_pixels=max_pixels, max_rows=concurrent, **given)
        return Service(engine, settings, max_pixels=max_pixels)

    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form, force=True)  # instead of a command's notices
    logging.getLogger(__name__).info("listening at http://%s:%d", host, port)
    serve(Server(settings, opened, host=host, port=port))


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
