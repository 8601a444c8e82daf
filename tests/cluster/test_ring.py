"""The formulas against an allreduce that is carried out step by step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_simulation import simulate

from clicktrain.cluster import Cluster, Level, Link, allreduce_seconds, parse_link, sent_bytes
from clicktrain.errors import UserError

FAST, SLOW = Link("fast", 8e9, 2e-6), Link("slow", 1e9, 3e-5)
LEVELS = st.lists(
    st.builds(Level, st.integers(1, 5), st.sampled_from([FAST, SLOW]), st.integers(1, 3)),
    min_size=1,
    max_size=3,
).filter(lambda levels: Cluster(tuple(levels)).gpus <= 40)


@settings(max_examples=60, deadline=None)
@given(LEVELS, st.integers(1, 90))
def test_time_and_bytes_are_those_of_the_simulation(levels: list[Level], elements: int) -> None:
    cluster = Cluster(tuple(levels))
    seconds, sent = simulate(elements, cluster)
    assert allreduce_seconds(4 * elements, cluster) == pytest.approx(seconds, rel=1e-9, abs=1e-15)
    assert sent_bytes(4 * elements, cluster) == pytest.approx(sent, rel=1e-9, abs=1e-12)


def test_a_ring_in_numbers() -> None:
    """8 GPUs, 8 MB: 14 steps of 1 MB."""
    cluster = Cluster((Level(8, SLOW),))
    assert allreduce_seconds(8e6, cluster) == pytest.approx(14 * (3e-5 + 1e6 / 1e9))
    assert sent_bytes(8e6, cluster) == pytest.approx(14e6)


def test_a_hierarchy_in_numbers() -> None:
    """4 machines of 2 GPUs: 2 steps of half inside, 6 steps of an eighth from both GPUs over one link."""
    cluster = Cluster.of(8, per_machine=2, inside=FAST, between=SLOW)
    inside, between = 2 * (2e-6 + 4e6 / 8e9), 6 * (3e-5 + 2 * 1e6 / 1e9)
    assert allreduce_seconds(8e6, cluster) == pytest.approx(inside + between)
    assert sent_bytes(8e6, cluster) == pytest.approx(8e6 + 6e6)
    own = Cluster.of(8, per_machine=2, inside=FAST, between=SLOW, adapters=2)
    assert allreduce_seconds(8e6, own) == pytest.approx(inside + 6 * (3e-5 + 1e6 / 1e9))


def test_bytes_of_a_gpu_hardly_grow_with_their_number_and_those_of_all_do() -> None:
    """PruneTrain 5.3: communication increases linearly with the number of GPUs, the share saved stays."""
    clusters = [Cluster.of(gpus, per_machine=8, inside=FAST, between=SLOW) for gpus in (16, 64, 256, 1024)]
    per_gpu = [sent_bytes(1e8, cluster) for cluster in clusters]
    assert per_gpu == sorted(per_gpu)
    assert per_gpu[-1] / per_gpu[0] < 1.1
    saved = [sent_bytes(4e7, cluster) / sent_bytes(1e8, cluster) for cluster in clusters]
    assert saved == pytest.approx([0.4] * 4)


def test_one_gpu_sends_nothing() -> None:
    for cluster in (Cluster((Level(1, SLOW),)), Cluster((Level(1, SLOW), Level(1, FAST)))):
        assert allreduce_seconds(1e6, cluster) == 0
        assert sent_bytes(1e6, cluster) == 0


def test_latency_counts_where_messages_are_small() -> None:
    cluster = Cluster((Level(64, SLOW),))
    assert allreduce_seconds(4, cluster) == pytest.approx(126 * (3e-5 + 4 / 1e9))


@pytest.mark.parametrize(
    ("text", "bandwidth", "latency"),
    [
        ("ethernet-10g", 1.25e9, 3e-5),
        ("IB-EDR", 12.5e9, 3e-6),
        ("25Gbit/s,5us", 3.125e9, 5e-6),
        ("100 Mbit/s, 1.5 ms", 12.5e6, 1.5e-3),
        ("2GB/s,300ns", 2e9, 3e-7),
    ],
)
def test_links_by_name_and_by_numbers(text: str, bandwidth: float, latency: float) -> None:
    link = parse_link(text)
    assert link.bandwidth == pytest.approx(bandwidth)
    assert link.latency == pytest.approx(latency)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ethernet-10", "link 'ethernet-10' is unknown: did you mean ethernet-10g"),
        ("25Gbit/s", "write one of ethernet-1g"),
        ("0Gbit/s,5us", "is unknown"),
        ("1.2.3Gbit/s,5us", "is unknown"),
        ("", "bandwidth and latency as in 25Gbit/s,5us"),
    ],
)
def test_other_texts_are_no_links(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_link(text)
    assert sentence in str(caught.value)


def test_gpus_fill_machines() -> None:
    assert Cluster.of(4, per_machine=8, inside=FAST, between=SLOW).levels == (Level(4, FAST),)
    with pytest.raises(UserError, match="12 GPUs do not fill machines of 8"):
        Cluster.of(12, per_machine=8, inside=FAST, between=SLOW)
    with pytest.raises(UserError, match="gpus is 0"):
        Cluster.of(0, per_machine=8, inside=FAST, between=SLOW)
