"A process that follows a log into a new lake, and says when each part of it was there"

import json
import sys
import time
from pathlib import Path

from mlref.consumer import Consumer
from mlref.ext.kafka_log import KafkaLog
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_raw
from mlref.ingest import follow_log, start_position
from mlref.lake import Lake
from mlref.log import LocalLog

RULES = flight_rules(read_raw(raw_folder(), 'airports')['faa'].to_list())


class Follower:
    "A lake that follows the four partitions of a log"

    def __init__(self, given):
        kafka = given['log'].startswith('kafka:')
        self.log = KafkaLog(given['log']) if kafka else LocalLog(Path(given['log']), readonly=True)
        self.lake = Lake(Path(given['lake']), FLIGHT_SCHEMA)
        parts = range(given['parts'])
        at = {part: start_position(self.lake, self.log, 'events', part) for part in parts}
        self.consumer = Consumer(self.log, 'events', at)
        self.taken = []  # of every commit: partition, offset behind it, and when

    def note(self, batch):
        self.taken.append((batch.part, batch.after.offset, time.monotonic()))

    def follow(self, events):
        "Until so many are in the lake"
        begun = time.process_time()

        def is_over():
            return sum(found.offset for found in self.consumer.at.values()) >= events

        follow_log(self.lake, self.consumer, RULES, is_over, lambda: time.sleep(0.002), self.note)
        return time.process_time() - begun

    def count(self):
        "Events in the lake, and different ones"
        query = 'select count(*) as n, count(distinct event_id) as ids from events'
        return self.lake.sql(query).row(0)

    def close(self):
        self.lake.close()
        self.log.close()


print(json.dumps({'ready': True}), flush=True)
follower = None
for line in sys.stdin:
    given = json.loads(line)
    if given['op'] == 'open':
        follower = Follower(given)
        said = {'ready': True}
    else:
        cpu = follower.follow(given['events'])
        said = {'cpu': cpu, 'taken': follower.taken, 'events': follower.count()}
        follower.close()
    print(json.dumps(said), flush=True)
