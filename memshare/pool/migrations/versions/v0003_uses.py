"""How often each memory was found, for pruning."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "uses",
        sa.Column("memory_id", sa.String(64), nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("memory_id", name="pk_uses"),
        sa.ForeignKeyConstraint(["memory_id"], ["memories.id"], name="fk_uses_memory_id"),
    )
