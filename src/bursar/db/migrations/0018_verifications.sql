-- What the worker's own verifications found, so that every process can tell and the next one knows when it is due.
set local lock_timeout = '5s';

create table audit.verifications (
    started_at timestamptz not null,
    finished_at timestamptz not null,
    organizations integer not null,
    differences integer not null,
    findings jsonb not null,
    constraint verifications_pkey primary key (started_at)
);
comment on table audit.verifications is 'Each time all books were verified by the worker, and what was found';
comment on column audit.verifications.started_at is 'When it began';
comment on column audit.verifications.finished_at is 'When it ended';
comment on column audit.verifications.organizations is 'How many organizations were looked at';
comment on column audit.verifications.differences is 'How many differences there were';
comment on column audit.verifications.findings is 'The first hundred of them';
grant select on audit.verifications to bursar_platform, bursar_backup;
call tenancy.append_only('audit.verifications');
