"""A stand-in for a Kafka broker that asks who it is: TLS and SASL before the mock cluster

The mock cluster of the client library lets everybody in, and no broker of Kafka can be installed
for the tests. Before the mock cluster stands this one: real sockets, real TLS, and Kafka's own
requests ApiVersions, SaslHandshake and SaslAuthenticate with SCRAM-SHA-512 (RFC 5802), answered as
the protocol says. Whoever is let in talks to the mock cluster through it. The client is real.
"""

import base64
import hashlib
import hmac
import os
import socket
import ssl
import struct
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

METADATA, COORDINATOR, HANDSHAKE, VERSIONS, AUTHENTICATE = 3, 10, 17, 18, 36  # Kafka's numbers
WRONG_MECHANISM, WRONG_VERSION, NOT_LET_IN = 33, 35, 58
ROUNDS = 4096


def write_certificate(folder):
    "A certificate of this machine that nobody knows, and its key, in one file"
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'a broker')])
    now = datetime.now(UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ip_address('127.0.0.1'))])
    begun = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    begun = begun.not_valid_before(now - timedelta(days=1)).add_extension(here, critical=False)
    made = begun.not_valid_after(now + timedelta(days=1)).sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(encoding, form, serialization.NoEncryption())
    file = folder / 'broker.pem'
    file.write_bytes(made.public_bytes(encoding) + secret)
    return file


def read_exactly(side, count):
    data = b''
    while len(data) < count:
        more = side.recv(count - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def read_frame(side):
    return read_exactly(side, *struct.unpack('>i', read_exactly(side, 4)))


def send_frame(side, frame):
    side.sendall(struct.pack('>i', len(frame)) + frame)


def pack_text(text):
    return struct.pack('>h', len(text)) + text


def read_parts(message):
    "The attributes of a message of SCRAM"
    return dict(part.split(b'=', 1) for part in message.split(b',') if b'=' in part)


class Scram:
    "The server's half of one SCRAM-SHA-512"

    def __init__(self, password):
        self.password = password
        self.salt = os.urandom(16)
        self.said = b''  # what both sides sign

    def answer(self, message):
        "What is said next; `PermissionError` for another password"
        return self.end(message) if self.said else self.begin(message)

    def begin(self, message):
        bare = message.split(b',', 2)[2]
        nonce = read_parts(bare)[b'r'] + base64.b64encode(os.urandom(9))
        answer = b'r=%b,s=%b,i=%d' % (nonce, base64.b64encode(self.salt), ROUNDS)
        self.said = bare + b',' + answer
        return answer

    def end(self, message):
        salted = hashlib.pbkdf2_hmac('sha512', self.password.encode(), self.salt, ROUNDS)
        stored = hashlib.sha512(hmac.digest(salted, b'Client Key', 'sha512')).digest()
        said = self.said + b',' + message.rsplit(b',p=', 1)[0]
        proof = base64.b64decode(read_parts(message)[b'p'])
        mask = hmac.digest(stored, said, 'sha512')
        key = bytes(a ^ b for a, b in zip(proof, mask, strict=True))
        if hashlib.sha512(key).digest() != stored:
            raise PermissionError
        own = hmac.digest(salted, b'Server Key', 'sha512')
        return b'v=' + base64.b64encode(hmac.digest(own, said, 'sha512'))


class Front:
    "A port before the only broker of a mock cluster, where one says who one is"

    def __init__(self, broker, certificate, password='open-sesame'):
        self.broker = broker  # HOST:PORT
        self.password = password  # of everybody
        self.mechanisms = [b'SCRAM-SHA-512']
        self.hangs_up = False  # instead of saying what is wrong
        self.pairs = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        self.hosts = f'127.0.0.1:{self.port}'
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        "One connection, until it ends"
        with suppress(OSError), client, self.context.wrap_socket(client, server_side=True) as own:
            host, _, port = self.broker.rpartition(':')
            pair = Pair(self, own, socket.create_connection((host, int(port))))
            self.pairs.append(pair)
            if let_in(pair):
                threading.Thread(target=pair.pass_back, daemon=True).start()
                pair.pass_on()

    def drop(self):
        "End all connections"
        for pair in self.pairs:
            pair.close()
        self.pairs.clear()

    def close(self):
        self.listener.close()
        self.drop()


class Pair:
    "A connection of a client, and the one behind it to the mock cluster"

    def __init__(self, front, client, server):
        self.front = front
        self.client = client
        self.server = server
        self.kinds = {}  # number of a request -> which kind it is

    def close(self):
        for side in (self.client, self.server):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def pass_on(self):
        "What the client asks"
        while True:
            frame = read_frame(self.client)
            kind, _, number = struct.unpack('>hhi', frame[:8])
            self.kinds[number] = kind
            send_frame(self.server, frame)

    def pass_back(self):
        "What the mock cluster answers, with the port of this one instead of its own"
        theirs = struct.pack('>i', int(self.front.broker.rpartition(':')[2]))
        ours = struct.pack('>i', self.front.port)
        with suppress(OSError):
            while True:
                frame = read_frame(self.server)
                if self.kinds.pop(*struct.unpack('>i', frame[:4])) in (METADATA, COORDINATOR):
                    frame = frame.replace(b'127.0.0.1' + theirs, b'127.0.0.1' + ours)
                send_frame(self.client, frame)
        self.close()


def let_in(pair):
    "Ask until it is known who it is; whether it is the right one"
    scram = Scram(pair.front.password)
    while True:
        frame = read_frame(pair.client)
        kind, version, number, length = struct.unpack('>hhih', frame[:10])
        body = frame[10 + max(0, length) :]  # behind the name of the client
        if kind == VERSIONS:
            said, is_in = say_versions(pair.server, version), None
        elif kind == HANDSHAKE:
            said, is_in = say_mechanisms(pair.front.mechanisms, body[2:])
        else:
            assert kind == AUTHENTICATE
            if scram.said and pair.front.hangs_up:
                return False
            said, is_in = judge(scram, body[4:])
        send_frame(pair.client, struct.pack('>i', number) + said)
        if is_in is not None:
            return is_in


def say_versions(server, version):
    "The requests of the mock cluster, and the two that it does not know"
    send_frame(server, struct.pack('>hhih', VERSIONS, 0, 0, -1))
    found = read_frame(server)[6:]  # behind its number and an error, which is none
    (count,) = struct.unpack('>i', found[:4])
    more = struct.pack('>6h', HANDSHAKE, 1, 1, AUTHENTICATE, 1, 1)
    # a later form of the request is answered in the first form, as by an older broker
    code = WRONG_VERSION if version else 0
    return struct.pack('>hi', code, count + 2) + found[4:] + more


def say_mechanisms(offered, wanted):
    "Those there are; None, or False when the one that is wanted is not among them"
    known = wanted in offered
    said = struct.pack('>hi', 0 if known else WRONG_MECHANISM, len(offered))
    return said + b''.join(map(pack_text, offered)), None if known else False


def judge(scram, message):
    "The answer to a step of SCRAM; None for one more, or whether it is the right password"
    try:
        answer = scram.answer(message)
    except PermissionError:
        why = pack_text(b'Authentication failed due to invalid credentials with SASL mechanism')
        return struct.pack('>h', NOT_LET_IN) + why + struct.pack('>iq', 0, 0), False
    said = struct.pack('>hhi', 0, -1, len(answer)) + answer + struct.pack('>q', 0)
    return said, True if answer.startswith(b'v=') else None
