"""The server's errors: OpenAI's error body, without paths or tracebacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

SHOWN = 100
"""Characters of a request that a message repeats."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every response with a status of 400 or above."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response: `message` for people, `code` for programs, `param` the field at fault.

    Its type in OpenAI's sense follows from the HTTP status.
    """

    def __init__(
        self, status: int, message: str, code: str = "invalid_value", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)

    def body(self) -> dict[str, Any]:
        """The error as JSON values."""
        return {"error": self.detail.model_dump()}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The whole response; after a timeout it tells clients not to retry."""
        extra = {"x-should-retry": "false"} if self.detail.code == "timeout" else {}
        return JSONResponse(self.body(), self.status, headers={**extra, **(headers or {})})


def invalid(message: str, param: str) -> ApiError:
    """400 for one field of a request."""
    return ApiError(400, message, param=param)


def timed_out() -> ApiError:
    """504, where the answer is not finished in time."""
    return ApiError(504, "the answer took too long", "timeout")


def shown(text: str) -> str:
    """A user's text, short and printable, for a message."""
    clean = "".join(char if char.isprintable() else "\ufffd" for char in text[: SHOWN + 1])
    return clean if len(clean) <= SHOWN else clean[:SHOWN] + "..."


def _place(error: Mapping[str, Any]) -> str:
    """The field's path, without the types that pydantic names within a union."""
    path = [part for part in error["loc"] if part != "body"]
    whole = len(path) if error["type"] == "extra_forbidden" else 0  # then the last is any text
    parts = [part for i, part in enumerate(path, start=1) if i == whole or _is_field(part)]
    return ".".join(map(str, parts))


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for a body that does not fit the schema; names up to five fields."""
    parts: list[str] = []
    params: list[str] = []
    for error in errors[:5]:
        place = _place(error)
        if error["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON", "invalid_json")
        message = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "unknown argument"
        parts.append(f"{shown(place)}: {message}" if place else message)
        params.append(shown(error.get("ctx", {}).get("param", place)))
    if len(errors) > 5:
        parts.append(f"and {len(errors) - 5} more")
    return ApiError(400, "; ".join(parts), param=params[0] or None)
