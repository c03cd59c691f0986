-- Complimentary codes: claimed in the organization of the code, then granted in the redeemer's. The lookup across organizations is in route.

set local role bursar_owner;

create or replace function route.claim_code(p_organization_id uuid, p_code_id uuid, p_code_hash bytea) returns boolean
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_organization_id);
    insert into codes (code_hash, organization_id, code_id) values (p_code_hash, p_organization_id, p_code_id) on conflict (code_hash) do nothing;
    return found;
end $$;
comment on function route.claim_code is 'Registers the hash of a code''s text; false when it is taken';
revoke all on function route.claim_code from public;
grant execute on function route.claim_code to bursar_app;

create or replace function route.find_code(p_code_hash bytea) returns table (organization_id uuid, code_id uuid)
language sql stable security definer set search_path = route, pg_temp as $$
    select c.organization_id, c.code_id from codes c where c.code_hash = p_code_hash;
$$;
comment on function route.find_code is 'Which code a presented text is, by its hash';
revoke all on function route.find_code from public;
grant execute on function route.find_code to bursar_app;

-- try_code: count a try for each subject, unless one of them has had p_most within the window: then nothing is counted, and the answer is
-- when the next try is free. The rows are locked in one order, so that tries at the same time are counted one after the other.
create or replace function route.try_code(p_subjects bytea[], p_most integer, p_window interval) returns timestamptz
language plpgsql volatile security definer set search_path = route, pg_temp as $$
declare
    v_now timestamptz;
    v_free timestamptz;
begin
    insert into code_tries (subject_hash, tried_at) select s, '{}' from unnest(p_subjects) s order by s on conflict do nothing;
    perform from code_tries where subject_hash = any (p_subjects) order by subject_hash for update;
    v_now := clock_timestamp();
    update code_tries set tried_at = array(select t from unnest(tried_at) t where t > v_now - p_window order by t) where subject_hash = any (p_subjects);
    select max(tried_at[cardinality(tried_at) - p_most + 1] + p_window) into v_free
    from code_tries where subject_hash = any (p_subjects);  -- null where there were fewer
    if v_free is null then
        update code_tries set tried_at = tried_at || v_now where subject_hash = any (p_subjects);
    end if;
    return v_free;
end $$;
comment on function route.try_code is 'Counts a try to redeem; null: it may be made, else when the next one may';
revoke all on function route.try_code from public;
grant execute on function route.try_code to bursar_app;

-- forgive_try: the last try succeeded, so it does not count.
create or replace function route.forgive_try(p_subjects bytea[]) returns void
language sql volatile security definer set search_path = route, pg_temp as $$
    update code_tries set tried_at = tried_at[:cardinality(tried_at) - 1] where subject_hash = any (p_subjects);
$$;
comment on function route.forgive_try is 'Takes the newest try back, because it succeeded';
revoke all on function route.forgive_try from public;
grant execute on function route.forgive_try to bursar_app;

-- forget_tries: rows that say nothing any more.
create or replace function route.forget_tries(p_window interval) returns bigint
language sql volatile security definer set search_path = route, pg_temp as $$
    with gone as (
        delete from code_tries where coalesce(tried_at[cardinality(tried_at)], '-infinity') < clock_timestamp() - p_window returning 1
    )
    select count(*) from gone;
$$;
comment on function route.forget_tries is 'Forgets who has not tried within the window; how many were forgotten';
revoke all on function route.forget_tries from public;
grant execute on function route.forget_tries to bursar_platform;

set local role bursar_money;

-- open_campaign: a campaign, without codes yet. p_terms: its columns by name.
create or replace function credits.open_campaign(
    p_organization_id uuid, p_campaign_id uuid, p_terms jsonb, p_created_by uuid, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_row code_campaigns := jsonb_populate_record(null::code_campaigns, p_terms);
begin
    perform credits.require_amount(v_row.amount_micros, 1);
    v_row.organization_id := p_organization_id; v_row.campaign_id := p_campaign_id; v_row.created_by := p_created_by;
    v_row.created_at := v_now; v_row.revoked_at := null; v_row.revoked_reason := null;
    v_row.valid_from := coalesce(v_row.valid_from, v_now);
    if v_row.valid_until <= v_now or v_row.credits_expire_at <= v_now then
        raise exception 'the campaign would be over before it begins' using errcode = 'BR400';
    end if;
    insert into code_campaigns select v_row.*;
    return p_campaign_id;
end $$;
comment on function credits.open_campaign is 'Opens a campaign of codes';

-- add_codes: more codes of a campaign, as {id: hint}; their hashes were claimed in route in the same transaction.
create or replace function credits.add_codes(
    p_organization_id uuid, p_campaign_id uuid, p_codes jsonb, p_at timestamptz default null
) returns integer
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_codes integer;
begin
    if not exists (select from code_campaigns where organization_id = p_organization_id and campaign_id = p_campaign_id and revoked_at is null) then
        raise exception 'no such campaign' using errcode = 'BR404';
    end if;
    insert into codes (organization_id, code_id, campaign_id, hint, created_at)
    select p_organization_id, c.key::uuid, p_campaign_id, c.value, v_now from jsonb_each_text(p_codes) c;
    get diagnostics v_codes = row_count;
    return v_codes;
end $$;
comment on function credits.add_codes is 'Adds codes to a campaign; how many';

-- revoke_codes: one code, or a whole campaign, cannot be redeemed any more. What was granted stays. How many codes that ended.
create or replace function credits.revoke_codes(
    p_organization_id uuid, p_campaign_id uuid, p_code_id uuid, p_reason text, p_at timestamptz default null
) returns integer
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_codes integer;
begin
    update codes set revoked_at = v_now
    where organization_id = p_organization_id and campaign_id = p_campaign_id and (p_code_id is null or code_id = p_code_id) and revoked_at is null;
    get diagnostics v_codes = row_count;
    if p_code_id is null then
        update code_campaigns set revoked_at = v_now, revoked_reason = p_reason
        where organization_id = p_organization_id and campaign_id = p_campaign_id and revoked_at is null;
    end if;
    return v_codes;
end $$;
comment on function credits.revoke_codes is 'Ends a code, or all codes of a campaign; how many were ended';

-- redeem_code: claim one redemption for a person. The same person and code again is the same redemption. Whether they are a member where
-- the credits go was asked before, by whoever knows memberships.
create or replace function credits.redeem_code(
    p_organization_id uuid, p_redemption_id uuid, p_code_id uuid, p_user_id uuid, p_domain_hash bytea, p_into_organization_id uuid,
    p_at timestamptz default null
) returns credits.code_redemptions
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_redemption code_redemptions;
    v_code codes;
    v_campaign code_campaigns;
    v_reached text;
begin
    select * into v_redemption from code_redemptions
    where organization_id = p_organization_id and code_id = p_code_id and user_id = p_user_id;
    if found then
        return v_redemption;
    end if;
    select * into v_code from codes where organization_id = p_organization_id and code_id = p_code_id;
    if not found then
        raise exception 'no such code' using errcode = 'BR404';
    end if;
    select * into strict v_campaign from code_campaigns where organization_id = p_organization_id and campaign_id = v_code.campaign_id;
    if v_code.revoked_at is not null or v_campaign.revoked_at is not null then
        raise exception 'it was revoked' using errcode = 'BR441';
    elsif v_now >= v_campaign.valid_until or v_now >= v_campaign.credits_expire_at then
        raise exception 'its time is over' using errcode = 'BR441';
    elsif v_now < v_campaign.valid_from then
        raise exception 'its time begins %', to_char(v_campaign.valid_from at time zone 'UTC', 'YYYY-MM-DD HH24:MI "UTC"') using errcode = 'BR441';
    elsif v_campaign.is_for_members and p_into_organization_id <> p_organization_id then
        raise exception 'it is for members of another organization' using errcode = 'BR442';
    elsif not p_domain_hash = any (v_campaign.domain_hashes) then
        raise exception 'it is for other e-mail domains' using errcode = 'BR442';
    elsif v_code.redemptions >= v_campaign.most_per_code then
        raise exception 'this code was redeemed as often as it can be' using errcode = 'BR443';
    end if;
    if (select count(*) from code_redemptions r
        where r.organization_id = p_organization_id and r.campaign_id = v_campaign.campaign_id and r.user_id = p_user_id) >= v_campaign.most_per_person then
        v_reached := 'by you';
    elsif least(v_campaign.most_per_domain, v_campaign.most_per_organization, v_campaign.most_per_day, v_campaign.most_in_all) is not null then
        select case when count(*) filter (where r.domain_hash = p_domain_hash) >= v_campaign.most_per_domain then 'by people of your e-mail domain'
                    when count(*) filter (where r.into_organization_id = p_into_organization_id) >= v_campaign.most_per_organization
                    then 'in this organization'
                    when count(*) filter (where (r.claimed_at at time zone 'UTC')::date = (v_now at time zone 'UTC')::date) >= v_campaign.most_per_day
                    then 'today'
                    when count(*) >= v_campaign.most_in_all then 'in all' end into v_reached
        from code_redemptions r where r.organization_id = p_organization_id and r.campaign_id = v_campaign.campaign_id;
    end if;
    if v_reached is not null then
        raise exception 'codes of this campaign were redeemed as often as they can be %', v_reached using errcode = 'BR443';
    end if;
    update codes set redemptions = redemptions + 1 where organization_id = p_organization_id and code_id = p_code_id;
    insert into code_redemptions (organization_id, redemption_id, code_id, campaign_id, user_id, domain_hash, into_organization_id, amount_micros,
        credits_expire_at, priority, claimed_at)
    values (p_organization_id, p_redemption_id, p_code_id, v_campaign.campaign_id, p_user_id, p_domain_hash, p_into_organization_id,
        v_campaign.amount_micros, least(v_campaign.credits_expire_at, v_now + make_interval(days => v_campaign.credits_days)), v_campaign.priority, v_now)
    returning * into v_redemption;
    perform outbox.post_event(p_organization_id, 'code.redeemed', 'code', p_code_id, credits.told(p_organization_id,
        format('A code of %s was redeemed: %s', v_campaign.name, credits.spoken(v_redemption.amount_micros)),
        array[format('By %s, the code that ends with %s.', outbox.public_id('usr', p_user_id), v_code.hint)],
        'bursar codes list --org ORG',
        jsonb_build_object('campaign', v_campaign.name, 'hint', v_code.hint, 'user_id', outbox.public_id('usr', p_user_id),
            'amount', credits.as_amount(v_redemption.amount_micros))), v_now);
    return v_redemption;
end $$;
comment on function credits.redeem_code is 'Claims a redemption of a code for a person; BR441 ended, BR442 for others, BR443 redeemed as often as it can be';

-- grant_code: the grant of a redemption, in the redeemer's organization, and what code it came of. Twice is once.
create or replace function credits.grant_code(
    p_organization_id uuid, p_grant_id uuid, p_pool_id uuid, p_redemption_id uuid, p_campaign text, p_hint text, p_amount_micros bigint,
    p_priority smallint, p_expires_at timestamptz, p_created_by uuid, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_grant uuid := credits.add_grant(p_organization_id, p_grant_id, p_pool_id, 'code', p_amount_micros, p_priority, true, 0, null, p_expires_at,
        format('%s, code …%s', p_campaign, p_hint), p_created_by, 'code redemption ' || p_redemption_id, p_at);
begin
    insert into grant_codes (organization_id, grant_id, redemption_id, campaign, hint)
    values (p_organization_id, v_grant, p_redemption_id, p_campaign, p_hint) on conflict on constraint grant_codes_pkey do nothing;
    return v_grant;
end $$;
comment on function credits.grant_code is 'Grants what a redeemed code gives, and keeps which code it was';

-- finish_redemption: the grant was booked.
create or replace function credits.finish_redemption(p_organization_id uuid, p_redemption_id uuid, p_grant_id uuid, p_at timestamptz default null)
returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
begin
    perform credits.lock_gate(p_organization_id, p_at);
    update code_redemptions set grant_id = p_grant_id
    where organization_id = p_organization_id and redemption_id = p_redemption_id and grant_id is null;
end $$;
comment on function credits.finish_redemption is 'Notes the grant that a redemption became';
