"""What a run says of itself before it starts."""

import pytest
from command import TINY
from test_optim import section

from rag_jax import config
from rag_jax.training import announce


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        ("linear", "rate       learning rate at step 5 was 0.06, is 0.08: total_steps was 10, is 20"),
        ("constant", None),
    ],
)
def test_a_rate_that_jumps_at_resume_is_told(schedule, line):
    """Linear from 0.1 at step 0 to 0 at the end: after 4 steps 0.1 (1 - 4/10), in the longer run 0.1 (1 - 4/20)."""
    assert announce.rate_change(section(schedule=schedule), 4, 10, 20) == line
    assert announce.rate_change(section(schedule=schedule), 4, 10, 10) is None


@pytest.mark.parametrize(
    ("labelled", "lines"),
    [
        (
            True,
            {
                "batch": "8 queries in 2 groups of 4, 7 in-batch negatives a query",
                "negatives": "2 more that each query brings, of those mined for it",
            },
        ),
        (False, {"batch": "8 queries in 2 groups of 4; a group has room for 12 passages found for its queries"}),
    ],
)
def test_what_a_query_meets(labelled, lines):
    values = {"batch_size": 8, "group_size": 4, "objective.negatives": 2, "mining.every_steps": 3}
    assert announce.batch_lines(config.load(TINY, values), labelled) == lines
