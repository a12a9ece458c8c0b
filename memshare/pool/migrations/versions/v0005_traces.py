"""The trace that a waiting pair belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; pairs that wait already belong to no trace."""
    op.add_column("pending", sa.Column("trace", sa.JSON))
