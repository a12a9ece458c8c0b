"""Why memories are on hold, whose they are, which are copies of which."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and tables; count the memories that are there."""
    op.add_column("memories", sa.Column("hold_reason", sa.Text))
    op.add_column(
        "pools", sa.Column("size", sa.BigInteger, nullable=False, server_default=sa.text("0"))
    )
    op.add_column("pending", sa.Column("copy_of", sa.String(64)))
    op.create_table(
        "authors",
        sa.Column("pool", sa.String(200), nullable=False),
        sa.Column("agent", sa.String(256), nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("pool", "agent", name="pk_authors"),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name="fk_authors_pool"),
    )
    op.create_table(
        "copies",
        sa.Column("memory_id", sa.String(64), nullable=False),
        sa.Column("origin_id", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("memory_id", name="pk_copies"),
        sa.ForeignKeyConstraint(["memory_id"], ["memories.id"], name="fk_copies_memory_id"),
        sa.ForeignKeyConstraint(["origin_id"], ["memories.id"], name="fk_copies_origin_id"),
    )
    op.create_index("ix_copies_origin_id", "copies", ["origin_id"])
    op.execute(
        "UPDATE pools SET size = (SELECT count(*) FROM memories "
        "WHERE memories.pool = pools.name AND memories.deleted_at IS NULL)"
    )
    op.execute(
        "INSERT INTO authors (pool, agent, count) SELECT pool, agent, count(*) FROM memories "
        "WHERE agent IS NOT NULL AND deleted_at IS NULL GROUP BY pool, agent"
    )
