"""What each role may do: the one table. The API, the pages and the command line all ask here.

A permission named `…:own` is about oneself, `…:team` about the teams one leads, any other about the whole organization.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """Roles inside one organization; SYSTEM_ADMIN exists in the platform's own organization only."""

    SYSTEM_ADMIN = "system_admin"
    ORG_ADMIN = "org_admin"
    FINANCE = "finance"
    LICENSE_ADMIN = "license_admin"
    TEAM_LEAD = "team_lead"
    MEMBER = "member"
    AUDITOR = "auditor"


class Permission(StrEnum):
    """One thing that can be allowed. What no role lists is denied to all."""

    MODELS_USE = "models:use"
    ORGANIZATION_READ = "organization:read"
    ORGANIZATION_WRITE = "organization:write"
    PEOPLE_READ = "people:read"
    PEOPLE_WRITE = "people:write"
    IDENTITY_READ = "identity:read"
    TEAMS_WRITE = "teams:write"
    KEYS_OWN = "keys:own"
    KEYS_READ = "keys:read"
    KEYS_WRITE = "keys:write"
    USAGE_OWN = "usage:own"
    USAGE_TEAM = "usage:team"
    USAGE_READ = "usage:read"
    CONVERSATIONS_TEXT = "conversations:text"
    MARGIN_READ = "margin:read"
    CREDITS_OWN = "credits:own"
    CREDITS_READ = "credits:read"
    CREDITS_TEAM = "credits:team"
    CREDITS_ALLOCATE = "credits:allocate"
    CREDITS_BUY = "credits:buy"
    CREDITS_GRANT = "credits:grant"
    CHARGES_WRITE = "charges:write"
    LIMITS_TEAM = "limits:team"
    LIMITS_READ = "limits:read"
    LIMITS_WRITE = "limits:write"
    ALERTS_READ = "alerts:read"
    ALERTS_WRITE = "alerts:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"
    CODES_REDEEM = "codes:redeem"
    CODES_WRITE = "codes:write"
    REQUESTS_OWN = "requests:own"
    REQUESTS_TEAM = "requests:team"
    REQUESTS_DECIDE = "requests:decide"
    LICENSES_READ = "licenses:read"
    LICENSES_WRITE = "licenses:write"
    BILLING_READ = "billing:read"
    BILLING_WRITE = "billing:write"
    EXPORT = "export"
    AUDIT_READ = "audit:read"
    PLATFORM_READ = "platform:read"
    PLATFORM_WRITE = "platform:write"


class Scope(StrEnum):
    """What an API key may be used for, within what its owner may."""

    INFERENCE = "inference"
    READ = "read"
    WRITE = "write"


_P = Permission

_MEMBER: Final = frozenset({_P.MODELS_USE, _P.KEYS_OWN, _P.USAGE_OWN, _P.CREDITS_OWN, _P.CODES_REDEEM, _P.REQUESTS_OWN})
_READS_ALL: Final = frozenset(
    {
        _P.ORGANIZATION_READ,
        _P.PEOPLE_READ,
        _P.IDENTITY_READ,
        _P.KEYS_READ,
        _P.USAGE_READ,
        _P.CREDITS_READ,
        _P.LIMITS_READ,
        _P.ALERTS_READ,
        _P.WEBHOOKS_READ,
        _P.LICENSES_READ,
        _P.BILLING_READ,
        _P.EXPORT,
    }
)

PERMISSIONS: Final[dict[Role, frozenset[Permission]]] = {
    # Conversation text is for nobody by role; whoever operates the installation has to say so. What an organization
    # spends is its own to say.
    Role.SYSTEM_ADMIN: frozenset(Permission) - {_P.CONVERSATIONS_TEXT, _P.MODELS_USE, _P.CHARGES_WRITE},
    Role.ORG_ADMIN: _MEMBER
    | _READS_ALL
    | {
        _P.ORGANIZATION_WRITE,
        _P.PEOPLE_WRITE,
        _P.TEAMS_WRITE,
        _P.KEYS_WRITE,
        _P.MARGIN_READ,
        _P.CREDITS_ALLOCATE,
        _P.CREDITS_BUY,
        _P.CHARGES_WRITE,
        _P.LIMITS_WRITE,
        _P.ALERTS_WRITE,
        _P.WEBHOOKS_WRITE,
        _P.REQUESTS_DECIDE,
        _P.LICENSES_WRITE,
        _P.BILLING_WRITE,
        _P.AUDIT_READ,
    },
    Role.FINANCE: _MEMBER | _READS_ALL | {_P.MARGIN_READ, _P.CREDITS_BUY, _P.BILLING_WRITE},
    Role.LICENSE_ADMIN: _MEMBER | {_P.PEOPLE_READ, _P.IDENTITY_READ, _P.LICENSES_READ, _P.LICENSES_WRITE},
    Role.TEAM_LEAD: _MEMBER | {_P.USAGE_TEAM, _P.CREDITS_TEAM, _P.LIMITS_TEAM, _P.REQUESTS_TEAM, _P.EXPORT},
    Role.MEMBER: _MEMBER,
    Role.AUDITOR: _READS_ALL | {_P.AUDIT_READ},
}

# A service key has no person behind it: it may what its organization's administrator may, but neither hand that on, nor
# have events sent elsewhere, nor see the margin.
SERVICE_KEY: Final = PERMISSIONS[Role.ORG_ADMIN] - {
    _P.PEOPLE_WRITE,
    _P.KEYS_WRITE,
    _P.KEYS_OWN,
    _P.CODES_REDEEM,
    _P.WEBHOOKS_WRITE,
    _P.MARGIN_READ,
}

_READING: Final = frozenset(
    each for each in Permission if each.endswith((":read", ":own", ":team")) or each is _P.EXPORT
) - {_P.KEYS_OWN, _P.REQUESTS_OWN, _P.LIMITS_TEAM, _P.REQUESTS_TEAM}

SCOPES: Final[dict[Scope, frozenset[Permission]]] = {
    Scope.INFERENCE: frozenset({_P.MODELS_USE}),
    Scope.READ: _READING,
    Scope.WRITE: frozenset(Permission) - {_P.MODELS_USE},
}

ADMIN_ROLES: Final = frozenset(Role) - {Role.MEMBER}


def permissions_of(roles: Iterable[Role]) -> frozenset[Permission]:
    """All that these roles together may do."""
    return frozenset().union(*(PERMISSIONS[role] for role in roles))


def permissions_in(scopes: Iterable[Scope]) -> frozenset[Permission]:
    """All that a key of these scopes can be used for."""
    return frozenset().union(*(SCOPES[scope] for scope in scopes))
