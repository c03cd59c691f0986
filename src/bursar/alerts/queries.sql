-- name: begin_looks
insert into alerts.looks (organization_id, looked_until, leased_until, swept_at)
values (%(organization_id)s, clock_timestamp() - interval '10 minutes', '-infinity', '-infinity')
on conflict (organization_id) do nothing;

-- name: claim_look
-- The instant from which to look: a little before the last look's, for what was being booked and not yet committed then.
with held as (
    select organization_id, looked_until from alerts.looks
    where organization_id = %(organization_id)s and leased_until < clock_timestamp()
      and looked_until < clock_timestamp() - make_interval(secs => %(pause_seconds)s)
    for update skip locked)
update alerts.looks l set leased_until = clock_timestamp() + make_interval(secs => %(lease_seconds)s)
from held h
where l.organization_id = h.organization_id
returning greatest(h.looked_until, clock_timestamp() - interval '10 minutes') - interval '3 seconds' as since, clock_timestamp() as now,
    h.looked_until < clock_timestamp() - interval '10 minutes' or l.swept_at < clock_timestamp() - interval '1 hour' as is_sweep_due;

-- name: note_look
-- After one that took more than half a second, the next comes ten times as much later, but within 15 s: where there is very much to look at,
-- looking takes about a tenth of one processor.
update alerts.looks set looked_until = greatest(looked_until, %(now)s),
    leased_until = clock_timestamp() + least(interval '15 seconds', greatest(interval '0', clock_timestamp() - %(now)s - interval '500 milliseconds') * 10)
where organization_id = %(organization_id)s;

-- name: plan_by_index
-- The tables are large and what is looked for is little: a plan that reads a table to its end is never meant.
select set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),
    set_config('jit', 'off', true);

-- name: note_sweep
update alerts.looks set swept_at = %(at)s where organization_id = %(organization_id)s;

-- name: crossed_by_use
-- Whose requests were booked or refused since: their balances, of which only those are weighed that can have reached anything.
-- The index goes by the instant of use, which is that of booking but for corrections and what came late; those are left to the sweep.
with used as materialized (
    select g.organization_id, a.chain_id
    from credits.gates g
    cross join lateral (
        select distinct a.chain_id from ledger.attribution a
        where a.organization_id = g.organization_id and a.used_at > %(since)s
          and a.booked_at > %(since)s - interval '1 minute' and a.booked_at < %(now)s + interval '1 day') a),
refused as materialized (
    select g.organization_id, u.binding_id
    from credits.gates g
    cross join lateral (
        select distinct u.binding_id from credits.unbilled_requests u
        where u.organization_id = g.organization_id and u.happened_at > %(since)s and u.outcome = 'refused' and u.binding_id is not null) u),
touched as (
    select u.organization_id, e.id as balance_id, e.start as period_start
    from used u
    join credits.chains c on c.organization_id = u.organization_id and c.chain_id = u.chain_id
    cross join lateral unnest(c.entry_ids, c.entry_starts) e(id, start)
    union
    select r.organization_id, r.binding_id, b.period_start
    from refused r
    cross join lateral (
        select b.period_start from credits.balances b
        where b.organization_id = r.organization_id and b.balance_id = r.binding_id
        order by b.period_start desc limit 1) b),
least_of as (
    select organization_id, min(t) filter (where measure = 'percent') as percent, bool_or(measure = 'left') as by_left
    from alerts.rules r left join lateral unnest(r.thresholds) t on true
    where ended_at is null group by 1),
weighed as (
    select t.organization_id, t.balance_id, t.period_start
    from touched t
    join credits.balances b on b.organization_id = t.organization_id and b.balance_id = t.balance_id and b.period_start = t.period_start
    left join least_of l on l.organization_id = t.organization_id
    where b.kind <> 'open' and (b.kind = 'pool' or l.by_left or b.used_amount::numeric * 100 >= b.limit_amount::numeric * least(l.percent, 50)))
select c.* from (
    select array_agg(organization_id) as organization_ids, array_agg(balance_id) as balance_ids, array_agg(period_start) as period_starts
    from weighed) w
cross join lateral alerts.crossed(w.organization_ids, w.balance_ids, w.period_starts, %(since)s) c
order by c.organization_id, c.balance_id, c.rule_id;

-- name: organizations_after
select organization_id from credits.gates where organization_id > %(after)s order by organization_id limit %(most)s;

-- name: crossed_of_organizations
with defined as (
    select organization_id, pool_id as balance_id from credits.pools where organization_id = any (%(organization_ids)s) and closed_at is null
    union all
    select organization_id, allocation_id from credits.allocations where organization_id = any (%(organization_ids)s) and ended_at is null
    union all
    select organization_id, balance_id from credits.limits
    where organization_id = any (%(organization_ids)s) and ended_at is null and balance_id is not null
    union
    select organization_id, balance_id from credits.counters where organization_id = any (%(organization_ids)s)),
present as (
    select d.organization_id, d.balance_id, b.period_start
    from defined d
    cross join lateral (
        select b.period_start, b.period_end from credits.balances b
        where b.organization_id = d.organization_id and b.balance_id = d.balance_id
        order by b.period_start desc limit 1) b
    where b.period_end > clock_timestamp())
select c.* from (
    select array_agg(organization_id) as organization_ids, array_agg(balance_id) as balance_ids, array_agg(period_start) as period_starts
    from present) w
cross join lateral alerts.crossed(w.organization_ids, w.balance_ids, w.period_starts, clock_timestamp() - interval '1 hour') c
order by c.organization_id, c.balance_id, c.rule_id;

-- name: take
-- Whoever changes what was seen to be told tells it; another one who saw the same changes nothing.
insert into alerts.reached (organization_id, rule_id, balance_id, period_start, level, limit_amount, used_amount)
values (%(organization_id)s, %(rule_id)s, %(balance_id)s, %(period_start)s::timestamptz, %(level)s, %(limit_amount)s, %(used_amount)s)
on conflict (organization_id, rule_id, balance_id, period_start) do update
set level = excluded.level, limit_amount = excluded.limit_amount, used_amount = excluded.used_amount, told_at = clock_timestamp()
where reached.level = %(told_level)s and reached.limit_amount = %(told_limit)s
returning level;

-- name: take_notice
insert into alerts.notices (organization_id, kind, object_id, at) values (%(organization_id)s, %(kind)s, %(object_id)s, %(at)s)
on conflict do nothing
returning object_id;

-- name: subject
-- What a balance is, whose, and what it does when it is full.
select b.kind, coalesce(p.name, q.name) as pool_name, p.kind as pool_kind, a.when_empty,
    coalesce(l.scope, case when i.user_id is not null then 'user' else 'organization' end) as scope, coalesce(l.metric, 'credits') as metric,
    l.model_filter, coalesce(l.period, a.period, 'none') as period, coalesce(l.action, case when b.stops then 'stops' else 'warns' end) as action,
    i.user_id, coalesce(k.name, t.name, d.name) as scope_name, coalesce(t.lead_user_id, mt.lead_user_id) as lead_user_id, o.slug, o.zone
from credits.balances b
join identity.organizations o on o.organization_id = b.organization_id
left join credits.pools p on p.organization_id = b.organization_id and p.pool_id = b.balance_id
left join credits.allocations a on a.organization_id = b.organization_id and a.allocation_id = b.balance_id
left join credits.pools q on q.organization_id = b.organization_id and (q.pool_id = a.pool_id or q.open_part_id = b.balance_id)
left join credits.counters c on c.organization_id = b.organization_id and c.balance_id = b.balance_id
left join lateral (
    select l.scope, coalesce(l.scope_id, c.subject_id) as scope_id, l.metric, l.model_filter, l.period, l.action
    from credits.limits l
    where l.organization_id = b.organization_id and (l.balance_id = b.balance_id or l.limit_id = c.limit_id)
    order by l.ended_at is not null, l.is_default, l.ended_at desc limit 1) l on true
left join identity.api_keys k on l.scope = 'key' and k.organization_id = b.organization_id and k.api_key_id = l.scope_id
left join identity.teams t on l.scope = 'team' and t.organization_id = b.organization_id and t.team_id = l.scope_id
left join identity.departments d on l.scope = 'department' and d.organization_id = b.organization_id and d.department_id = l.scope_id
cross join lateral (select coalesce(p.owner_user_id, a.user_id, case l.scope when 'user' then l.scope_id when 'key' then k.user_id end) as user_id
    offset 0) i  -- as a value of its own: row-level security lets no index be used for coalesce
left join identity.memberships m on m.organization_id = b.organization_id and m.user_id = i.user_id
left join identity.teams mt on mt.organization_id = m.organization_id and mt.team_id = m.team_id
where b.organization_id = %(organization_id)s and b.balance_id = %(balance_id)s
limit 1;

-- name: members_with
select user_id from identity.memberships
where organization_id = %(organization_id)s and status = 'active' and roles && %(roles)s order by user_id;

-- name: mail_event
select outbox.mail_event(%(organization_id)s, %(event_id)s, %(user_ids)s, %(addresses)s, %(collect_minutes)s);

-- name: refused_now
-- Of each balance that refused since the last look and was not told of in this hour: how often it refused in the hour before now.
select g.organization_id, u.binding_id as balance_id, date_trunc('hour', %(now)s::timestamptz) as at, u.refusals
from credits.gates g
cross join lateral (
    select u.binding_id, count(*) as refusals from credits.unbilled_requests u
    where u.organization_id = g.organization_id and u.happened_at > %(now)s::timestamptz - interval '1 hour' and u.outcome = 'refused'
      and u.binding_id is not null
      and exists (select from credits.unbilled_requests v
                  where v.organization_id = g.organization_id and v.happened_at > %(since)s and v.outcome = 'refused')
    group by u.binding_id having max(u.happened_at) > %(since)s) u
where not exists (
    select from alerts.notices n
    where n.organization_id = g.organization_id and n.kind = 'deduction.refused' and n.object_id = u.binding_id
      and n.at = date_trunc('hour', %(now)s::timestamptz));

-- name: expiring
select g.organization_id, g.grant_id, g.pool_id, g.source, g.amount_micros, least(t.left_micros, greatest(0, b.limit_amount - b.used_amount)) as left_micros,
    g.expires_at
from credits.grant_states t
join credits.grants g on g.organization_id = t.organization_id and g.grant_id = t.grant_id
join credits.balances b on b.organization_id = t.organization_id and b.balance_id = t.pool_id
where t.state = 'active' and t.left_micros > 0 and b.limit_amount > b.used_amount
  and g.expires_at > clock_timestamp() and g.expires_at <= clock_timestamp() + make_interval(days => %(days)s)
  and g.effective_at < g.expires_at - make_interval(days => %(days)s)
  and not exists (select from alerts.notices n
                  where n.organization_id = g.organization_id and n.kind = 'grant.expiring' and n.object_id = g.grant_id and n.at = g.expires_at)
limit 1000;

-- name: expired
select e.organization_id, e.grant_id, e.from_id as pool_id, g.source, g.amount_micros, e.lost_micros as left_micros, g.expires_at
from (
    select g.organization_id, e.grant_id, e.from_id, e.lost_micros
    from credits.gates g
    cross join lateral (
        select e.grant_id, e.from_id, sum(e.amount)::bigint as lost_micros from ledger.entries e
        where e.organization_id = g.organization_id and e.booked_at > clock_timestamp() - interval '1 day' and e.kind = 'expiry'
        group by 1, 2) e) e
join credits.grants g on g.organization_id = e.organization_id and g.grant_id = e.grant_id
where not exists (select from alerts.notices n
                  where n.organization_id = e.organization_id and n.kind = 'grant.expired' and n.object_id = e.grant_id and n.at = g.expires_at)
limit 1000;

-- name: rules
select rule_id, watches, object_id, measure, thresholds, readers, addresses, collect_minutes, created_at, false as is_default
from alerts.rules where organization_id = %(organization_id)s and ended_at is null
union all
select d.rule_id, w.watches, null, d.measure, d.thresholds, d.readers, d.addresses, d.collect_minutes, null, true
from (values ('pool'), ('allocation'), ('limit')) w(watches)
cross join lateral alerts.default_rule(w.watches) d
where not exists (select from alerts.rules r
                  where r.organization_id = %(organization_id)s and r.ended_at is null and r.watches = w.watches and r.object_id is null)
order by watches, object_id nulls first, measure;

-- name: end_rule
update alerts.rules set ended_at = clock_timestamp()
where organization_id = %(organization_id)s and ended_at is null and watches = %(watches)s and object_id is not distinct from %(object_id)s
  and (%(measure)s::text is null or measure = %(measure)s)
returning rule_id;

-- name: add_rule
insert into alerts.rules (organization_id, rule_id, watches, object_id, measure, thresholds, readers, addresses, collect_minutes, created_by)
values (%(organization_id)s, %(rule_id)s, %(watches)s, %(object_id)s, %(measure)s, %(thresholds)s, %(readers)s, %(addresses)s,
    %(collect_minutes)s, %(created_by)s);

-- name: balance_of
-- The balance of a pool, share or limit, by the id that people know it by.
select pool_id from credits.pools where organization_id = %(organization_id)s and pool_id = %(object_id)s and %(watches)s = 'pool'
union all
select allocation_id from credits.allocations
where organization_id = %(organization_id)s and allocation_id = %(object_id)s and %(watches)s = 'allocation'
union all
select balance_id from credits.limits
where organization_id = %(organization_id)s and %(object_id)s in (limit_id, balance_id) and balance_id is not null and %(watches)s = 'limit'
limit 1;

-- name: told
select event_id, kind, object_kind, object_id, sequence, payload, happened_at
from outbox.events
where organization_id = %(organization_id)s and kind <> 'webhook.test'
order by posted_at desc, event_id
limit %(most)s;

-- name: preview
-- How often each level would have been told: periods that began since, by how full they were in the end; balances without periods, and shares
-- that are renewed, as they are now.
select x.watches, x.threshold, count(*) as times, count(distinct x.balance_id) as balances
from (
    select b.kind as watches, b.balance_id, t as threshold
    from credits.balances b
    cross join lateral unnest(%(thresholds)s::bigint[]) t
    left join credits.allocations a on b.kind = 'allocation' and a.organization_id = b.organization_id and a.allocation_id = b.balance_id
    left join credits.allocation_periods ap on ap.organization_id = a.organization_id and ap.allocation_id = a.allocation_id
        and ap.period_end = a.renews_at
    cross join lateral (
        select case when b.kind <> 'pool' then b.limit_amount - coalesce(ap.opening_micros, 0) else greatest(b.limit_amount - b.used_amount, (
            select coalesce(sum(g.amount_micros), 0)::bigint
            from credits.grant_states s
            join credits.grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
            where s.organization_id = b.organization_id and s.pool_id = b.balance_id and s.state in ('active', 'lingering'))) end as filled) f
    where b.organization_id = %(organization_id)s and b.kind = %(watches)s
      and (%(object_id)s::uuid is null or b.balance_id = %(object_id)s)
      and (b.period_start = '-infinity' or b.period_end > %(since)s)
      and alerts.level(%(measure)s, array[t], f.filled, greatest(0, b.limit_amount - b.used_amount)) = 1) x
group by 1, 2
order by 1, case when %(measure)s = 'percent' then x.threshold else -x.threshold end;
