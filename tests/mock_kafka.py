"""The mock cluster of Kafka's client library, with the troubles it can be told to make"""

import ctypes
from pathlib import Path

import confluent_kafka

PRODUCE = 0  # numbers of requests, as Kafka's protocol has them
FETCH = 1
LIST_OFFSETS = 2
METADATA = 3
PRODUCER_ID = 22


def _open_library():
    "The C library that the Python client brings; the mock cluster is part of it"
    folder = Path(confluent_kafka.__file__).parent.with_name('confluent_kafka.libs')
    library = ctypes.CDLL(str(next(folder.glob('librdkafka*.so*'))))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    forms = {
        'rd_kafka_conf_new': (pointer, ()),
        'rd_kafka_conf_set': (number, (pointer, text, text, pointer, ctypes.c_size_t)),
        'rd_kafka_handle_mock_cluster': (pointer, (pointer,)),
        'rd_kafka_new': (pointer, (number, pointer, pointer, ctypes.c_size_t)),
        'rd_kafka_destroy': (None, (pointer,)),
        'rd_kafka_mock_cluster_bootstraps': (text, (pointer,)),
        'rd_kafka_mock_topic_create': (number, (pointer, text, number, number)),
        'rd_kafka_mock_topic_delete': (number, (pointer, text)),
        'rd_kafka_mock_topic_set_error': (None, (pointer, text, number)),
        'rd_kafka_mock_push_request_errors_array': (
            None,
            (pointer, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(number)),
        ),
        'rd_kafka_mock_clear_request_errors': (None, (pointer, ctypes.c_int16)),
        'rd_kafka_mock_broker_set_down': (number, (pointer, ctypes.c_int32)),
        'rd_kafka_mock_broker_set_up': (number, (pointer, ctypes.c_int32)),
        'rd_kafka_mock_partition_set_leader': (
            number,
            (pointer, text, ctypes.c_int32, ctypes.c_int32),
        ),
        'rd_kafka_mock_broker_set_rtt': (number, (pointer, ctypes.c_int32, number)),
        'rd_kafka_mock_set_apiversion': (
            number,
            (pointer, ctypes.c_int16, ctypes.c_int16, ctypes.c_int16),
        ),
    }
    for name, (result, takes) in forms.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = takes
    return library


class MockCluster:
    "Brokers over real sockets, in this process"

    def __init__(self, count=1):
        self.library = _open_library()
        options = self.library.rd_kafka_conf_new()
        for name, value in ((b'test.mock.num.brokers', b'%d' % count), (b'log_level', b'0')):
            assert not self.library.rd_kafka_conf_set(options, name, value, None, 0)
        self.handle = self.library.rd_kafka_new(0, options, None, 0)
        self.cluster = self.library.rd_kafka_handle_mock_cluster(self.handle)
        self.count = count
        found = self.library.rd_kafka_mock_cluster_bootstraps(self.cluster).decode()
        self.address = f'kafka://{found}'

    def tell(self, name, *words):
        "One of the library's calls on the cluster"
        said = getattr(self.library, f'rd_kafka_mock_{name}')(self.cluster, *words)
        assert not said, f'{name}{words}: {said}'

    def create(self, topic, partitions):
        self.tell('topic_create', topic.encode(), partitions, 1)

    def fail(self, request, *codes):
        "The next requests of a kind get these errors"
        self.tell(
            'push_request_errors_array', request, len(codes), (ctypes.c_int * len(codes))(*codes)
        )

    def forgive(self, request):
        "No request of a kind gets an error any more"
        self.tell('clear_request_errors', request)

    def stop(self):
        for broker in range(1, self.count + 1):
            self.tell('broker_set_down', broker)

    def start(self):
        for broker in range(1, self.count + 1):
            self.tell('broker_set_up', broker)

    def delay(self, milliseconds):
        for broker in range(1, self.count + 1):
            self.tell('broker_set_rtt', broker, milliseconds)

    def close(self):
        self.library.rd_kafka_destroy(self.handle)
