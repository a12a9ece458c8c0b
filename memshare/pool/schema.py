"""The pool's tables. Portable SQL only: one code path for SQLite and PostgreSQL.

A change here needs a migration in ``migrations/versions`` and a new `HEAD`; a test compares them.
"""

from __future__ import annotations

import sqlalchemy as sa

HEAD = "0006"

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

pools = sa.Table(
    "pools",
    metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("rubric", sa.Text, nullable=False),
    sa.Column("threshold", sa.Double, nullable=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    # Living memories, held ones too.
    sa.Column("size", sa.BigInteger, nullable=False, server_default=sa.text("0")),
)

# A deleted memory stays as a row without text: its id is never used again. Its content key is
# NULL, and NULLs are distinct in a unique constraint, so that the same content may come again.
memories = sa.Table(
    "memories",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("pool", sa.ForeignKey("pools.name"), nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("content_key", sa.String(64)),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("score", sa.Double),
    sa.Column("agent", sa.String(256)),
    sa.Column("model", sa.String(256)),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("held", sa.Boolean, nullable=False),
    sa.Column("hold_reason", sa.Text),
    sa.Column("deleted_at", sa.String(32)),
    sa.UniqueConstraint("pool", "seq"),
    sa.UniqueConstraint("pool", "content_key"),
)
# They are few, and asked for at each look of a loop and each scrape of the metrics. (SQLite takes
# the index only for the very condition that SQLAlchemy writes.)
sa.Index(
    "ix_memories_held", memories.c.pool, memories.c.seq,
    sqlite_where=sa.text("held = 1"), postgresql_where=sa.text("held"),
)  # fmt: skip

changes = sa.Table(
    "changes",
    metadata,
    sa.Column("pool", sa.ForeignKey("pools.name"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("memory_id", sa.String(64), nullable=False),
)

decisions = sa.Table(
    "decisions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("pool", sa.ForeignKey("pools.name"), nullable=False),
    sa.Column("decided_at", sa.String(32), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("prompt_hash", sa.String(64), nullable=False),
    sa.Column("score", sa.Double),
    sa.Column("agent", sa.String(256)),
    sa.Column("memory_id", sa.String(64)),
    sa.Index(None, "pool", "reason"),
)

# A bearer key, known by its hash alone. Several keys may name one principal.
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("principal", sa.String(200), nullable=False),
    sa.Column("rights", sa.JSON, nullable=False),  # pool, or *, to a list of rights
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("max_body_bytes", sa.Integer),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("revoked_at", sa.String(32)),
    sa.UniqueConstraint("hash"),
)

# Answers that were given and wait for the scorer. A row lives until its decision is on record.
pending = sa.Table(
    "pending",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("pool", sa.ForeignKey("pools.name"), nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("finish_reason", sa.String(64), nullable=False),
    sa.Column("agent", sa.String(256)),
    sa.Column("model", sa.String(256)),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("copy_of", sa.String(64)),  # the memory shown whose answer it repeats
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("claim", sa.String(64)),  # who grades it; NULL: nobody
    sa.Column("free_at", sa.Double, nullable=False),  # seconds since 1970: claimable from then on
    sa.Column("trace", sa.JSON(none_as_null=True)),  # of its request, as W3C Trace Context has it
    sa.Index(None, "free_at"),
)

# What principals think of memories: one opinion each.
feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("memory_id", sa.ForeignKey("memories.id"), primary_key=True),
    sa.Column("principal", sa.String(200), primary_key=True),
    sa.Column("value", sa.Double, nullable=False),  # -1 to 1
    sa.Column("comment", sa.Text),
    sa.Column("given_at", sa.String(32), nullable=False),
)

# How often searches found a memory; a row lives as long as the memory's text.
uses = sa.Table(
    "uses",
    metadata,
    sa.Column("memory_id", sa.ForeignKey("memories.id"), primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
)

# How many living memories of a pool each agent wrote, held ones too.
authors = sa.Table(
    "authors",
    metadata,
    sa.Column("pool", sa.ForeignKey("pools.name"), primary_key=True),
    sa.Column("agent", sa.String(256), primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
)

# A living memory whose answer was copied from another that its author was shown, and that one; or,
# where that is a copy too, the one that it was first copied from.
copies = sa.Table(
    "copies",
    metadata,
    sa.Column("memory_id", sa.ForeignKey("memories.id"), primary_key=True),
    sa.Column("origin_id", sa.ForeignKey("memories.id"), nullable=False),
    sa.Index(None, "origin_id"),
)
