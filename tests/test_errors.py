import inspect

import pytest

from treepo_async import errors
from treepo_async.errors import DeadlineError, RefusedError, RoleError, TreepoError

ALL = [e for _, e in inspect.getmembers(errors, inspect.isclass) if e.__module__ == errors.__name__]


@pytest.mark.parametrize("error", ALL)
def test_every_error_is_drawn_in_the_tree_and_derives_from_its_root(error):
    assert issubclass(error, TreepoError)
    assert error.__name__ in errors.__doc__


def test_a_missed_deadline_names_the_wait_its_owner_and_its_length():
    error = DeadlineError("the batch of step 3", "replay", 60.0)
    assert str(error) == "waited 60 s for the batch of step 3; replay should have ended it"
    assert isinstance(error, TimeoutError)


def test_a_refusal_carries_its_reason_and_whether_to_retry():
    error = RefusedError("lease_closed", "lease 7 was given to actor-2", retry=False)
    assert (error.reason, error.retry) == ("lease_closed", False)
    assert str(error) == "lease_closed: lease 7 was given to actor-2"


def test_a_dead_role_carries_its_last_lines():
    error = RoleError("engine-0", "exited with code 9", "Killed")
    assert (str(error), error.tail) == ("engine-0 exited with code 9", "Killed")
