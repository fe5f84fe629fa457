"The same 23 rules for every library, and the loop that times one of them when it is asked"

import json
import sys
import time

NOT_NULL = (
    'year',
    'month',
    'day',
    'sched_dep_time',
    'sched_arr_time',
    'carrier',
    'flight',
    'origin',
    'dest',
    'distance',
)
BETWEEN = {
    'month': (1, 12),
    'day': (1, 31),
    'sched_dep_time': (0, 2400),
    'sched_arr_time': (0, 2400),
    'dep_delay': (-120, 2880),
    'arr_delay': (-360, 2880),
    'air_time': (10, 1000),
    'distance': (10, 6000),
    'hour': (0, 23),
}
CARRIERS = '9E AA AS B6 DL EV F9 FL HA MQ OO UA US VX WN YV'
AMONG = {'origin': ['EWR', 'JFK', 'LGA'], 'carrier': CARRIERS.split(), 'year': [2013]}
PATTERN = {'dest': '^[A-Z]{3}$'}


def answer(validate):
    "For every line of stdin, one with the seconds of a call and how many rules it looked at"
    print(json.dumps({'ready': True}), flush=True)
    for _ in sys.stdin:
        wall = time.perf_counter()
        cpu = time.process_time()
        rules = validate()
        took = {'wall': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}
        print(json.dumps({**took, 'rules': rules}), flush=True)
