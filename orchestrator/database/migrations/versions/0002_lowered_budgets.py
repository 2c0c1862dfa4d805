"""Lets a lowered budget bind at once: what was taken beyond it is kept beside the limit."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the overhang, and lets both constraints know of it."""
    with op.batch_alter_table("budgets") as table:
        table.add_column(
            sa.Column(
                "overhang_nusd",
                sa.BigInteger(),
                server_default="0",
                nullable=False,
                comment="nano-USD already taken beyond a limit when it was lowered; falls as that settles, never rises",
            )
        )
        table.drop_constraint(op.f("ck_budgets_never_overspent"), type_="check")
        table.create_check_constraint(
            op.f("ck_budgets_never_overspent"),
            "limit_nusd IS NULL OR spent_nusd + reserved_nusd <= limit_nusd + overhang_nusd",
        )
        table.drop_constraint(op.f("ck_budgets_not_negative"), type_="check")
        table.create_check_constraint(
            op.f("ck_budgets_not_negative"),
            "spent_nusd >= 0 AND reserved_nusd >= 0 AND excess_nusd >= 0 AND overhang_nusd >= 0",
        )


def downgrade() -> None:
    """Takes the overhang away; refused by the constraint while a budget has one."""
    with op.batch_alter_table("budgets") as table:
        table.drop_constraint(op.f("ck_budgets_not_negative"), type_="check")
        table.create_check_constraint(
            op.f("ck_budgets_not_negative"), "spent_nusd >= 0 AND reserved_nusd >= 0 AND excess_nusd >= 0"
        )
        table.drop_constraint(op.f("ck_budgets_never_overspent"), type_="check")
        table.create_check_constraint(
            op.f("ck_budgets_never_overspent"), "limit_nusd IS NULL OR spent_nusd + reserved_nusd <= limit_nusd"
        )
        table.drop_column("overhang_nusd")
