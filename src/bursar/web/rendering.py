"""From a template to an answer: the one environment, the headers of every page, compression, the theme."""

import gzip
from collections.abc import Sequence
from typing import Any, Final

import jinja2
from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from bursar.identity.guards import is_loopback
from bursar.usage.answers import exact_credits
from bursar.web import numbers
from bursar.web.assets import address_of

THEME_COOKIE: Final = "bursar_theme"
THEMES: Final = ("light", "dark")
_SMALLEST_COMPRESSED: Final = 1000

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store, private",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Vary": "Accept-Encoding, Cookie",
}
# What a row's state is called beside a name.
_STATES: Final = {
    "left": "left",
    "suspended": "suspended",
    "no_access": "no access",
    "archived": "archived",
}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bursar.web"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = address_of
    environment.filters |= {
        "exact": exact_credits,
        "count": numbers.count_text,
        "requests": numbers.requests_text,
        "credits": numbers.credits_text,
        "money": numbers.money_text,
        "usd": numbers.usd_text,
        "percent": numbers.percent_text,
        "share": numbers.share_text,
        "change": numbers.change_text,
        "difference": numbers.difference_text,
        "direction": numbers.direction,
        "day": numbers.day_text,
        "day_range": numbers.days_text,
        "clock": numbers.time_text,
        "is_tiny": numbers.is_tiny,
        "state": _STATES.__getitem__,
    }
    return environment


ENVIRONMENT: Final = _environment()


def page(request: Request, template: str, *, status: int = 200, **context: Any) -> Response:
    """A page. context: what the template needs beside what every page has (theme, demo ribbon, own address)."""
    text = ENVIRONMENT.get_template(template).render(
        theme=theme_of(request),
        is_demo=getattr(request.app.state, "is_demo", False),
        here=_here(request),
        **{"person": None, **context},
    )
    answer = HTMLResponse(text, status_code=status, headers=HEADERS)
    return compressed(request, answer)


def message(
    request: Request,
    title: str,
    *texts: str,
    status: int = 200,
    action: tuple[str, str] | None = None,
    links: Sequence[tuple[str, str]] = (),
    reference: str | None = None,
) -> Response:
    """A page that says something. action: (label, address) of its button, a POST; links: (label, address)."""
    return page(
        request,
        "message.html",
        status=status,
        title=title,
        texts=texts,
        action=action,
        links=links,
        reference=reference,
    )


def theme_of(request: Request) -> str | None:
    """light or dark where the reader chose one; None follows the system."""
    theme = request.cookies.get(THEME_COOKIE)
    return theme if theme in THEMES else None


def set_theme(request: Request, answer: Response, theme: str) -> None:
    """Remember a choice for a year, readable by our script; anything but light and dark forgets it."""
    if theme not in THEMES:
        answer.delete_cookie(THEME_COOKIE, path="/", samesite="lax")
        return
    secure = not (request.url.scheme == "http" and is_loopback(request.url.hostname))
    answer.set_cookie(THEME_COOKIE, theme, max_age=31_536_000, path="/", samesite="lax", secure=secure)


def compressed(request: Request, answer: Response) -> Response:
    """The same answer, gzipped where the browser takes that and it is worth it."""
    body = bytes(answer.body)
    if len(body) < _SMALLEST_COMPRESSED or "gzip" not in request.headers.get("accept-encoding", ""):
        return answer
    answer.body = gzip.compress(body, 6, mtime=0)
    answer.headers["Content-Encoding"] = "gzip"
    answer.headers["Content-Length"] = str(len(answer.body))
    return answer


def wants_page(request: Request) -> bool:
    """A browser that navigates: it takes HTML, and the path is not one of programs."""
    is_for_programs = request.url.path.startswith(("/api/", "/v1"))
    return not is_for_programs and "text/html" in request.headers.get("accept", "")


def local_path(text: str | None) -> str:
    """A path of this site to go back to; anything else, such as another site's address, is the root."""
    if text and text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable():
        return text
    return "/"


def _here(request: Request) -> str:
    query = request.url.query
    path = request.url.path
    return f"{path}?{query}" if query and request.method == "GET" else path
