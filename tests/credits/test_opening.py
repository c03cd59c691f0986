"""Opening balances from CSV: every fault named by line and column, every row granted once."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from bursar import cli, clock, db
from bursar.audit.events import OPERATOR
from bursar.credits import opening
from bursar.credits.grants import GrantSource, list_grants
from bursar.credits.pools import PoolKind, list_pools
from bursar.identity.organizations import get_organization
from bursar.settings import Settings


async def check(database: db.Database, text: str, org: str | None = None) -> opening.Checked:
    return await opening.check_file(database, text.splitlines(keepends=True), default_organization=org)


async def load(database: db.Database, text: str, org: str | None = None) -> list[opening.Fault]:
    checked = await check(database, text, org)
    assert checked.faults == ()
    return await opening.import_rows(database, checked.rows, by=OPERATOR, progress=lambda _: None)


async def test_rows_become_grants_of_the_pool_or_of_a_member(database: db.Database, org: Any) -> None:
    await org.member(email="dana@x.example")
    later = (clock.now() + timedelta(days=30)).date()
    text = (
        "organization,user,credits,paid_usd,free,source,priority,expires_at,reason\n"
        f'{org.slug},,1000.5,10,,,,,"moved, from before"\n'
        f"{org.slug}, DANA@x.example ,20,,yes,complimentary,5,{later},\n"
    )
    assert await load(database, text) == []
    async with org.tenant() as conn:
        grants = await list_grants(conn, organization_id=org.organization_id)
        pools = {each.pool_id: each.kind for each in await list_pools(conn, organization_id=org.organization_id)}
    found = {
        (pools[each.pool_id], each.source, each.amount_micros, each.cost_basis_nano_usd, each.is_free, each.priority)
        for each in grants
    }
    assert found == {
        (PoolKind.SHARED, GrantSource.OPENING, 1_000_500_000, 10_000_000_000, False, 100),
        (PoolKind.PERSONAL, GrantSource.COMPLIMENTARY, 20_000_000, 0, True, 5),
    }
    assert {each.reason for each in grants} == {"moved, from before", None}
    assert {each.expires_at.date() for each in grants if each.expires_at} == {later}


async def test_a_file_again_grants_only_what_was_not_granted(database: db.Database, org: Any) -> None:
    first = "credits,reference\n10,A\n10,B\n"
    await load(database, first, org.slug)
    await load(database, first, org.slug)
    await load(database, first + "10,C\n", org.slug)
    await load(database, "credits\n7\n7\n", org.slug)
    await load(database, "credits\n7\n7\n", org.slug)  # twice the same content is two balances, however often it comes
    async with org.tenant() as conn:
        grants = await list_grants(conn, organization_id=org.organization_id)
    assert sorted(each.amount_micros // 1_000_000 for each in grants) == [7, 7, 10, 10, 10]
    [changed] = await load(database, "credits,reference\n11,A\n", org.slug)
    assert changed.line == 2
    assert "idempotency key" in changed.problem


async def test_what_expired_since_the_file_was_checked_is_a_fault_and_the_others_are_granted(
    database: db.Database, org: Any, make_org: Any
) -> None:
    other = await make_org()
    checked = await check(database, f"organization,credits\n{org.slug},1\n{other.slug},2\n{org.slug},3\n")
    gone = replace(checked.rows[0], expires_at=clock.now())
    [fault] = await opening.import_rows(database, [gone, *checked.rows[1:]], by=OPERATOR, progress=lambda _: None)
    assert (fault.line, "expired" in fault.problem) == (2, True)
    for each, amount in ((other, 2), (org, 3)):
        async with each.tenant() as conn:
            grants = await list_grants(conn, organization_id=each.organization_id)
            recorded = "select new_value from audit.events where organization_id = %s and action = 'balances.imported'"
            rows = await (await conn.execute(recorded, [each.organization_id])).fetchall()
        assert [grant.amount_micros for grant in grants] == [amount * 1_000_000]
        assert [row[0]["rows"] for row in rows] == [1 if each is other else 2]


async def test_the_largest_balance_can_be_brought_along(database: db.Database, org: Any) -> None:
    assert await load(database, "credits,priority\n1000000000,32767\n", org.slug) == []


async def test_the_same_reference_in_another_organization_is_another_balance(
    database: db.Database, org: Any, make_org: Any
) -> None:
    other = await make_org()
    text = f"organization,credits,reference\n{org.slug},1,A\n{other.slug},1,A\n"
    for _ in range(2):
        assert await load(database, text) == []
    for each in (org, other):
        async with each.tenant() as conn:
            assert len(await list_grants(conn, organization_id=each.organization_id)) == 1


async def test_a_person_of_an_individual_account_is_granted_into_it(database: db.Database, org: Any) -> None:
    user = await org.user()
    async with database.tenant(user.home_organization_id) as conn:
        home = await get_organization(conn, organization_id=user.home_organization_id)
    assert await load(database, f"organization,user,credits\n{home.slug},whoever,5\n") == []
    async with database.tenant(home.organization_id) as conn:
        [pool] = await list_pools(conn, organization_id=home.organization_id)
    assert (pool.kind, pool.available_micros) == (PoolKind.INDIVIDUAL, 5_000_000)


async def test_a_row_is_known_by_all_that_it_says(database: db.Database, org: Any) -> None:
    rows = []
    for nr, (column, values) in enumerate(
        {"paid_usd": "12", "free": ("yes", "no"), "source": ("plan", "purchase"), "priority": "12", "reason": "ab",
         "effective_at": ("2090-01-01", "2090-01-02"), "expires_at": ("2090-01-01", "2090-01-02"),
         "user": [f"{each}@{org.slug}.example" for each in "ab"]}.items(), start=1,
    ):  # fmt: skip
        if column == "user":
            for email in values:
                await org.member(email=email)
        rows.append([f"credits,{column}\n{nr},{value}\n" for value in values])
    for first, second in rows:
        assert await load(database, first, org.slug) == []
        assert await load(database, second, org.slug) == [], "another one"
        assert await load(database, first, org.slug) == [], "the first one again"
    async with org.tenant() as conn:
        assert len(await list_grants(conn, organization_id=org.organization_id)) == 2 * len(rows)


async def test_an_import_that_ended_in_the_middle_is_gone_on_with(database: db.Database, org: Any) -> None:
    text = "credits\n1\n2\n3\n"
    checked = await check(database, text, org.slug)

    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await opening.import_rows(database, checked.rows, by=OPERATOR, progress=stop)
    await load(database, text, org.slug)
    async with org.tenant() as conn:
        grants = await list_grants(conn, organization_id=org.organization_id)
    assert sorted(each.amount_micros // 1_000_000 for each in grants) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "line", "column", "problem"),
    [
        ("user\nx\n", 1, "credits", "missing"),
        ("credits,colour\n1,red\n", 1, "colour", "no such column"),
        ("credits,credits\n1,1\n", 1, "credits", "twice"),
        ("credits\n1,2\n", 2, None, "more or fewer"),
        ("credits,user\n1\n", 2, None, "more or fewer"),
        ("credits\n\n-1\n", 3, "credits", "more than 0"),
        ("credits\n0\n", 2, "credits", "more than 0"),
        ("credits\n1e3\n", 2, "credits", ""),
        ("credits\n1.0000001\n", 2, "credits", ""),
        ("credits\n99999999999\n", 2, "credits", "at most a billion"),
        ("credits,paid_usd\n1,-1\n", 2, "paid_usd", "not negative"),
        ("credits,free\n1,perhaps\n", 2, "free", "none of"),
        ("credits,source\n1,gift\n", 2, "source", "none of"),
        ("credits,source\n1,refund\n", 2, "source", "none of"),
        ("credits,priority\n1,40000\n", 2, "priority", "0 to 32767"),
        ("credits,expires_at\n1,tomorrow\n", 2, "expires_at", "no date"),
        ("credits,expires_at\n1,2020-01-01\n", 2, "expires_at", "would have expired"),
        ("credits,effective_at,expires_at\n1,2020-01-01,2020-02-01\n", 2, "expires_at", "would have expired"),
        ("credits,effective_at,expires_at\n1,2090-01-01,2080-02-01\n", 2, "expires_at", "would have expired"),
        ("credits,effective_at,expires_at\n1,2090-01-01,2090-01-01\n", 2, "expires_at", "would have expired"),
        ("credits\n1000000000.000001\n", 2, "credits", "at most a billion"),
        ("credits,priority\n1,-1\n", 2, "priority", "0 to 32767"),
        ("credits,priority\n1,32768\n", 2, "priority", "0 to 32767"),
        ("credits,reason\n1,\0\n", 2, "reason", "code 0"),
        ("credits,user\n1,nobody@x.example\n", 2, "user", "no member"),
        ("credits,user\n1,nonsense\n", 2, "user", "no member"),
        ("credits,organization\n1,no-such-one\n", 2, "organization", "there is no organization"),
        ("credits,reference\n1,A\n2,A\n", 3, "reference", "before"),
        ('credits,reason\n1,"open\n', 1, None, "no CSV"),  # the last line that could be read
    ],
)
async def test_each_fault_is_named_by_line_and_column(
    database: db.Database, org: Any, text: str, line: int, column: str | None, problem: str
) -> None:
    found = (await check(database, text, org.slug)).faults
    assert [(each.line, each.column) for each in found] == [(line, column)], found
    assert problem in found[0].problem


async def test_members_with_balances_of_their_own_are_named(database: db.Database, make_org: Any) -> None:
    apart = await make_org(is_shared_token_pool=False)
    [fault] = (await check(database, "credits\n1\n", apart.slug)).faults
    assert fault.column == "user"
    [fault] = (await check(database, "credits\n1\n")).faults
    assert fault.column == "organization"


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Any:
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", str(settings.given_master_key))

    def call(content: bytes, *words: str) -> tuple[int, str, str]:
        (tmp_path / "balances.csv").write_bytes(content)
        code = cli.run(["credits", "import", str(tmp_path / "balances.csv"), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_the_command_imports_all_or_nothing_unless_told(run: Any, org: Any) -> None:
    at = ("--org", org.slug, "--json")
    good = b"\xef\xbb\xbfcredits\r\n5\r\n"
    code, out, _ = run(good, *at, "--dry-run")
    assert (code, json.loads(out)["imported"], json.loads(out)["organizations"][0]["credits"]) == (0, False, "5")
    code, out, _ = run(b"credits\n5\nfive\n", *at)
    assert (code, json.loads(out)["imported"], json.loads(out)["faults"][0]["line"]) == (2, False, 3)
    code, out, _ = run(b"credits\n5\nfive\n", *at, "--skip-bad")
    assert (code, json.loads(out)["imported"], json.loads(out)["organizations"][0]["rows"]) == (7, True, 1)
    code, out, _ = run(good, *at)
    assert (code, json.loads(out)["imported"]) == (0, True)
    assert run(b"credits\n\xff\n", *at)[0] == 2
    code, _, err = run(b"credits\nfive\n", "--org", org.slug)
    assert code == 2
    assert "line 2, credits" in err
