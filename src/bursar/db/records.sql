-- The migration runner's own records. Made before the first migration, so this file is not one.
create schema if not exists db;
comment on schema db is 'What the migration runner has applied to this database';

create table if not exists db.applied_migrations (
    migration_number integer primary key,
    title text not null,
    checksum text not null,
    applied_at timestamptz not null default clock_timestamp()
);
comment on table db.applied_migrations is 'Numbered migrations that ran here, once each';
comment on column db.applied_migrations.migration_number is 'The number in the file name: 1, 2, 3 …';
comment on column db.applied_migrations.title is 'The rest of the file name';
comment on column db.applied_migrations.checksum is 'SHA-256 of the text that ran; the file may not change afterwards';
comment on column db.applied_migrations.applied_at is 'When it ran';

create table if not exists db.applied_files (
    path text primary key,
    checksum text not null,
    applied_at timestamptz not null default clock_timestamp()
);
comment on table db.applied_files is 'functions.sql and views.sql files as last applied; applied again when they change';
comment on column db.applied_files.path is 'Folder of the capability and file name';
comment on column db.applied_files.checksum is 'SHA-256 of the text that ran last';
comment on column db.applied_files.applied_at is 'When it ran last';

create table if not exists db.installation (
    fingerprint text primary key,
    created_at timestamptz not null default clock_timestamp()
);
comment on table db.installation is 'The one master key that this database works with';
comment on column db.installation.fingerprint is 'Hash from which the key cannot be found';
comment on column db.installation.created_at is 'When the database was set up';
