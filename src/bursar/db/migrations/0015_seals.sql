-- Seals: which rows were there and what was in them, in a chain of hashes for each organization.
--
-- A row belongs to a seal by its write_number: the transaction that wrote it, counted on over restores into other clusters. It is set by a
-- default, never changes, and all rows below the oldest running transaction are there for good or never will be.
set local lock_timeout = '5s';

create table audit.epochs (
    epoch smallint not null,
    system_identifier bigint not null,
    began_at timestamptz not null default clock_timestamp(),
    constraint epochs_pkey primary key (epoch)
);
comment on table audit.epochs is 'The clusters that this database has lived in: transactions are counted from zero in each, so each has a range of write numbers of its own';
comment on column audit.epochs.epoch is '1, 2, 3 …; the newest is the one that counts';
comment on column audit.epochs.system_identifier is 'The cluster, as pg_control_system() names it';
comment on column audit.epochs.began_at is 'When the database began to work there';
grant select on audit.epochs to bursar_platform, bursar_backup;
insert into audit.epochs (epoch, system_identifier) select 1, system_identifier from pg_control_system();

-- as_write_number: 2^48 transactions an epoch. Plain SQL without settings of its own, so that it is folded into whatever uses it.
create function audit.as_write_number(p_transaction xid8) returns bigint
language sql immutable as $$ select p_transaction::text::bigint + 281474976710656 * 1 $$;
comment on function audit.as_write_number is 'The write number of a transaction of this cluster';
create function audit.write_number() returns bigint
language sql stable as $$ select audit.as_write_number(pg_current_xact_id()) $$;
comment on function audit.write_number is 'The write number of the transaction that asks: the default of the column in every sealed table';

-- begin_epoch: from now on rows are numbered above all that there are.
create function audit.begin_epoch() returns smallint
language plpgsql volatile set search_path = audit, pg_temp as $$
declare
    v_epoch smallint;
begin
    insert into epochs (epoch, system_identifier)
    select (select max(epoch) + 1 from epochs), system_identifier from pg_control_system() returning epoch into v_epoch;
    execute format($f$create or replace function audit.as_write_number(p_transaction xid8) returns bigint
        language sql immutable as $b$ select p_transaction::text::bigint + 281474976710656 * %s $b$ $f$, v_epoch);
    return v_epoch;
end $$;
comment on function audit.begin_epoch is 'Numbers rows from now on above all that there are; the migration runner calls it where is_elsewhere';

create table audit.sealed_tables (
    table_name text not null,
    sealed_from timestamptz not null default clock_timestamp(),
    constraint sealed_tables_pkey primary key (table_name)
);
comment on table audit.sealed_tables is 'The append-only tables whose rows are sealed; seal_rows() adds one';
comment on column audit.sealed_tables.table_name is 'Schema and name';
comment on column audit.sealed_tables.sealed_from is 'Since when';
grant select on audit.sealed_tables to bursar_platform, bursar_backup;

create table audit.forms (
    form smallint not null,
    form_hash bytea not null,
    table_name text not null,
    column_names text[] not null,
    made_at timestamptz not null default clock_timestamp(),
    constraint forms_pkey primary key (form),
    constraint forms_hash_once unique (form_hash)
);
comment on table audit.forms is 'What of a row was hashed: the columns that its table had. A table that gets a column gets a new form; old seals keep theirs';
comment on column audit.forms.form is 'Short name in seals';
comment on column audit.forms.form_hash is 'SHA-256 of table and columns, part of every leaf: nobody can change a form unseen';
comment on column audit.forms.table_name is 'Schema and name';
comment on column audit.forms.column_names is 'The columns, in the order in which they are hashed';
comment on column audit.forms.made_at is 'When it was first used';
grant select on audit.forms to bursar_platform, bursar_backup;
call tenancy.append_only('audit.forms');

create table audit.sealing (
    is_only boolean not null default true,
    horizon bigint not null,
    sealed_at timestamptz,
    constraint sealing_pkey primary key (is_only),
    constraint sealing_only_one check (is_only)
);
comment on table audit.sealing is 'How far sealing has come, in one row';
comment on column audit.sealing.is_only is 'Always true';
comment on column audit.sealing.horizon is 'Every row with a lower write number is sealed';
comment on column audit.sealing.sealed_at is 'When the last round ended';
grant select on audit.sealing to bursar_platform, bursar_backup;
insert into audit.sealing (horizon) values (0);

-- is_elsewhere: the database has come into another cluster, or into one that counts transactions lower than it did.
create function audit.is_elsewhere() returns boolean
language sql stable security definer set search_path = audit, pg_temp as $$
    select (select system_identifier from pg_control_system()) is distinct from (select system_identifier from epochs order by epoch desc limit 1)
        or (select horizon from sealing) > audit.as_write_number(pg_snapshot_xmax(pg_current_snapshot()))
$$;

comment on function audit.is_elsewhere is 'Whether the database has come into another cluster since rows were last numbered';
revoke all on function audit.is_elsewhere, audit.begin_epoch from public;

create table audit.seals (
    organization_id uuid not null,
    seal_number integer not null,
    from_number bigint not null,
    until_number bigint not null,
    forms smallint[] not null,
    row_counts integer[] not null,
    roots bytea[] not null,
    marks bytea[] not null,
    sealed_at timestamptz not null,
    previous_hash bytea not null,
    seal_hash bytea not null,
    constraint seals_pkey primary key (organization_id, seal_number),
    constraint seals_forward check (until_number > from_number and seal_number > 0),
    constraint seals_parts check (cardinality(forms) > 0 and cardinality(row_counts) = cardinality(forms)
        and cardinality(roots) = cardinality(forms) and cardinality(marks) = cardinality(forms)),
    constraint seals_hashes check (octet_length(previous_hash) = 32 and octet_length(seal_hash) = 32)
);
comment on table audit.seals is 'Each seal names, by a Merkle root for each table, the rows that an organization wrote since its last seal, and contains that one''s hash';
comment on column audit.seals.organization_id is 'Tenant';
comment on column audit.seals.seal_number is '1, 2, 3 … in each organization';
comment on column audit.seals.from_number is 'Lowest write number it covers: where the previous one ended, 0 at first';
comment on column audit.seals.until_number is 'It covers what is below this one';
comment on column audit.seals.forms is 'Table and columns of each part (audit.forms); a table without rows has none';
comment on column audit.seals.row_counts is 'Rows of each part';
comment on column audit.seals.roots is 'Merkle root of each part';
comment on column audit.seals.marks is 'The first 8 bytes of each leaf of each part, in order: they only tell which row it was that changed';
comment on column audit.seals.sealed_at is 'When it was made';
comment on column audit.seals.previous_hash is 'Hash of the seal before; zeros for the first one';
comment on column audit.seals.seal_hash is 'SHA-256 of all of the above but the marks';
call tenancy.protect('audit.seals', 'select');
call tenancy.append_only('audit.seals');

create table audit.anchors (
    anchor_number integer not null,
    anchored_at timestamptz not null,
    horizon bigint not null,
    line_hash bytea not null,
    constraint anchors_pkey primary key (anchor_number)
);
comment on table audit.anchors is 'Anchors that were sent to BURSAR_ANCHOR_URL; the lines themselves are out of reach of this database';
comment on column audit.anchors.anchor_number is '1, 2, 3 …';
comment on column audit.anchors.anchored_at is 'When it was made';
comment on column audit.anchors.horizon is 'It covers every seal of rows below this write number';
comment on column audit.anchors.line_hash is 'SHA-256 of its line; the next one contains it';
grant select on audit.anchors to bursar_platform, bursar_backup;
call tenancy.append_only('audit.anchors');

-- seal_rows: from now on the rows of an append-only table are sealed. The index keeps a range of pages in a few bytes and costs next to nothing.
create procedure audit.seal_rows(p_table regclass)
language plpgsql set search_path = audit, pg_temp as $$
begin
    execute format('alter table %s add column write_number bigint not null default 0', p_table);  -- of rows that are there already
    execute format('alter table %s alter column write_number set default audit.write_number()', p_table);
    execute format('comment on column %s.write_number is %L', p_table, 'The transaction that wrote it; says which seal it is in');
    execute format('create index on %s using brin (organization_id, write_number) with (pages_per_range = 32, autosummarize = on)', p_table);
    insert into sealed_tables (table_name) select n.nspname || '.' || c.relname
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = p_table;
end $$;
comment on procedure audit.seal_rows is 'Seals the rows of an append-only table from now on';

call audit.seal_rows('audit.events');
call audit.seal_rows('credits.grants');
call audit.seal_rows('ledger.attribution');
call audit.seal_rows('ledger.attribution_takes');
call audit.seal_rows('ledger.entries');
