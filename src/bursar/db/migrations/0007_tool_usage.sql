-- Two kinds of usage that providers bill beside tokens: searches of their stores of files, and containers that run code.
set local lock_timeout = '5s';

alter table ledger.attribution
    add column file_searches integer not null default 0,
    add column code_sessions integer not null default 0;
comment on column ledger.attribution.file_searches is 'Searches of the provider''s stores of files billed';
comment on column ledger.attribution.code_sessions is 'Containers billed in which the provider ran code';

insert into pricing.kinds (position, kind, per, unit) values
    (16, 'file_searches', 1000, '1K searches'),
    (17, 'code_sessions', 1, 'session');
