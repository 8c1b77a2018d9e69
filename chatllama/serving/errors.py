"""What the server says when it refuses: OpenAI's error body, without paths or tracebacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

SHOWN = 100
"""Characters of a user's own words that a message repeats."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer with a status of 400 or above."""

    error: ErrorDetail


class ApiError(Exception):
    """A refusal with its status code.

    Args:
        status: HTTP status.
        message: for the user.
        code: for programs.
        param: the field of the request that is at fault.
        type: OpenAI's class of errors.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.detail = (
            status,
            ErrorDetail(message=message, type=type, param=param, code=code),
        )

    def body(self) -> dict[str, Any]:
        """The error as JSON values."""
        return {"error": self.detail.model_dump()}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The whole answer; clients are told not to send a request again that ran too long."""
        extra = {"x-should-retry": "false"} if self.detail.code == "timeout" else {}
        return JSONResponse(self.body(), self.status, headers={**extra, **(headers or {})})


def shown(text: str) -> str:
    """A user's own words, short and printable, for a message."""
    clean = "".join(char if char.isprintable() else "\ufffd" for char in text[: SHOWN + 1])
    return clean if len(clean) <= SHOWN else clean[:SHOWN] + "..."


def unknown_model(name: str, loaded: Sequence[str]) -> ApiError:
    """404, with the names that would work."""
    return ApiError(
        404,
        f"The model '{shown(name)}' does not exist; loaded: {', '.join(loaded)}",
        "model_not_found",
        "model",
    )


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for a body that does not fit the schema; names up to five fields."""
    parts: list[str] = []
    params: list[str] = []
    for error in errors[:5]:
        place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query"))
        if error["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON", "invalid_json")
        message = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "unknown argument"
        parts.append(f"{shown(place)}: {message}" if place else message)
        params.append(shown(place))
    if len(errors) > 5:
        parts.append(f"and {len(errors) - 5} more")
    return ApiError(400, "; ".join(parts), "invalid_value", params[0] or None)
