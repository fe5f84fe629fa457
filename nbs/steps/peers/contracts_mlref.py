"Our side of the contracts: rows are split, every reason is given, every rule is measured"

import sys
from pathlib import Path

import polars as pl
from contract_rules import AMONG, BETWEEN, NOT_NULL, PATTERN, answer

from mlref.contracts import Rule, validate
from mlref.flights.events import read_raw

flights = read_raw(Path(sys.argv[1]), 'flights')


def make_rules():
    "The 23 rules in our words"
    for name in NOT_NULL:
        yield Rule(name=f'{name} there', holds=pl.col(name).is_not_null())
    for name, (least, most) in BETWEEN.items():
        column = pl.col(name)
        in_range = column.is_null() | column.is_between(least, most)
        yield Rule(name=f'{name} in range', holds=in_range)
    for name, allowed in AMONG.items():
        yield Rule(name=f'{name} known', holds=pl.col(name).is_in(allowed))
    for name, pattern in PATTERN.items():
        yield Rule(name=f'{name} a code', holds=pl.col(name).str.contains(pattern))


RULES = tuple(make_rules())
answer(lambda: len(validate(flights, RULES).metrics))
