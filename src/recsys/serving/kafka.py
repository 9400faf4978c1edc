"""Events and answers to Kafka, each delivered to every in-sync replica before the log goes on."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from recsys.schema import InputError

if TYPE_CHECKING:
    from confluent_kafka import Producer

BROKER = re.compile(r"(\w+://)?(\[[0-9a-fA-F:.%]+\]|[\w.-]+):[0-9]{1,5}")
TOPICS = {"events": "recsys.events", "answers": "recsys.answers"}
OURS = ("bootstrap.servers", "enable.idempotence", "acks", "delivery.timeout.ms")
"""Options that decide what this sink promises, and so are not for others to set."""


class KafkaUnavailable(RuntimeError):
    """The brokers did not take everything in time; what was sent may be sent again."""


class KafkaSink:
    """Sends records as JSON, keyed by user_id, so that a user's stay in their order.

    brokers: `HOST:PORT,…`. topics: other names for `events` and `answers`. options: librdkafka's,
    for TLS and SASL. A record is delivered at least once; consumers tell repeats by `event_id` or
    `answer_id`. Raises InputError for options that librdkafka refuses.
    """

    def __init__(
        self,
        brokers: str,
        *,
        topics: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        timeout_seconds: float = 10,
    ) -> None:
        self.topics, self.timeout = _topics(topics or {}), timeout_seconds
        self._options = _options(brokers, options or {}, timeout_seconds)
        self._encode = msgspec.json.Encoder().encode
        self._producer: Producer | None = None
        self._connect()  # so that a wrong option is told now
        self._forget()

    def send(self, kind: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Deliver records of `events` or `answers`; times in them are milliseconds since 1970.

        Raises KafkaUnavailable where the brokers have not taken all of them in time.
        """
        failed: list[str] = []

        def delivered(error: object, message: object) -> None:
            if error is not None:
                failed.append(str(error))

        try:
            for record in records:
                self._produce(self.topics[kind], record, delivered)
            left = self._connect().flush(self.timeout)
        except Exception as error:
            self._forget()
            raise KafkaUnavailable(f"Kafka: {error}") from error
        if failed or left:
            reason = failed[0] if failed else "no answer from the brokers"
            count = len(failed) + left
            self._forget()
            raise KafkaUnavailable(f"Kafka: {count} not delivered: {reason}")

    def close(self) -> None:
        """Let go of the connections."""
        self._forget()

    def _produce(self, topic: str, record: Mapping[str, Any], delivered: Any) -> None:
        """Queue one record, waiting for room where many are on their way."""
        producer, until = self._connect(), time.monotonic() + self.timeout
        key, value = record["user_id"], self._encode(record)
        while True:
            try:
                producer.produce(topic, value, key, on_delivery=delivered)
                return
            except BufferError:
                if time.monotonic() > until:
                    raise
                producer.poll(0.1)

    def _connect(self) -> Producer:
        if self._producer is None:
            try:
                from confluent_kafka import KafkaException, Producer
            except ModuleNotFoundError as error:
                raise InputError("kafka needs a client: pip install 'recsys[kafka]'") from error
            try:
                self._producer = Producer(self._options)
            except KafkaException as error:
                raise InputError(f"kafka: {error}; see librdkafka's CONFIGURATION.md") from error
        return self._producer

    def _forget(self) -> None:
        """Drop what is on its way: the caller has it still, and sends it anew."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(0)
            self._producer = None


def _topics(given: Mapping[str, str]) -> dict[str, str]:
    for kind in given:
        if kind not in TOPICS:
            raise InputError(f"kafka: no records of kind {kind!r}; there are {', '.join(TOPICS)}")
    return {**TOPICS, **given}


def _options(brokers: str, given: Mapping[str, str], seconds: float) -> dict[str, Any]:
    if not brokers.strip():
        raise InputError("kafka: no brokers; expected HOST:PORT, or several with commas between")
    for broker in brokers.split(","):
        if not BROKER.fullmatch(broker.strip()):
            raise InputError(
                f"kafka: {broker!r} is no broker; expected HOST:PORT, such as localhost:9092, "
                "or several with commas between"
            )
    for name in given:
        if name in OURS:
            raise InputError(f"kafka: {name} is not to be set; it decides whether records get lost")
    return {
        "client.id": "recsys",
        "linger.ms": 5,
        "log_level": 2,  # what fails is raised, and logged by whoever sends
        "compression.type": "lz4",
        **given,
        "bootstrap.servers": brokers,
        "enable.idempotence": True,
        "acks": "all",
        "delivery.timeout.ms": int(seconds * 1000),
    }
