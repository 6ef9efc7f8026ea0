"""Checks a request as a whole before torch is loaded: whether its study is a folder, and whether the files it reads exist."""

from __future__ import annotations

from qexp.errors import QexpError
from qexp.models.weight_places import RANDOM, check_there
from qexp.run.naming import check_study
from qexp.run.settings import Settings


def check(settings: Settings) -> None:
    """Raises if the study's name names no folder, or if the weights, the teacher's weights or the plan do not exist.

    Only requests are checked. The settings of a finished run stay readable where those files have gone.

    Raises:
        QexpError: The request cannot be run.
    """
    check_study(settings.study)
    teacher = settings.schedule.distill.teacher
    for weights in (settings.weights, teacher and teacher.weights):
        if weights not in (None, RANDOM):
            check_there(weights)
    plan = settings.widths.plan
    try:
        is_there = plan is None or plan.exists()
    except OSError as error:  # a name too long for a file
        raise QexpError(f"plan={str(plan)[:100]}: cannot be read ({error.strerror})") from error
    if not is_there:
        raise QexpError(f"plan={plan}: cannot be read: there is no such file; a plan is the layers.csv of a run")
