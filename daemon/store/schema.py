"""The tables, as the list of steps from one version to the next.

`PRAGMA user_version` is how many steps a file has had. A step that was released is never changed:
a new column or table is a new step at the end.
"""

from __future__ import annotations

STEPS: tuple[str, ...] = (
    """
    CREATE TABLE files (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER
    );
    CREATE INDEX files_by_owner ON files (owner, seq);

    CREATE TABLE batches (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        input_file_id TEXT NOT NULL,
        completion_window TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL,
        metadata BLOB,
        output_seconds INTEGER,
        status TEXT NOT NULL,
        outcome TEXT,
        model TEXT,
        in_progress_at INTEGER,
        finalizing_at INTEGER,
        completed_at INTEGER,
        failed_at INTEGER,
        expired_at INTEGER,
        cancelling_at INTEGER,
        cancelled_at INTEGER,
        output_file_id TEXT,
        error_file_id TEXT,
        errors BLOB,
        total INTEGER NOT NULL DEFAULT 0,
        completed INTEGER NOT NULL DEFAULT 0,
        failed INTEGER NOT NULL DEFAULT 0,
        input_tokens INTEGER NOT NULL DEFAULT 0,
        cached_tokens INTEGER NOT NULL DEFAULT 0,
        output_tokens INTEGER NOT NULL DEFAULT 0,
        reasoning_tokens INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX batches_by_owner ON batches (owner, seq);

    -- has_failed is null until the line has run; then `result` is its line of a file.
    CREATE TABLE lines (
        batch TEXT NOT NULL,
        number INTEGER NOT NULL,
        custom_id TEXT NOT NULL,
        start INTEGER NOT NULL,
        length INTEGER NOT NULL,
        has_failed INTEGER,
        result BLOB,
        PRIMARY KEY (batch, number)
    );

    CREATE TABLE responses (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        previous TEXT,
        status TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        used_at INTEGER NOT NULL,
        num_bytes INTEGER NOT NULL,
        body BLOB NOT NULL,
        stream BLOB
    );
    CREATE INDEX responses_by_use ON responses (used_at, seq);
    CREATE INDEX responses_by_previous ON responses (previous) WHERE previous IS NOT NULL;

    CREATE TABLE conversations (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        used_at INTEGER NOT NULL,
        num_bytes INTEGER NOT NULL,
        metadata BLOB NOT NULL
    );
    CREATE INDEX conversations_by_use ON conversations (used_at, seq);

    -- Of a response or a conversation, in order; is_output is null for a conversation's.
    CREATE TABLE items (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        holder TEXT NOT NULL,
        id TEXT NOT NULL,
        owner TEXT NOT NULL,
        is_output INTEGER,
        body BLOB NOT NULL,
        UNIQUE (holder, id)
    );
    CREATE INDEX items_by_id ON items (id, owner);

    -- Bytes of all responses and conversations, kept by the triggers.
    CREATE TABLE kept (num_bytes INTEGER NOT NULL);
    INSERT INTO kept VALUES (0);
    CREATE TRIGGER responses_come AFTER INSERT ON responses BEGIN
        UPDATE kept SET num_bytes = num_bytes + new.num_bytes;
    END;
    CREATE TRIGGER responses_change AFTER UPDATE OF num_bytes ON responses BEGIN
        UPDATE kept SET num_bytes = num_bytes + new.num_bytes - old.num_bytes;
    END;
    CREATE TRIGGER responses_go AFTER DELETE ON responses BEGIN
        UPDATE kept SET num_bytes = num_bytes - old.num_bytes;
        DELETE FROM items WHERE holder = old.id;
    END;
    CREATE TRIGGER conversations_come AFTER INSERT ON conversations BEGIN
        UPDATE kept SET num_bytes = num_bytes + new.num_bytes;
    END;
    CREATE TRIGGER conversations_change AFTER UPDATE OF num_bytes ON conversations BEGIN
        UPDATE kept SET num_bytes = num_bytes + new.num_bytes - old.num_bytes;
    END;
    CREATE TRIGGER conversations_go AFTER DELETE ON conversations BEGIN
        UPDATE kept SET num_bytes = num_bytes - old.num_bytes;
        DELETE FROM items WHERE holder = old.id;
    END;

    CREATE TABLE events (
        id TEXT PRIMARY KEY,
        body BLOB NOT NULL,
        created_at INTEGER NOT NULL
    );
    """,
)
