"""Who may ask for what: this page in a browser on this machine, opened by the address with the token, and nobody else.

A page of another site that the browser shows can send requests to 127.0.0.1 too. So each request must name this machine
as its host: another name that leads here is refused. It must not come from another origin. And it must bring the token,
once in the address, afterwards in a cookie that scripts cannot read. What changes something is a POST of
JSON, which no foreign form can send.
"""

import hashlib
import secrets
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAMES = ("127.0.0.1", "localhost", "[::1]")
LARGEST = 2**20  # bytes of a request's body
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# a page that lies in runs/ is somebody's file: it gets an origin of its own and cannot ask this server for anything
FOREIGN = (
    "sandbox allow-scripts; default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'self'"
)
ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def host_of(value: str) -> str | None:
    """The name in a Host header without its port; None if it is no such header."""
    name, colon, port = value.rpartition(":") if not value.endswith("]") else (value, "", "")
    if not colon:
        name = value
    elif not (port.isascii() and port.isdecimal() and int(port) < 65536):
        return None
    return name.lower() if name else None


def refusal(method: str, headers: Headers) -> str | None:
    """Why a request is refused whatever it asks for; None if it is not."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or host_of(hosts[0]) not in NAMES:
        return "open the page under 127.0.0.1 or localhost"
    if method not in ("GET", "HEAD", "POST"):
        return f"{method} is not answered here"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "another site may not ask for this"
    origins = headers.getlist("origin")
    if len(origins) > 1 or (origins and origins[0] != f"http://{hosts[0]}"):
        return "another site may not ask for this"
    if method == "POST":
        if not origins and headers.get("sec-fetch-site") != "same-origin":
            return "a request that changes something says its origin"
        if headers.get("content-type", "").lower().replace(" ", "") not in (
            "application/json",
            "application/json;charset=utf-8",
        ):
            return "a request that changes something is JSON"
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdecimal()) or int(length) > LARGEST:
            return f"a request has at most {LARGEST} bytes, and says how many"
    return None


class Guard:
    """Lets through what may be asked."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token
        # of its own for each page, so that two on one machine do not log each other out
        self.cookie = f"flux_lora_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a web socket: it is closed
        headers = Headers(scope=scope)
        why = refusal(scope["method"], headers)
        if why is None:
            answer = self._without_cookie(scope, headers)
            if answer is None:
                await self.app(scope, receive, _with_headers(send))
                return
        else:
            answer = PlainTextResponse(why, 403)
        await answer(scope, receive, _with_headers(send))

    def _without_cookie(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request without the token's cookie; None if it has the cookie."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if scope["path"] == "/" and len(given) == 1 and scope["method"] == "GET" and self._right(given[0]):
            enter = RedirectResponse("/", 303)
            enter.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
            return enter
        # other programs' cookies may be there and need not be well formed, which SimpleCookie would refuse as a whole
        if self._right(cookie_parser(headers.get("cookie", "")).get(self.cookie, "")):
            return None
        return PlainTextResponse(
            "This page is opened by the address with the token that train/page.py printed when it started.", 401
        )

    def _right(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())


def _with_headers(send: Send) -> Send:
    """What sends an answer with the headers that all have."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            wanted = ALWAYS | {"content-security-policy": POLICY, "cache-control": "no-store"}
            message["headers"] = [
                *message["headers"],
                *((name.encode(), value.encode()) for name, value in wanted.items() if name.encode() not in there),
            ]
        await send(message)

    return sending
