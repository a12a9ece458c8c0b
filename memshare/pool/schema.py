"""The pool's tables. Portable SQL only: SQLite today, PostgreSQL by the same code.

A change here needs a migration in ``migrations/versions`` and a new `HEAD`; a test compares them.
"""

from __future__ import annotations

import sqlalchemy as sa

HEAD = "0001"

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
    sa.Column("deleted_at", sa.String(32)),
    sa.UniqueConstraint("pool", "seq"),
    sa.UniqueConstraint("pool", "content_key"),
)

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
