"""Signing in and out in a browser. The page is bare HTML, so that it works before anything else does."""

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from bursar.identity import guards
from bursar.identity.guards import COOKIE, signed_in
from bursar.identity.organizations import OrganizationNotFound
from bursar.identity.principals import chosen_place
from bursar.identity.sessions import LinkNotValid, NotSignedIn, SignedIn, choose_in_session, sign_in, sign_out
from bursar.problems import documents

router = APIRouter(tags=["sign-in"])

# The token stands in the address: it must neither be kept by a cache nor be told to another site.
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
}
_PAGE: Final = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title} – Bursar</title></head>
<body><main><h1>{title}</h1>{body}</main></body>
</html>
"""
_CONFIRM: Final = _PAGE.format(
    title="Sign in", body='<p>This link works once.</p><form method="post"><button autofocus>Sign in</button></form>'
)
_NOT_VALID: Final = _PAGE.format(
    title="This link cannot be used", body="<p>It was used already, or is too old. Please ask for a new one.</p>"
)


@router.get("/sign-in/{token}", response_class=HTMLResponse)
async def confirm_sign_in(token: str) -> HTMLResponse:
    """A page with one button. It looks nothing up: mail scanners open every link, and must not use it up."""
    return HTMLResponse(_CONFIRM, headers=_HEADERS)


@router.post(
    "/sign-in/{token}",
    status_code=303,
    response_class=RedirectResponse,
    responses={
        **documents(guards.CrossSiteRequest),
        LinkNotValid.status: {"description": f"Gone: {LinkNotValid.code}", "content": {"text/html": {}}},
    },
)
async def use_sign_in_link(request: Request, token: str) -> Response:
    """Use the link up, begin a session and go to the person's organization."""
    # Nobody signs others in as himself through a page of his own.
    guards.check_same_origin(request)
    try:
        person = await sign_in(
            guards.database_of(request),
            token,
            previous_cookie=request.cookies.get(COOKIE),
            request_id=guards.request_id_of(request),
            address_hash=guards.address_hash_of(request),
        )
    except LinkNotValid as problem:
        return HTMLResponse(_NOT_VALID, status_code=problem.status, headers=_HEADERS)
    place = chosen_place(person.places, chosen=None, user=person.user)
    response = RedirectResponse(f"/o/{place.slug}", status_code=303, headers=_HEADERS)
    guards.set_session_cookie(request, response, person.cookie)
    return response


@router.post(
    "/sign-out", status_code=303, response_class=RedirectResponse, responses=documents(guards.CrossSiteRequest)
)
async def end_session(request: Request) -> RedirectResponse:
    """End the session at once. Signing out twice is no fault."""
    guards.check_same_origin(request)
    cookie = request.cookies.get(COOKIE)
    if cookie is not None:
        await sign_out(guards.database_of(request), cookie)
    response = RedirectResponse("/", status_code=303)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")
    return response


@router.post(
    "/session/organization/{org}",
    status_code=303,
    response_class=RedirectResponse,
    responses=documents(NotSignedIn, OrganizationNotFound, guards.CrossSiteRequest),
)
async def choose_organization(
    request: Request, org: str, person: Annotated[SignedIn, Depends(signed_in)]
) -> RedirectResponse:
    """Act in another organization for the rest of this session, and go there."""
    place = chosen_place(person.places, chosen=org, user=person.user)
    async with guards.database_of(request).tenant(person.session.organization_id) as conn:
        await choose_in_session(conn, session=person.session, organization_id=place.organization_id)
    return RedirectResponse(f"/o/{place.slug}", status_code=303)
