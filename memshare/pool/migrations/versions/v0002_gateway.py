"""What gateways share: keys, pairs that wait for the scorer, feedback."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the three tables."""
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("principal", sa.String(200), nullable=False),
        sa.Column("rights", sa.JSON, nullable=False),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("max_body_bytes", sa.Integer),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("revoked_at", sa.String(32)),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("hash", name="uq_keys_hash"),
    )
    op.create_table(
        "pending",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("pool", sa.String(200), nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.String(64), nullable=False),
        sa.Column("agent", sa.String(256)),
        sa.Column("model", sa.String(256)),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("claim", sa.String(64)),
        sa.Column("free_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_pending"),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name="fk_pending_pool"),
    )
    op.create_index("ix_pending_free_at", "pending", ["free_at"])
    op.create_table(
        "feedback",
        sa.Column("memory_id", sa.String(64), nullable=False),
        sa.Column("principal", sa.String(200), nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("given_at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("memory_id", "principal", name="pk_feedback"),
        sa.ForeignKeyConstraint(["memory_id"], ["memories.id"], name="fk_feedback_memory_id"),
    )
