"The mock cluster of Kafka's client library: three brokers at real sockets, until stdin ends"

import sys

from confluent_kafka import Producer

owner = Producer({'bootstrap.servers': '', 'test.mock.num.brokers': 3, 'log_level': 0})
found = owner.list_topics(timeout=10).brokers.values()
print(','.join(f'{each.host}:{each.port}' for each in found), flush=True)
_ = sys.stdin.read()
