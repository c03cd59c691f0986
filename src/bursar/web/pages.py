"""The routes of browsers: an organization's overview, signing in, the theme, our own files."""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse
from markupsafe import Markup

from bursar.identity import api as identity_api
from bursar.identity import guards
from bursar.identity.guards import NotPermitted, needs
from bursar.identity.memberships import MemberNotFound, get_membership
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.identity.sessions import LinkNotValid, NotSignedIn, SignedIn
from bursar.identity.users import Place, places_of_user
from bursar.problems import NotFound, Problem
from bursar.usage.api import overview_for
from bursar.web.assets import assets
from bursar.web.numbers import Unit
from bursar.web.overview import describe
from bursar.web.rendering import local_path, message, page, set_theme

router = APIRouter(include_in_schema=False)

_FOREVER: Final = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Who is signed in, for their menu and the switcher. name, email: None for an administrator of the platform."""

    name: str | None
    email: str | None
    places: tuple[Place, ...]


@router.get("/")
async def root(person: Annotated[SignedIn, Depends(guards.signed_in)]) -> Response:
    """To the organization where the person acts."""
    principal = guards.principal_of_session(person, chosen=None)
    return RedirectResponse(f"/o/{principal.organization_slug}", status_code=303)


@router.get("/o/{org}")
async def organization_overview(
    request: Request,
    principal: Annotated[Principal, needs(Permission.USAGE_READ)],
    unit: Unit = Unit.MONEY,
    view: Literal["chart", "table"] = "chart",
) -> Response:
    """Are we fine this month, and who drives it?"""
    found = await overview_for(request, principal)
    person = await _person(request, principal)
    slug = found.organization.slug
    return page(
        request,
        "overview.html",
        **describe(found, unit),
        person=person,
        places=_named_first(person, principal) if person else (),
        view=view,
        api=f"/api/v1/organizations/{slug}/overview",
        link=f"{request.base_url}o/{slug}",
        first_call=first_call(str(request.base_url)),
    )


@router.get("/sign-in")
async def sign_in_page(request: Request) -> Response:
    """How one signs in."""
    return _sign_in_page(request, 200)


@router.get("/sign-in/{token}")
async def confirm_sign_in(request: Request, token: str) -> Response:
    """A page with one button. It looks nothing up: mail scanners open every link, and must not use it up."""
    return message(
        request, "Sign in", "This link signs you in once, in this browser.", action=("Sign in", f"/sign-in/{token}")
    )


@router.post("/sign-in/{token}")
async def use_sign_in_link(request: Request, token: str) -> Response:
    """Use the link up and go to the person's organization."""
    answer = await identity_api.use_sign_in_link(request, token)
    return problem_page(request, LinkNotValid()) if answer.status_code == LinkNotValid.status else answer


@router.post("/appearance/{theme}")
async def choose_theme(request: Request, theme: Literal["system", "light", "dark"], next: str = "/") -> Response:
    """Remember a theme in this browser and go back."""
    guards.check_same_origin(request)
    answer = RedirectResponse(local_path(next), status_code=303)
    set_theme(request, answer, theme)
    return answer


@router.get("/static/{name}")
async def static_file(request: Request, name: str) -> Response:
    """One of our own files, for ever: its address changes when it does."""
    asset = assets().get(name)
    if asset is None:
        raise NotFound
    headers = {"Cache-Control": _FOREVER, "X-Content-Type-Options": "nosniff", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(asset.gzipped, media_type=asset.media_type, headers={**headers, "Content-Encoding": "gzip"})
    return Response(asset.content, media_type=asset.media_type, headers=headers)


def problem_page(request: Request, problem: Problem) -> Response:
    """A refusal for people. What is foreign looks like what does not exist."""
    if isinstance(problem, NotSignedIn):
        return _sign_in_page(request, problem.status)
    title, texts = _words(problem)
    request_id = getattr(request.state, "request_id", None)
    answer = message(
        request,
        title,
        *texts,
        status=problem.status,
        links=[("To my organization", "/")] if problem.status == 404 else [],
        reference=f"Request {request_id}" if problem.status >= 500 and request_id else None,
    )
    answer.headers.update(problem.headers)
    return answer


def first_call(base_url: str) -> str:
    """A command that makes the first metered request. base_url: as the reader reached us, with the last slash."""
    return "\n".join(
        (
            f"curl {base_url}v1/chat/completions \\",
            '  -H "Authorization: Bearer $BURSAR_API_KEY" \\',
            '  -H "Content-Type: application/json" \\',
            """  -d '{"model": "demo-1", "messages": [{"role": "user", "content": "Hello"}]}'""",
        )
    )


async def _person(request: Request, principal: Principal) -> Person | None:
    """The person behind the request; None behind a service key."""
    if principal.user_id is None:
        return None
    async with guards.database_of(request).tenant(principal.organization_id) as conn:
        places = tuple(await places_of_user(conn, user_id=principal.user_id))
        try:
            member = await get_membership(conn, organization_id=principal.organization_id, user_id=principal.user_id)
        except MemberNotFound:
            return Person(name=None, email=None, places=places)
    return Person(name=member.display_name, email=member.email, places=places)


def _named_first(person: Person, principal: Principal) -> list[Place]:
    """Where the person may go: companies by name, then what is their own. Only with a session; a key stays put."""
    if principal.session_id is None:
        return []
    return sorted(person.places, key=lambda place: (place.kind == "individual", place.name.lower(), place.slug))


def _sign_in_page(request: Request, status: int) -> Response:
    return message(
        request,
        "Please sign in",
        "You sign in with a link that works once. If you have one, open it in this browser.",
        Markup("Whoever runs this installation makes one with <code>bursar users link you@company.example</code>."),
        status=status,
    )


def _words(problem: Problem) -> tuple[str, tuple[str, ...]]:
    if problem.status == 404:
        return "There is nothing here", ("Or nothing that you may see. Look at the address, or ask who sent you here.",)
    if isinstance(problem, NotPermitted):
        who = "An administrator of the organization can give you a role that has it."
        return problem.title, tuple(text for text in (problem.detail, who) if text)
    if isinstance(problem, LinkNotValid):
        return "This link cannot be used", ("It was used already, or is too old. Please ask for a new one.",)
    return problem.title, (problem.detail,) if problem.detail else ()
