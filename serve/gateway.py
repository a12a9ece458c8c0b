"""The gateway: one HTTP service that answers with memory, and takes and finds memories.

    python serve/gateway.py --config configs/pocket.yaml --port 8000

One gateway a run folder; several with folders of their own may share one database. On loopback it
asks for no keys (unless gateway.keys says so); on any other address it asks for one, and does not
start while there is none (`memshare keys create`).
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from memshare.config import Config, ConfigError, add_config_arguments, load_config
from memshare.files import DiskFull, RunLocked, full_disk_told, run_lock, write_json
from memshare.gateway.local import is_loopback
from memshare.gateway.logs import install
from memshare.llm.base import LLMError
from memshare.pool.errors import PoolError
from memshare.pool.keys import KeyRing
from memshare.pool.store import PoolStore
from memshare.progress import log

# An idle connection is kept longer than by any client or proxy (most give up within 60 s): a
# request sent at the moment when the server closes its connection would be lost.
KEEP_ALIVE_SECONDS = 75


class AddressError(RuntimeError):
    """The address can't be served on."""


class NoKeys(RuntimeError):
    """Keys are required, and there are none."""


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises `AddressError` saying what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Now, so that a second server on the port is refused at once.
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        raise AddressError(
            f"{host}:{port}: can't listen there: {error}; stop what uses it, or choose "
            "another --host or --port"
        ) from error
    return sock


def check_keys(config: Config) -> None:
    """Raises `NoKeys` if nobody could use a gateway that requires them."""
    with PoolStore.open(config.url) as store:
        if all(key.revoked_at for key in KeyRing(store.database).list()):
            raise NoKeys(
                "this gateway asks for keys and there are none. Make one first: memshare keys "
                "create NAME --right POOL=read,write with the same --config; or bind to 127.0.0.1"
            )


def spare_collections() -> None:
    """Keep what is there by now out of garbage collections.

    It is nearly all that will ever be there (modules, routes, the encoder's parts), and to go
    through it again takes so long that every request in flight would feel it. What is replaced
    later is freed as before: encoders and indexes are in no reference cycles.
    """
    gc.collect()
    gc.freeze()


def serve(config: Config, host: str, port: int) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code."""
    failures: list[BaseException] = []
    keys_required = config.gateway.keys == "required" or not is_loopback(host)
    if keys_required:
        check_keys(config)
    with run_lock(config.run.dir, "gateway"), listen(host, port) as sock:
        # Only now, so that a wrong setting or a taken port is told at once: torch takes seconds.
        import uvicorn

        from memshare.gateway.app import create_app
        from memshare.gateway.protocol import BoundedHeaders
        from memshare.sharing import assemble

        bound = sock.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        app = create_app(
            assemble(config),
            on_failure=lambda error: stop(error),
            on_ready=spare_collections,
            keys_required=keys_required,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=BoundedHeaders,
                log_config=None,  # its loggers' lines go where ours go
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(config.gateway.shutdown_seconds),
            )
        )

        def stop(error: BaseException) -> None:
            failures.append(error)
            server.should_exit = True

        write_json(
            config.run.dir / "gateway.json",
            {"url": f"http://{shown}:{bound}", "pid": os.getpid()},
        )
        log(f"listening on http://{shown}:{bound} (run folder {config.run.dir})")
        # uvicorn raises the signal again once it has shut down: that is the end, not an error.
        with suppress(KeyboardInterrupt, SystemExit):
            server.run(sockets=[sock])
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check the address, serve."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--host", help="address to bind (default: gateway.host)")
    parser.add_argument("--port", type=int, help="port to bind, 0 for a free one (gateway.port)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        config = load_config(args.config, args.overrides)
        install(config.gateway.log)
        host = args.host or config.gateway.host
        port = config.gateway.port if args.port is None else args.port
        with full_disk_told():
            return serve(config, host, port)
    except (AddressError, ConfigError, DiskFull, NoKeys, RunLocked, PoolError, LLMError) as error:
        log(f"gateway: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
