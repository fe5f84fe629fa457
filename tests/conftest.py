"""Fixtures that several files of tests share"""

import pytest

from server_fixture import served

__all__ = ['served']


@pytest.fixture(scope='session')
def golden_week():
    "Every column of every part of the feature set, for one week of flights"
    # here: a worker without a test of it does not read the year
    from golden import adapter

    return adapter.feature_week()
