-- Events, and what became of them, end some time after they were told.
set local lock_timeout = '5s';

-- What is to end is found by when it ended; what refers to an event by the event.
create index deliveries_ended on outbox.deliveries (organization_id, ended_at) where state <> 'pending';
create index mails_ended on outbox.mails (organization_id, ended_at) where state <> 'pending';
create index mail_events_by_event on outbox.mail_events (organization_id, event_id);
create index deliveries_by_event on outbox.deliveries (organization_id, event_id);

-- No event ends while something refers to it, also where both happen at once.
alter table outbox.deliveries add constraint deliveries_event
    foreign key (organization_id, event_id) references outbox.events (organization_id, event_id);
alter table outbox.mail_events add constraint mail_events_event
    foreign key (organization_id, event_id) references outbox.events (organization_id, event_id);

create function outbox.refuse_change() returns trigger language plpgsql set search_path = outbox, pg_temp as $$
begin
    -- The last one of an object stays, so that the next one has the number after it.
    if tg_op = 'DELETE' and exists (
        select from events n
        where n.organization_id = old.organization_id and n.object_kind = old.object_kind and n.object_id = old.object_id and n.sequence > old.sequence
    ) then
        return old;
    end if;
    raise exception 'events are never changed, and the last one of its object does not end' using errcode = 'BR409';
end $$;
comment on function outbox.refuse_change is 'Trigger function of outbox.events: no change, and no end of the last event of an object';

drop trigger append_only on outbox.events;
create trigger append_only before update or delete on outbox.events for each row execute function outbox.refuse_change();
comment on table outbox.events is 'What happened and is to be told; written in the transaction of the deed, never changed, ended some time after it was told';
