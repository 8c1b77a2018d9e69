"""`chatllama serve`: a run as an OpenAI-compatible API, with a web page."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import uvicorn

from chatllama.config.model import ChatSection
from chatllama.config.schema import with_weights
from chatllama.inference.chat_model import describe_model
from chatllama.inference.folders import find_model
from chatllama.inference.load import load_run
from chatllama.runtime.command_line import tell
from chatllama.runtime.waiting import doing
from chatllama.serving.app import build_app
from chatllama.serving.guard import PatientProtocol
from chatllama.serving.service import Service
from chatllama.serving.settings import ServerSettings, check_settings

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """A uvicorn server that prints its address, and exits normally after a signal."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        seconds = {"head_seconds": settings.body_timeout, "send_seconds": settings.send_timeout}
        config = uvicorn.Config(
            build_app(service),
            http=type("Protocol", (PatientProtocol,), seconds),
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
        """Listens, and prints the address."""
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
        before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        engine = self._service.engine
        if running := engine.num_running + engine.num_waiting:
            seconds = f"{self._service.settings.grace:g}"
            tell(
                f"stopping once {running} answers are finished, in {seconds} s at the latest; "
                "once more stops at once"
            )


def open_socket(settings: ServerSettings) -> socket.socket:
    """A bound socket, opened before the model is loaded; ValueError if the address is taken."""
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


def serve(settings: ServerSettings) -> None:
    """Serves a run until SIGINT or SIGTERM; ValueError for wrong settings or an unfinished run."""
    check_settings(settings)
    with open_socket(settings) as bound:
        run, cfg = find_model(settings.run)
        chat = cfg.chat
        if settings.date is not None:
            chat = ChatSection.model_validate(chat.model_dump() | {"date": settings.date})
        cfg = with_weights(cfg, settings.dtype, settings.quantization)
        with doing(f"loading {settings.run}"):
            loaded = load_run(run, cfg, trust_remote_code=settings.trust_remote_code)
        loaded = replace(loaded, chat=chat)
        quantization = loaded.config.backbone.quantization
        tell(f"{settings.run}: {describe_model(loaded.model, quantization)}")
        service = Service(settings, loaded)
        Server(service).run(sockets=[bound])
        service.engine.stop()
    tell("stopped")
