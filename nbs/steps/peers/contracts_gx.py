"Great Expectations' side of the contracts; runs in an environment of its own"

import sys
import zipfile

import great_expectations as gx
import pandas as pd
from contract_rules import AMONG, BETWEEN, NOT_NULL, PATTERN, answer
from great_expectations import expectations as ex

with zipfile.ZipFile(sys.argv[1] + '/flights.csv.zip') as packed, packed.open('flights.csv') as raw:
    flights = pd.read_csv(raw)
context = gx.get_context(mode='ephemeral')
context.variables.progress_bars = {'globally': False}
asset = context.data_sources.add_pandas('p').add_dataframe_asset('a')
batch = asset.add_batch_definition_whole_dataframe('b').get_batch({'dataframe': flights})


def make_expectations():
    "The 23 rules in its words"
    for name in NOT_NULL:
        yield ex.ExpectColumnValuesToNotBeNull(column=name)
    for name, (least, most) in BETWEEN.items():
        yield ex.ExpectColumnValuesToBeBetween(column=name, min_value=least, max_value=most)
    for name, allowed in AMONG.items():
        yield ex.ExpectColumnValuesToBeInSet(column=name, value_set=allowed)
    for name, pattern in PATTERN.items():
        yield ex.ExpectColumnValuesToMatchRegex(column=name, regex=pattern)


SUITE = gx.ExpectationSuite('s', expectations=list(make_expectations()))
answer(lambda: len(batch.validate(SUITE, result_format='BOOLEAN_ONLY').results))
