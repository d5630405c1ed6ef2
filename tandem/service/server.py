"""`tandem serve`: the application behind uvicorn. One process takes the port before it loads anything, and fails early.

In: settings, address, number of processes. Out: nothing; it runs until it is told to stop.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from tandem.core.errors import UnavailableError
from tandem.service.app import check_keys, create_app
from tandem.service.settings import HOME, Settings, load_settings
from tandem.service.wiring import open_recommender

GRACE_SECONDS: Final = 10
"""At least so long, and always longer than the budget, requests may go on after the port is closed."""

FACTORY: Final = "tandem.service.server:worker_app"
Announce = Callable[[str, str], None]


def run_server(settings: Settings, host: str | None, port: int | None, workers: int, announce: Announce) -> None:
    """Serve until SIGTERM or SIGINT. `announce` hears the address and the release once they are known.

    Raises InputError for a bind beyond this machine without keys, UnavailableError for a taken port, NotFoundError when nothing
    is promoted, IntegrityError when the champion is damaged.
    """
    own = settings.service
    settings = replace(settings, service=replace(own, host=host or own.host, port=own.port if port is None else port))
    check_keys(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log_to_stderr()
    if workers == 1:
        _run_one(settings, announce)
    else:
        _run_many(settings, workers, announce)


def log_to_stderr() -> None:
    """Our lines as they are, and uvicorn's warnings. Paths are not logged: they may hold ids."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("tandem.service").setLevel(logging.INFO)
    for name in ("tandem.service", "uvicorn.error"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False


def _run_one(settings: Settings, announce: Announce) -> None:
    with _bound(settings.service.host, settings.service.port) as bound:
        recommender = open_recommender(settings)
        try:
            config = uvicorn.Config(create_app(settings, recommender, follow=True), **_options(settings))
            announce(_url(settings, bound.getsockname()[1]), recommender.release)
            uvicorn.Server(config).run(sockets=[bound])
        except KeyboardInterrupt:
            pass
        finally:
            recommender.close()


def _bound(host: str, port: int) -> socket.socket:
    """A socket that holds the address but does not listen yet, so that nobody waits on it."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UnavailableError(f"cannot take port {port} of {host}: {error.strerror}; choose another with --port") from None
    return bound


def _run_many(settings: Settings, workers: int, announce: Announce) -> None:
    """Processes that each load the champion. It is loaded here once: a worker that cannot start is started for ever."""
    os.environ[HOME] = str(settings.workspace)
    os.environ["TANDEM_SERVICE__HOST"] = settings.service.host
    recommender = open_recommender(settings)
    recommender.close()
    announce(_url(settings, settings.service.port), recommender.release)
    uvicorn.run(FACTORY, factory=True, workers=workers, **_options(settings))


def worker_app() -> FastAPI:
    """What each of several processes runs: it loads the champion of $TANDEM_HOME by itself."""
    log_to_stderr()
    return create_app(load_settings(), follow=True)


def _options(settings: Settings) -> dict[str, Any]:
    grace = max(GRACE_SECONDS, math.ceil(settings.service.budget_ms / 1000) + 5)
    return {
        "host": settings.service.host,
        "port": settings.service.port,
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": grace,
    }


def _url(settings: Settings, port: int) -> str:
    host = settings.service.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
