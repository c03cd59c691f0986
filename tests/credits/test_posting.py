"""Events are numbered by their object, and told to whoever asked and may know: each rule by its smallest scene."""

from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb
from tests.credits.scenes import Scene

from bursar.clock import uuid7


def post(scene: Scene, kind: str = "pool.low", of: UUID | None = None, **payload: Any) -> UUID:
    """An event of an object, of a new one where none is named."""
    with scene.acting_as("bursar_app", scene.organization):
        row = scene.conn.execute(
            "select outbox.post_event(%s, %s, 'pool', %s, %s)",
            [scene.organization, kind, of or uuid7(), Jsonb(payload)],
        ).fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def member(scene: Scene, *roles: str, team: UUID | None = None) -> UUID:
    user = scene.user(team=team)
    scene.admin("update identity.memberships set roles = %s where user_id = %s", list(roles or ["member"]), user)
    return user


def endpoint(scene: Scene, *kinds: str, state: str = "active") -> UUID:
    made = uuid7()
    scene.admin(
        "insert into outbox.endpoints (organization_id, endpoint_id, url, kinds, state, ended_at)"
        " values (%s, %s, 'https://x.example', %s, %s, case %s when 'active' then null else now() end)",
        scene.organization, made, list(kinds), state, state,
    )  # fmt: skip
    return made


def told(scene: Scene, event: UUID) -> set[UUID]:
    """The endpoints that an event goes to."""
    return {row[0] for row in scene.admin("select endpoint_id from outbox.deliveries where event_id = %s", event)}


def mailed(scene: Scene, event: UUID) -> set[UUID]:
    """The members whom an event is mailed to."""
    return {
        row[0] for row in scene.admin(
            "select m.user_id from outbox.mails m join outbox.mail_events e using (organization_id, mail_id)"
            " where e.event_id = %s", event,
        )
    }  # fmt: skip


def public(user: UUID) -> str:
    return f"usr_{user.hex}"


def test_the_events_of_each_object_are_numbered_by_themselves(scene: Scene) -> None:
    elsewhere, one, two = Scene(scene.conn), uuid7(), uuid7()
    events = [post(scene, of=one), post(scene, of=two), post(elsewhere, of=one), post(scene, "pool.empty", of=one)]
    numbers = "select sequence from outbox.events where event_id = %s"
    assert [scene.admin(numbers, each)[0][0] for each in events] == [1, 1, 1, 2]


def test_an_event_goes_to_endpoints_that_are_in_use_and_asked_for_its_kind(scene: Scene) -> None:
    elsewhere = Scene(scene.conn)
    endpoint(elsewhere, "*")
    for state in ("disabled", "removed"):
        endpoint(scene, "*", state=state)
    everything, pools, low, both = (
        endpoint(scene, *kinds) for kinds in (["*"], ["pool.*"], ["pool.low"], ["topup.failed", "webhook.*"])
    )
    assert told(scene, post(scene)) == {everything, pools, low}
    assert told(scene, post(scene, "pool.empty")) == {everything, pools}
    assert told(scene, post(scene, "topup.failed")) == {everything, both}
    assert told(scene, post(scene, "topup.succeeded")) == {everything}
    assert told(scene, post(scene, "webhook.disabled")) == {both}, "what webhooks say of themselves must be named"


def test_each_kind_is_mailed_to_those_whom_it_concerns(scene: Scene) -> None:
    elsewhere, team, other_team = Scene(scene.conn), scene.team(), scene.team()
    member(elsewhere, "org_admin", "finance")
    admin, payer, asker = member(scene, "org_admin"), member(scene, "finance"), member(scene, team=team)
    gone, lead, other_lead = member(scene, "org_admin", "finance"), member(scene), member(scene)
    scene.admin("update identity.memberships set status = 'suspended' where user_id = %s", gone)
    member(scene, team=other_team)
    for leads, led in ((lead, team), (other_lead, other_team)):
        scene.admin("update identity.teams set lead_user_id = %s where team_id = %s", leads, led)
    who = {"user_id": public(asker)}
    assert {kind: mailed(scene, post(scene, kind, **who)) for kind in (
        "topup.succeeded", "topup.failed", "topup.runaway", "topup.requested", "webhook.disabled", "request.created",
        "request.decided", "pool.low",
    )} == {
        "topup.succeeded": {admin, payer}, "topup.failed": {admin, payer}, "topup.runaway": {admin, payer},
        "topup.requested": set(), "webhook.disabled": {admin}, "request.created": {admin, lead},
        "request.decided": {asker}, "pool.low": set(),
    }  # fmt: skip
    assert mailed(scene, post(scene, "request.decided", user_id=public(gone))) == set()


def collect(scene: Scene, event: UUID, users: list[UUID], addresses: list[str], minutes: int = 5) -> None:
    with scene.acting_as("bursar_app", scene.organization):
        scene.conn.execute(
            "select outbox.mail_event(%s, %s, %s, %s, %s)", [scene.organization, event, users, addresses, minutes]
        )


def mails(scene: Scene) -> list[tuple[Any, ...]]:
    """(reader, how many events) of each e-mail, in the order of reader and number."""
    return sorted(
        scene.admin(
            "select coalesce(m.user_id::text, m.address), count(*) from outbox.mails m"
            " join outbox.mail_events e using (organization_id, mail_id) where m.organization_id = %s"
            " group by m.organization_id, m.mail_id", scene.organization,
        )
    )  # fmt: skip


def test_what_happens_while_an_email_collects_joins_the_one_of_the_same_reader(scene: Scene) -> None:
    elsewhere, one, two = Scene(scene.conn), member(scene), member(scene)
    collect(elsewhere, post(elsewhere), [one], ["a@x.example"])
    collect(scene, post(scene), [one, one], ["a@x.example", "a@x.example"])
    collect(scene, post(scene), [one, two], ["a@x.example", "b@x.example"])
    assert mails(scene) == sorted([(str(one), 2), (str(two), 1), ("a@x.example", 2), ("b@x.example", 1)])


def test_an_email_that_is_on_its_way_takes_nothing_more(scene: Scene) -> None:
    user = member(scene)
    for change in (
        "attempts = 1",
        "next_attempt_at = clock_timestamp() - interval '1 second'",
        "state = 'sent', ended_at = now()",
    ):
        collect(scene, post(scene), [user], [])
        scene.admin(f"update outbox.mails set {change} where organization_id = %s", scene.organization)
    collect(scene, post(scene), [user], [])
    assert mails(scene) == [(str(user), 1)] * 4


def test_what_a_money_function_posts_is_told_in_its_own_organization_alone(scene: Scene) -> None:
    elsewhere = Scene(scene.conn)
    admin, pool = member(scene, "org_admin"), scene.pool()
    member(elsewhere, "org_admin")
    endpoint(elsewhere, "*")
    own = endpoint(scene, "*")
    scene.admin(
        "insert into outbox.mails (organization_id, mail_id, user_id, next_attempt_at)"
        " values (%s, %s, %s, now() + interval '1 hour')", elsewhere.organization, uuid7(), admin,
    )  # fmt: skip
    top_up = uuid7()
    with scene.acting_as("bursar_app", scene.organization):
        for command in (
            "select credits.set_top_up(%(org)s, %(pool)s, 100, 500, 500, 3, null)",
            "select credits.begin_top_up(%(org)s, %(pool)s, %(id)s)",
            "select credits.decide_top_up(%(org)s, %(id)s, false, null, null, null)",
        ):
            scene.conn.execute(command, {"org": scene.organization, "pool": pool, "id": top_up})
    events = scene.admin(
        "select kind, event_id from outbox.events where organization_id = %s order by sequence", scene.organization
    )
    assert [(kind, told(scene, event), mailed(scene, event)) for kind, event in events] == [
        ("topup.requested", {own}, set()),
        ("topup.failed", {own}, {admin}),
    ]


def test_what_is_only_played_through_is_mailed_to_nobody(scene: Scene) -> None:
    member(scene, "org_admin")
    pool = scene.pool()
    for _ in range(2):
        scene.call("select credits.set_top_up(%s, %s, 100, 500, 500, 3, null, %s)", scene.organization, pool, scene.now)
    scene.call("select (credits.begin_top_up(%s, %s, %s, %s)).top_up_id", scene.organization, pool, uuid7(), scene.now)
    top_up = scene.admin("select top_up_id from credits.top_ups where pool_id = %s", pool)[0][0]
    scene.call("select (credits.decide_top_up(%s, %s, false, null, null, null, %s)).state", scene.organization, top_up,
               scene.now)  # fmt: skip
    assert scene.admin("select count(*) from outbox.events where organization_id = %s", scene.organization) == [(2,)]
    assert mails(scene) == []


# ---------------------------------------------------------------------------------------------- what ends


def purge(scene: Scene, days: int = 30, most: int = 100, tenant: UUID | None = None) -> int:
    with scene.acting_as("bursar_app", tenant or scene.organization):
        row = scene.conn.execute("select outbox.purge(%s, %s, %s)", [scene.organization, days, most]).fetchone()
    assert row is not None
    return int(row[0])


def long_ago(scene: Scene, days: int = 31) -> None:
    """Everything of the organization was posted, and what has ended ended, so many days ago."""
    for table, column in (("events", "posted_at"), ("deliveries", "ended_at"), ("mails", "ended_at")):
        trigger = f"alter table outbox.{table} {{}} trigger user" if table == "events" else ""
        if trigger:
            scene.admin(trigger.format("disable"))
        scene.admin(
            f"update outbox.{table} set {column} = now() - make_interval(days => %s)"
            f" where organization_id = %s and {column} is not null", days, scene.organization,
        )  # fmt: skip
        if trigger:
            scene.admin(trigger.format("enable"))


def left(scene: Scene) -> list[UUID]:
    rows = scene.admin("select event_id from outbox.events where organization_id = %s", scene.organization)
    return [row[0] for row in rows]


def test_of_what_was_told_long_ago_the_last_of_each_object_stays(scene: Scene) -> None:
    elsewhere, one, two = Scene(scene.conn), uuid7(), uuid7()
    kept_elsewhere = [post(elsewhere, of=one) for _ in range(3)]
    events = [post(scene, of=each) for each in (one, one, one, two)]
    for each in (scene, elsewhere):
        long_ago(each, 30)
    assert purge(scene, days=31) == 0
    assert purge(scene, days=29, most=1) == 1
    assert purge(scene, days=29) == 1
    assert sorted(left(scene)) == sorted(events[2:])
    assert sorted(left(elsewhere)) == sorted(kept_elsewhere)


def test_an_event_stays_as_long_as_somebody_is_still_to_be_told(scene: Scene) -> None:
    elsewhere, one, user = Scene(scene.conn), uuid7(), member(scene)
    endpoint(scene, "pool.low")
    told_by_hook, mailed_one, nobodys, last = (
        post(scene, kind, of=one) for kind in ("pool.low", "pool.empty", "pool.empty", "pool.empty")
    )
    collect(scene, mailed_one, [user], [])
    long_ago(scene)
    assert purge(scene) == 1
    assert sorted(left(scene)) == sorted([told_by_hook, mailed_one, last])
    scene.admin("update outbox.deliveries set state = 'delivered', ended_at = now() where event_id = %s", told_by_hook)
    scene.admin(
        "update outbox.mails set state = 'sent', ended_at = now() where organization_id = %s", scene.organization
    )
    assert purge(scene) == 0, "both have ended today"
    long_ago(scene)
    with scene.refusal("BR404"):
        purge(scene, tenant=elsewhere.organization)
    assert purge(scene) == 4
    assert left(scene) == [last]
    with scene.refusal("22023"):
        purge(scene, days=0)
    assert nobodys
