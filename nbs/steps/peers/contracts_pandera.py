"pandera's side of the contracts; runs in an environment of its own"

import sys
import zipfile

import pandera.polars as pa
import polars as pl
from contract_rules import AMONG, BETWEEN, NOT_NULL, PATTERN, answer

raw = zipfile.ZipFile(sys.argv[1] + '/flights.csv.zip').read('flights.csv')
flights = pl.read_csv(raw, null_values=['NA', ''], infer_schema_length=None)


def make_checks(name):
    "The checks of one column"
    checks = []
    if name in BETWEEN:
        checks.append(pa.Check.in_range(*BETWEEN[name]))
    if name in AMONG:
        checks.append(pa.Check.isin(AMONG[name]))
    if name in PATTERN:
        checks.append(pa.Check.str_matches(PATTERN[name]))
    return checks


CHECKS = {name: make_checks(name) for name in sorted({*NOT_NULL, *BETWEEN, *AMONG, *PATTERN})}
SCHEMA = pa.DataFrameSchema(
    {
        name: pa.Column(flights.schema[name], checks, nullable=name not in NOT_NULL)
        for name, checks in CHECKS.items()
    }
)


def validate():
    "All rules, to the end"
    SCHEMA.validate(flights, lazy=True)
    return len(NOT_NULL) + sum(map(len, CHECKS.values()))


answer(validate)
