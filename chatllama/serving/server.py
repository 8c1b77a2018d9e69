"""`chatllama serve`: a run behind an OpenAI-compatible API, with a page for people."""

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from chatllama.config.loader import load_config
from chatllama.config.schema import with_weights
from chatllama.inference.chat_model import describe_model
from chatllama.inference.load import LoadedRun, load_run
from chatllama.runs.folder import RunFolder
from chatllama.serving.app import build_app
from chatllama.serving.guard import PatientProtocol
from chatllama.serving.service import Service
from chatllama.serving.settings import ServerSettings, check_settings

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn that says where it listens and how it stops, and ends without a signal's death.

    Args:
        service: what is served.
    """

    def __init__(self, service: Service) -> None:
        settings = service.settings
        head_seconds = {"head_seconds": settings.body_timeout}
        config = uvicorn.Config(
            build_app(service),
            http=type("Protocol", (PatientProtocol,), head_seconds),
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=int(settings.grace),
        )
        super().__init__(config)
        self._service = service
        self.ready = threading.Event()
        """Set once requests are answered."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        await super().startup(sockets)
        if not self.started:
            return
        names = ", ".join(self._service.models.names)
        for listening in sockets or []:
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"http://{shown}:{port}  serves {names} (API: /v1; Ctrl-C stops)", flush=True)
        self.ready.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal lets running answers finish, a second one does not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._told_to_stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told_to_stop(self, number: int, _: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        engine = self._service.engine
        if running := engine.num_running + engine.num_waiting:
            seconds = f"{self._service.settings.grace:g}"
            print(
                f"stopping once {running} answers are finished, in {seconds} s at the latest; "
                "once more stops at once",
                file=sys.stderr,
                flush=True,
            )


def open_socket(settings: ServerSettings) -> socket.socket:
    """A bound socket, so that a taken port is told before the model is loaded.

    Raises:
        ValueError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise ValueError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; --port 0 "
            "takes a free one"
        ) from error
    return bound


def _load(settings: ServerSettings) -> LoadedRun:
    run = RunFolder(settings.run)
    cfg = load_config(run.existing_config())
    cfg = with_weights(cfg, settings.dtype, settings.quantization)
    return load_run(run, cfg)


def serve(settings: ServerSettings) -> None:
    """Serves a run until the process is told to stop.

    Raises:
        ValueError: settings that cannot be followed, or nothing to serve.
    """
    check_settings(settings)
    with open_socket(settings) as bound:
        loaded = _load(settings)
        quantization = loaded.config.backbone.quantization
        print(f"{settings.run}: {describe_model(loaded.model, quantization)}", file=sys.stderr)
        service = Service(settings, loaded)
        Server(service).run(sockets=[bound])
        service.engine.stop()
    print("stopped", file=sys.stderr)
