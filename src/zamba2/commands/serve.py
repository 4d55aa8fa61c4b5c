"""``zamba2 serve``: an HTTP server for OpenAI's and Anthropic's clients."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import math
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.errors import Zamba2Error, install, notice

if TYPE_CHECKING:
    from zamba2.runtime.backend import Backend
    from zamba2.serve.cache import StateCache
    from zamba2.serve.scheduler import Scheduler

__all__ = ["main"]

KEYS = "ZAMBA2_API_KEYS"
MEBI = 1 << 20


def main(
    model: str, where: Mapping[str, Any], *, host: str = "127.0.0.1", port: int = 8000, name: str | None = None,
    api_keys: Path | None = None, open_to_all: bool = False, origins: Sequence[str] = (), max_tokens: int = 1024, batch: int = 8,
    queue: int = 64, seconds: float = 600.0, grace: float = 10.0, cache_mb: int = 1024, cache_folder: Path | None = None,
    disk_mb: int = 8192, body_mb: int = 4, log_prompts: bool = False, quiet: bool = False, adapters: Sequence[str] = (),
) -> None:  # fmt: skip
    """Load a model and serve it until a signal comes. Raises Zamba2Error before the first request only."""
    missing = [module for module in ("fastapi", "uvicorn") if find_spec(module) is None]
    if missing:
        raise Zamba2Error(f"the server needs {' and '.join(missing)}; {install('serve')}.")
    for option, value in (("--timeout", seconds), ("--grace", grace)):
        if not math.isfinite(value):
            raise Zamba2Error(f"{option} is {value}; a number of seconds is needed.")
    if cache_folder is not None and cache_mb == 0:
        raise Zamba2Error("--cache-folder keeps what --cache-mb holds, which is 0; leave one of them out.")
    keys, folders = read_keys(api_keys), read_adapters(adapters, name or model)
    with closing(bind(host, port, protected=bool(keys) or open_to_all)) as bound:
        from zamba2.commands.generate import load_with_status
        from zamba2.serve.app import Settings, create_app
        from zamba2.serve.scheduler import Scheduler

        loaded = load_with_status(model, where)
        loaded.tokenizer  # noqa: B018 - raises where there is none, before anything is started
        load_adapters(loaded.backend, folders)
        cache = state_cache(loaded.backend, cache_mb, cache_folder, disk_mb) if cache_mb else None
        address = bound.getsockname()[:2]
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        # A web page whose own name resolves to this machine could otherwise call a server that has no keys.
        alone = ipaddress.ip_address(address[0]).is_loopback and not keys
        settings = Settings(
            model_name=name or loaded.name, adapters=tuple(folders), api_keys=keys, origins=tuple(origins), max_tokens=max_tokens,
            hosts=("localhost", "127.0.0.1", "[::1]", shown, host.lower()) if alone else (),
            seconds=seconds, most_body_bytes=body_mb * MEBI, log=not quiet, log_prompts=log_prompts,
        )  # fmt: skip
        scheduler = Scheduler(loaded.backend, loaded.tokenizer, cache=cache, most_running=batch, most_waiting=queue)
        app = create_app(loaded, scheduler, cache, settings)
        server = server_of(app, scheduler, grace, f"{settings.model_name} at http://{shown}:{address[1]}")
        gc.collect()
        gc.freeze()  # what is there now stays; looking through it again would stop all streams
        try:
            server.run(sockets=[bound])
        finally:
            dropped = scheduler.close(0) if server.dropped is None else server.dropped  # None after a third signal
            if cache is not None:
                cache.flush()
            print("zamba2: stopped" + (f"; {dropped} requests were dropped." if dropped else "."), file=sys.stderr, flush=True)


def state_cache(backend: Backend, cache_mb: int, folder: Path | None, disk_mb: int) -> StateCache:
    """Raises Zamba2Error for a folder that cannot be used."""
    from zamba2.serve.cache import StateCache

    try:
        return StateCache(
            lambda adapter: backend.new_state(adapter=adapter), most_bytes=cache_mb * MEBI, folder=folder, disk_bytes=disk_mb * MEBI,
            model=backend.fingerprint,
        )  # fmt: skip
    except OSError as error:
        raise Zamba2Error(f"{folder} cannot be used for the cache ({error.strerror or error}); give another folder.") from None


def server_of(app: Any, scheduler: Scheduler, grace: float, ready: str) -> Any:
    """uvicorn's server, which gives replies ``grace`` seconds when it is stopped. ready: what it says when it answers."""
    import uvicorn

    class Server(uvicorn.Server):
        """Ends a reply that is on its way, or drops it, and tells its client, when its time is up or a second signal comes. Nobody is told
        anything at a third, nor at one that comes when all is told."""

        dropped: int | None = None
        hurried = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self.hurried or self.dropped is not None
            self.should_exit, self.hurried = True, self.should_exit

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"zamba2: {ready}", file=sys.stderr, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()

            def close() -> None:
                self.dropped = scheduler.close(grace, lambda: self.hurried)

            closing = threading.Thread(target=close, daemon=True)
            closing.start()
            while closing.is_alive() and not self.force_exit:
                await asyncio.sleep(0.02)
            if self.hurried:
                self.config.timeout_graceful_shutdown = 1  # for those who are slow to hear it
            await super().shutdown(sockets)

    return Server(uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False, timeout_graceful_shutdown=5,
    ))  # fmt: skip


def read_adapters(given: Sequence[str], model: str) -> dict[str, Path]:
    """Folders of adapters by the names that clients choose them by. model: the name of the model alone. Raises Zamba2Error."""
    found: dict[str, Path] = {}
    for value in given:
        name, _, folder = value.partition("=")
        if not name or not folder:
            raise Zamba2Error(f"--adapter is {value!r}; NAME=FOLDER is needed, a name for clients and the folder of a LoRA adapter (peft).")
        if name in (model, "default"):
            raise Zamba2Error(f"--adapter {value}: {name} is the model without an adapter; give the adapter another name.")
        if name in found:
            raise Zamba2Error(f"--adapter {value}: {name} was given before, for {found[name]}; each adapter needs a name of its own.")
        found[name] = Path(folder)
    return found


def load_adapters(backend: Backend, adapters: Mapping[str, Path]) -> None:
    """Raises Zamba2Error for a bad one, and where the backend takes none."""
    load = getattr(backend, "load_adapter", None)  # the native engine's
    for name, folder in adapters.items():
        if load is None:
            raise Zamba2Error(f"--adapter {name}={folder}: adapters are for the native engine; leave --device and --dtype out.")
        load(folder, name)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys: the lines of a file, and those in ZAMBA2_API_KEYS, between white space or commas. Raises Zamba2Error."""
    keys = os.environ.get(KEYS, "").replace(",", " ").split()
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise Zamba2Error(f"{file} cannot be read ({reason}); a file with one API key a line is needed.") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise Zamba2Error(f"{file} has no API key; one a line is needed.")
        keys += found
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise Zamba2Error("an API key holds a space or a character outside ASCII, which no HTTP client can send; take another.")
    return tuple(dict.fromkeys(keys))


def bind(host: str, port: int, *, protected: bool) -> socket.socket:
    """A socket bound to the address. Raises Zamba2Error where that is impossible, or open to others without a key."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError, OverflowError):
        raise Zamba2Error(f"--host {host} --port {port} is no address of this machine; 127.0.0.1 and a port below 65536 will do.") from None
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        if not protected:
            raise Zamba2Error(f"{host} can be reached by other machines; give API keys ({KEYS}, --api-keys FILE), or allow it with --open.")
        notice(f"{host} can be reached by other machines, without encryption; put a proxy with TLS before it where that matters.")
    made = socket.socket(family, kind, number)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen()  # taken from now on, although answers begin when the model is there
    except OSError as error:
        made.close()
        raise Zamba2Error(f"port {port} of {host} cannot be used ({error.strerror}); choose another with --port.") from None
    made.setblocking(False)
    return made
