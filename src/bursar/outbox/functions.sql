-- Posting an event. These functions act with the rights of who calls them: a money function for any organization, the application for
-- the one that is set.

-- public_id: an id as people and programs see it, such as usr_….
create or replace function outbox.public_id(p_prefix text, p_id uuid) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
    select p_prefix || '_' || replace(p_id::text, '-', '');
$$;
comment on function outbox.public_id is 'An id with its prefix, as people and programs see it';

-- wants: whether an endpoint that asked for these kinds gets events of this one.
create or replace function outbox.wants(p_kinds text[], p_kind text) returns boolean
language sql immutable set search_path = outbox, pg_temp as $$
    select p_kind = any (p_kinds) or split_part(p_kind, '.', 1) || '.*' = any (p_kinds)
        or '*' = any (p_kinds) and split_part(p_kind, '.', 1) <> 'webhook';
$$;
comment on function outbox.wants is 'Whether asking for some kinds (*, pool.*, pool.low) is asking for this one; * is all but what webhooks say of themselves';

-- readers_of: which members an event is mailed to by its kind alone. What rules of alerts decide is not here.
create or replace function outbox.readers_of(p_organization_id uuid, p_kind text, p_payload jsonb) returns uuid[]
language sql stable set search_path = outbox, pg_temp as $$
    select coalesce(array_agg(m.user_id order by m.user_id), '{}')
    from identity.memberships m
    where m.organization_id = p_organization_id and m.status = 'active' and case
        when p_kind in ('topup.succeeded', 'topup.failed', 'topup.runaway') then m.roles && array['org_admin', 'finance']
        when p_kind = 'webhook.disabled' then m.roles && array['org_admin']
        when p_kind = 'request.created' then m.roles && array['org_admin'] or exists (
            select from identity.teams t
            join identity.memberships a on a.organization_id = t.organization_id and a.team_id = t.team_id
            where t.organization_id = p_organization_id and t.lead_user_id = m.user_id and outbox.public_id('usr', a.user_id) = p_payload ->> 'user_id')
        when p_kind = 'request.decided' then outbox.public_id('usr', m.user_id) = p_payload ->> 'user_id'
        else false end;
$$;
comment on function outbox.readers_of is 'Members whom an event is mailed to by its kind: top-ups to who pays, requests to who decides, decisions to who asked';

-- mail_event: put an event into an e-mail of each reader; one that still collects takes it, else a new one does.
create or replace function outbox.mail_event(
    p_organization_id uuid, p_event_id uuid, p_user_ids uuid[], p_addresses text[], p_collect_minutes integer
) returns void
language plpgsql volatile set search_path = outbox, pg_temp as $$
declare
    v_reader record;
    v_mail uuid;
begin
    for v_reader in
        select distinct r.user_id, r.address from (
            select u as user_id, null::text as address from unnest(p_user_ids) u
            union all select null, a from unnest(p_addresses) a) r
        order by 1, 2
    loop
        -- One that a worker is taking up is passed over: what is added to it now would come too late.
        select m.mail_id into v_mail from mails m
        where m.organization_id = p_organization_id and m.state = 'pending' and m.attempts = 0 and m.next_attempt_at > clock_timestamp()
          and (case when m.user_id is null then m.address else m.user_id::text end)
              = (case when v_reader.user_id is null then v_reader.address else v_reader.user_id::text end)
        limit 1 for no key update skip locked;
        if not found then
            v_mail := gen_random_uuid();
            insert into mails (organization_id, mail_id, user_id, address, next_attempt_at)
            values (p_organization_id, v_mail, v_reader.user_id, v_reader.address, clock_timestamp() + make_interval(mins => p_collect_minutes));
        end if;
        insert into mail_events (organization_id, mail_id, event_id) values (p_organization_id, v_mail, p_event_id);
    end loop;
end $$;
comment on function outbox.mail_event is 'Mails an event to members and addresses; what comes within the minutes of collecting goes out as one e-mail';

-- post_event: write down what happened and who is to be told. Belongs into the transaction of the deed, after its gate where it has one.
-- p_at: the instant of the deed; null: now. Returns the event's id.
create or replace function outbox.post_event(
    p_organization_id uuid, p_kind text, p_object_kind text, p_object_id uuid, p_payload jsonb, p_at timestamptz default null
) returns uuid
language plpgsql volatile set search_path = outbox, pg_temp as $$
declare
    v_id constant uuid := gen_random_uuid();
    v_sequence bigint;
    v_readers uuid[];
begin
    -- Whoever numbers an event of the same object meanwhile is waited for, and the next number taken: no gaps, no two alike.
    loop
        insert into events (organization_id, event_id, kind, object_kind, object_id, sequence, payload, happened_at)
        select p_organization_id, v_id, p_kind, p_object_kind, p_object_id, coalesce(max(e.sequence), 0) + 1,
            coalesce(p_payload, '{}'), coalesce(p_at, clock_timestamp())
        from events e
        where e.organization_id = p_organization_id and e.object_kind = p_object_kind and e.object_id = p_object_id
        on conflict on constraint events_in_order do nothing
        returning sequence into v_sequence;
        exit when found;
    end loop;
    insert into deliveries (organization_id, endpoint_id, event_id, object_kind, object_id, sequence)
    select p_organization_id, p.endpoint_id, v_id, p_object_kind, p_object_id, v_sequence
    from endpoints p
    where p.organization_id = p_organization_id and p.state = 'active' and outbox.wants(p.kinds, p_kind);
    if session_user <> 'bursar_simulator' then  -- nobody is mailed what is only played through
        v_readers := outbox.readers_of(p_organization_id, p_kind, p_payload);
        if v_readers <> '{}' then
            perform outbox.mail_event(p_organization_id, v_id, v_readers, '{}', 0);
        end if;
    end if;
    return v_id;
end $$;
comment on function outbox.post_event is 'Writes an event, numbered among those of its object, and who is to be told of it; returns its id';

-- purge: end deliveries and e-mails that ended so many days ago, then events as old that nothing refers to any more and that are not the last
-- of their object. Of each kind as many as p_most at once; returns how many rows went. What is still to be sent stays, and its event with it.
create or replace function outbox.purge(p_organization_id uuid, p_days integer, p_most integer) returns integer
language plpgsql volatile security definer set search_path = outbox, pg_temp as $$
declare
    v_before constant timestamptz := clock_timestamp() - make_interval(days => p_days);
    v_some integer;
    v_gone integer := 0;
begin
    if p_organization_id is distinct from nullif(current_setting('app.organization_id', true), '')::uuid then
        raise exception 'no such organization' using errcode = 'BR404';
    elsif p_days < 1 then
        raise exception 'events are kept for a day at least' using errcode = 'invalid_parameter_value';
    end if;
    delete from deliveries d where d.organization_id = p_organization_id and (d.endpoint_id, d.event_id) in (
        select o.endpoint_id, o.event_id from deliveries o
        where o.organization_id = p_organization_id and o.state <> 'pending' and o.ended_at < v_before
        order by o.ended_at limit p_most for update skip locked);
    get diagnostics v_gone = row_count;
    with old as materialized (
        select m.mail_id from mails m
        where m.organization_id = p_organization_id and m.state <> 'pending' and m.ended_at < v_before
        order by m.ended_at limit p_most for update skip locked
    ), parts as (
        delete from mail_events e using old where e.organization_id = p_organization_id and e.mail_id = old.mail_id
    )
    delete from mails m using old where m.organization_id = p_organization_id and m.mail_id = old.mail_id;
    get diagnostics v_some = row_count;
    v_gone := v_gone + v_some;
    delete from events e where e.organization_id = p_organization_id and e.event_id in (
        select o.event_id from events o
        where o.organization_id = p_organization_id and o.posted_at < v_before
          and exists (select from events n where n.organization_id = p_organization_id and n.object_kind = o.object_kind
                      and n.object_id = o.object_id and n.sequence > o.sequence)
          and not exists (select from deliveries d where d.organization_id = p_organization_id and d.event_id = o.event_id)
          and not exists (select from mail_events m where m.organization_id = p_organization_id and m.event_id = o.event_id)
        order by o.posted_at limit p_most);
    get diagnostics v_some = row_count;
    return v_gone + v_some;
end $$;
comment on function outbox.purge is 'Ends what was told so many days ago: deliveries, e-mails, and events that nothing refers to but for the last of each object';

revoke all on all functions in schema outbox from public;
grant execute on all functions in schema outbox to bursar_app, bursar_money;
