"""Records to Kafka: a broker that speaks the protocol, and none at all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recsys.schema import InputError
from recsys.serving import parts
from recsys.serving.kafka import KafkaSink, KafkaUnavailable
from recsys.serving.log import AnswerJournal, LoggedAnswer, Shipper
from recsys.serving.state import LoggedEvent, UserState, open_state

kafka = pytest.importorskip("confluent_kafka")
T = 1_700_000_000_000
NOBODY = "127.0.0.1:1"


@pytest.fixture
def brokers() -> Iterator[str]:
    """The address of librdkafka's own broker: the wire protocol on a socket, in this process."""
    host = kafka.Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
    found = host.list_topics(timeout=10).brokers.values()
    yield ",".join(f"{broker.host}:{broker.port}" for broker in found)
    del host


@pytest.fixture
def state(tmp_path: Path) -> Iterator[UserState]:
    one = open_state(f"lmdb:{tmp_path / 'state'}", max_events=50, keep_ms=0, sync=False)
    yield one
    one.close()


def consumed(brokers: str, topic: str, count: int) -> list[tuple[bytes | None, dict[str, Any]]]:
    """Return key and value of `count` messages of a topic, and whatever comes right after them."""
    reader = kafka.Consumer({"bootstrap.servers": brokers, "group.id": "test", "log_level": 0})
    places = reader.list_topics(topic, timeout=10).topics[topic].partitions
    reader.assign([kafka.TopicPartition(topic, place, 0) for place in places])
    got: list[Any] = []
    end = time.monotonic() + 10
    while len(got) < count and time.monotonic() < end:
        got += reader.consume(count, 0.2)
    got += reader.consume(count, 0.3)
    reader.close()
    return [(message.key(), json.loads(message.value())) for message in got]


def event(number: int, user: str) -> LoggedEvent:
    return LoggedEvent(f"e{number}", user, "i1", "cart", T + number, T, 2.5, None)


def test_events_and_answers_reach_the_broker_once(
    tmp_path: Path, brokers: str, state: UserState
) -> None:
    state.append([event(n, f"u{n % 3}") for n in range(60)])
    journal = AnswerJournal(tmp_path)
    journal.record(LoggedAnswer("a1", None, T, "b1", "champion", "popular", 1, ["é"], [3.0]))
    journal.close()
    sink = KafkaSink(brokers)
    work = Shipper(tmp_path, state, sink=sink)
    assert work.round()
    assert work.round()
    sink.close()
    events = consumed(brokers, "recsys.events", 60)
    assert len(events) == 60
    for user in ("u0", "u1", "u2"):
        # One key, one partition: a user's events come in the order in which they were accepted.
        of_them = [value["event_id"] for key, value in events if key == user.encode()]
        assert of_them == [f"e{n}" for n in range(60) if f"u{n % 3}" == user]
    assert events[0][1].keys() == set(parts.EVENTS.names)
    first = next(value for _, value in events if value["event_id"] == "e4")
    assert (first["timestamp"], first["value"], first["answer_id"]) == (T + 4, 2.5, None)
    ((key, value),) = consumed(brokers, "recsys.answers", 1)
    assert key is None
    assert value.keys() == set(parts.ANSWERS.names)
    assert (value["answer_id"], value["items"], value["scores"]) == ("a1", ["é"], [3.0])


def test_a_broker_away_keeps_everything_until_it_is_back(
    tmp_path: Path, brokers: str, state: UserState
) -> None:
    state.append([event(1, "u1")])
    away = KafkaSink(NOBODY, timeout_seconds=0.3)
    work = Shipper(tmp_path, state, sink=away)
    began = time.monotonic()
    assert not work.round()
    assert time.monotonic() - began < 5
    assert [one.event_id for one in state.outbox(10)[1]] == ["e1"]
    assert parts.files(tmp_path / "events") == []
    work.sink = KafkaSink(brokers)
    assert work.round()
    assert [value["event_id"] for _, value in consumed(brokers, "recsys.events", 1)] == ["e1"]
    assert state.outbox(10)[1] == []


def test_a_sink_is_usable_again_after_a_failure(brokers: str) -> None:
    sink = KafkaSink(NOBODY, timeout_seconds=0.2)
    for _ in range(2):
        with pytest.raises(KafkaUnavailable, match="3 not delivered"):
            sink.send("events", [{"user_id": f"u{n}"} for n in range(3)])
    sink._options["bootstrap.servers"] = brokers
    sink._options["delivery.timeout.ms"] = 10_000
    sink.timeout = 10
    sink.send("events", [{"user_id": "back"}])
    assert consumed(brokers, "recsys.events", 1) == [(b"back", {"user_id": "back"})]


def test_more_records_than_the_queue_takes(brokers: str) -> None:
    sink = KafkaSink(brokers, options={"queue.buffering.max.messages": "10"})
    sink.send("answers", ({"user_id": "u", "n": n} for n in range(200)))
    sink.close()
    got = consumed(brokers, "recsys.answers", 200)
    assert [value["n"] for _, value in got] == list(range(200))


def test_topics_have_other_names_by_setting(brokers: str) -> None:
    sink = KafkaSink(brokers, topics={"events": "shop.events"})
    sink.send("events", [{"user_id": "u"}])
    assert len(consumed(brokers, "shop.events", 1)) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"brokers": " "}, "no brokers; expected HOST:PORT"),
        ({"options": {"acks": "1"}}, "acks is not to be set"),
        ({"options": {"lingre.ms": "1"}}, "lingre.ms"),
        ({"topics": {"event": "x"}}, "no records of kind 'event'; there are events, answers"),
    ],
)
def test_a_wrong_setting_names_itself(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        KafkaSink(**{"brokers": NOBODY, **given})
