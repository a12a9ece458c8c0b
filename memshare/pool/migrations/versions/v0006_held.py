"""Memories on hold are found, and counted, without reading the others."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index."""
    op.create_index(
        "ix_memories_held",
        "memories",
        ["pool", "seq"],
        sqlite_where=sa.text("held = 1"),
        postgresql_where=sa.text("held"),
    )
