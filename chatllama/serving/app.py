"""The server's routes: OpenAI's, vLLM's for adapters, and ours; the work is in `service.py`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from chatllama import __version__
from chatllama.serving.errors import ApiError, ErrorBody, of_validation
from chatllama.serving.guard import Guard
from chatllama.serving.models import ServedModel
from chatllama.serving.schema import (
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    ScoreRequest,
    TokenKlRequest,
    UnloadAdapter,
    Vote,
)
from chatllama.serving.service import Service
from chatllama.serving.votes import vote_record

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "/compare.js": ("compare.js", "text/javascript; charset=utf-8"),
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": about}
    for status, about in {
        400: "the request is invalid",
        401: "no valid key",
        403: "from another machine or web site",
        404: "there is no such model",
        408: "the request did not arrive in time",
        413: "the body is too long",
        415: "not application/json",
        503: "the server is busy or stopping",
        504: "the answer took too long",
    }.items()
}


def build_app(service: Service) -> FastAPI:
    """The application of a running service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.stop)

    app = FastAPI(
        title="chatllama",
        version=__version__,
        docs_url=None,  # these load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
    )
    _add_errors(app)
    _add_page(app)
    _add_state(app, service)
    _add_generation(app, service)
    _add_models(app, service)
    _add_votes(app, service)
    _describe(app)
    open_paths = [*PAGE_FILES, "/health"]
    described = app.openapi()["paths"]
    routes = [path for path in described if "{" not in path]
    app.add_middleware(
        Guard,
        settings=service.settings,
        open_paths=open_paths,
        routes=[*open_paths, *routes],
        posted=[path for path in routes if "post" in described[path]],
        metrics=service.metrics,
    )
    if origins := service.settings.allow_origins:  # outermost: a preflight carries no key
        methods, headers = ["GET", "POST"], ["*"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers
        )
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), "http_error").response(error.headers)

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        # Starlette writes the traceback to the server's log; the client gets no details.
        return ApiError(500, "internal error", "internal").response()


def _add_page(app: FastAPI) -> None:
    for path, (name, media_type) in PAGE_FILES.items():
        page = _page((PAGE / name).read_bytes(), media_type)
        app.add_api_route(path, page, include_in_schema=False)


def _page(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=media_type)

    return page


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server works, and what the page needs."""
        if not service.engine.alive:
            raise ApiError(503, "the engine has stopped", "stopping")
        return {
            "status": "ok",
            "version": __version__,
            "reward": service.models.has_reward,
            "key_required": bool(service.settings.api_keys),
        }

    @app.get("/v1/run")
    async def introduction() -> dict[str, Any]:
        """What the page shows before the first message: name, limits, prompts to try, votes."""
        return {**service.introduction, **await asyncio.to_thread(service.votes.tally)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and latencies in Prometheus' text format."""
        engine, adapters = service.engine, service.models.num_loaded
        running, waiting = engine.num_running, engine.num_waiting
        text = service.metrics.text(running=running, waiting=waiting, adapters=adapters)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _add_generation(app: FastAPI, service: Service) -> None:
    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", response_model=None, responses=streams)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """An answer to a conversation."""
        return await service.chat(body, http)

    @app.post("/v1/completions", response_model=None, responses=streams)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """The continuation of one or several texts."""
        return await service.complete(body, http)

    @app.post("/v1/score")
    async def score(body: ScoreRequest, http: Request) -> dict[str, Any]:
        """The reward model's scores of whole conversations."""
        return await service.score(body, http)

    @app.post("/v1/token_kl")
    async def token_kl(body: TokenKlRequest, http: Request) -> dict[str, Any]:
        """Log-probabilities of an answer's tokens by two models, and their differences."""
        return await service.token_kl(body, http)


def _add_models(app: FastAPI, service: Service) -> None:
    models = service.models

    def card(served: ServedModel) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "chatllama",
            "root": served.name,
            "parent": None if served.name == "base" else "base",
            "max_model_len": service.max_positions,
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Every name that `model` may take."""
        return {"object": "list", "data": [card(served) for served in models.all]}

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> dict[str, Any]:
        """One of them."""
        return card(models.find(model))

    @app.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadAdapter) -> Response:
        """Loads an adapter from a folder below the adapter root."""
        await models.load(body.lora_name, body.lora_path, body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadAdapter) -> Response:
        """Unloads such an adapter."""
        await models.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_votes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/votes")
    async def vote(body: Vote) -> dict[str, Any]:
        """Appends a preference between two answers to the file of votes."""
        service.check_prompt([message.plain() for message in body.messages])
        try:
            votes = await asyncio.to_thread(service.votes.append, vote_record(body))
        except OSError as error:
            text = f"the file of votes cannot be written: {error.strerror}"
            raise ApiError(500, text, "votes") from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        service.metrics.count("votes")
        return {"object": "vote", "votes": votes}

    described = {"content": {"application/jsonl": {}}, "description": "one record a line"}
    lines: dict[int | str, dict[str, Any]] = {200: described}

    @app.get("/v1/votes", response_class=Response, responses=lines)
    async def votes() -> Response:
        """All votes, as JSON lines that the reward stage reads."""
        content = await asyncio.to_thread(service.votes.content)
        disposition = {"content-disposition": 'attachment; filename="votes.jsonl"'}
        return Response(content, media_type="application/jsonl", headers=disposition)


def _describe(app: FastAPI) -> None:
    """Corrects FastAPI's description: invalid bodies get 400, as in OpenAI's API, and not 422."""
    described = app.openapi()
    for path in described["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if status != "200" and "text/plain" in content:  # errors are JSON everywhere
                    content["application/json"] = content.pop("text/plain")
    for name in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(name, None)
    app.openapi_schema = described
