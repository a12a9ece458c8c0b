"""Pools, memories, the change log and decisions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "pools",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("rubric", sa.Text, nullable=False),
        sa.Column("threshold", sa.Double, nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_pools"),
    )
    op.create_table(
        "memories",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("pool", sa.String(200), nullable=False),
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
        sa.PrimaryKeyConstraint("id", name="pk_memories"),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name="fk_memories_pool"),
        sa.UniqueConstraint("pool", "seq", name="uq_memories_pool_seq"),
        sa.UniqueConstraint("pool", "content_key", name="uq_memories_pool_content_key"),
    )
    op.create_table(
        "changes",
        sa.Column("pool", sa.String(200), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("memory_id", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("pool", "seq", name="pk_changes"),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name="fk_changes_pool"),
    )
    op.create_table(
        "decisions",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("pool", sa.String(200), nullable=False),
        sa.Column("decided_at", sa.String(32), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("prompt_hash", sa.String(64), nullable=False),
        sa.Column("score", sa.Double),
        sa.Column("agent", sa.String(256)),
        sa.Column("memory_id", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name="fk_decisions_pool"),
    )
    op.create_index("ix_decisions_pool_reason", "decisions", ["pool", "reason"])
