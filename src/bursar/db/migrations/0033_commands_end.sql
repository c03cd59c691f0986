-- Stored results end when nobody may ask for them any more; they are found by that instant.
set local lock_timeout = '5s';
create index commands_kept on credits.commands (organization_id, kept_until);
comment on table credits.commands is
    'Stored results of commands by their idempotency key: money 35 days, refusals 24 hours; then the worker forgets them';
