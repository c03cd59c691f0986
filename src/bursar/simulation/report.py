"""What came of a scenario, as the JSON that `bursar simulate` prints: amounts are decimal credits as text."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from bursar.money import Micros, format_credits
from bursar.simulation.figures import Figures, GrantFigures, HoldFigures, LimitFigures, PoolFigures, Segment
from bursar.simulation.playing import Played, Refusal


def as_json(played: Played) -> dict[str, Any]:
    """The whole answer."""
    names = played.names
    return {
        "unit": "credit",
        "asked": [_figures(each, names) for each in played.asked],
        "segments": [_segment(each, names) for each in played.segments],
        "refusals": [_refusal(each) for each in played.refusals],
    }


def _figures(figures: Figures, names: dict[UUID, str]) -> dict[str, Any]:
    return {
        "at": _instant(figures.at),
        "balance": format_credits(figures.available),
        "overage": format_credits(figures.overage),
        "grants": _balances(figures, names),
        "grant_details": [_grant(each, names) for each in figures.grants],
        "pools": [_pool(each, names) for each in figures.pools],
        "limits": [_limit(each, names) for each in figures.limits],
        "holds": [_hold(each, names) for each in figures.holds],
    }


def _balances(figures: Figures, names: dict[UUID, str]) -> dict[str, str]:
    """What each told grant can pay, with all that came of it; what was forgiven is gone at once."""
    sums: dict[str, int] = {}
    for each in figures.grants:
        if each.source != "forgiveness":
            sums[names[each.grant_id]] = sums.get(names[each.grant_id], 0) + each.balance
    return {name: format_credits(Micros(amount)) for name, amount in sums.items()}


def _pool(pool: PoolFigures, names: dict[UUID, str]) -> dict[str, Any]:
    figures = {name: format_credits(getattr(pool, name)) for name in ("available", "used", "held", "overage")}
    return {"id": names[pool.pool_id], **figures}


def _grant(grant: GrantFigures, names: dict[UUID, str]) -> dict[str, Any]:
    amounts = ("amount", "balance", "burnt", "expired", "voided", "refunded")
    return {
        "id": names[grant.grant_id],
        "pool": names[grant.pool_id],
        "source": grant.source,
        "state": grant.state,
        "effective_at": _instant(grant.effective_at),
        "expires_at": _instant(grant.expires_at),
        **{name: format_credits(getattr(grant, name)) for name in amounts},
    }


def _limit(limit: LimitFigures, names: dict[UUID, str]) -> dict[str, Any]:
    amounts = {"limit": limit.limit_amount, "used": limit.used, "held": limit.held, "overage": limit.overage}
    shown = {name: format_credits(Micros(n)) if limit.metric == "credits" else str(n) for name, n in amounts.items()}
    return {
        "id": names[limit.balance_id],
        "metric": limit.metric,
        "period": limit.period,
        **shown,
        "resets_at": _instant(limit.resets_at),
    }


def _hold(hold: HoldFigures, names: dict[UUID, str]) -> dict[str, Any]:
    return {"id": names[hold.request_id], "held": format_credits(hold.held), "placed_at": _instant(hold.placed_at)}


def _segment(segment: Segment, names: dict[UUID, str]) -> dict[str, Any]:
    return {
        "pool": names[segment.pool_id],
        "from": _instant(segment.starts_at),
        "to": _instant(segment.ends_at),
        "balance_at_start": format_credits(segment.balance),
        "overage_at_start": format_credits(segment.overage_at_start),
        "used": format_credits(segment.used),
        "grants": [{"id": name, "used": format_credits(Micros(amount))} for name, amount in _paid(segment, names)],
        "overage": format_credits(segment.overage),
    }


def _paid(segment: Segment, names: dict[UUID, str]) -> Iterable[tuple[str, int]]:
    sums: dict[str, int] = {}
    for grant_id, amount in segment.paid:
        sums[names[grant_id]] = sums.get(names[grant_id], 0) + amount
    return sums.items()


def _refusal(refusal: Refusal) -> dict[str, Any]:
    return {
        "at": _instant(refusal.at),
        "event": refusal.kind,
        "id": refusal.name,
        "amount": None if refusal.amount is None else format_credits(refusal.amount),
        "code": refusal.code,
        "detail": refusal.detail,
        "refused_by": refusal.binding,
        "available": None if refusal.available is None else format_credits(refusal.available),
    }


def _instant(at: datetime | None) -> str | None:
    return at.isoformat().replace("+00:00", "Z") if at else None
