-- Indexes for questions that read through all that an organization has: tests/db/test_reads.py counts what each one reads.
set local lock_timeout = '5s';

create index burns_by_grant on credits.burns (organization_id, grant_id);
create index batch_files_by_batch on gateway.batch_files (organization_id, batch_id) where batch_id is not null;
create index batches_by_provider_id on gateway.batches (organization_id, provider, provider_batch_id) where provider_batch_id is not null;
create index batches_by_user on gateway.batches (organization_id, user_id, batch_id);

-- Who reads an e-mail is a member or an address: one expression, since no index is used for "is not distinct from".
drop index outbox.mails_collecting;
create index mails_collecting on outbox.mails (organization_id, (case when user_id is null then address else user_id::text end))
    where state = 'pending' and attempts = 0;
