"""The embedder beside an accelerator made of CPU memory: decoding, copies, forwards and results overlap."""

import pytest


@pytest.fixture(params=["siglip", "siglip2"])
def told(request, on_accelerator):
    return on_accelerator["embedder"][request.param]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_batch_is_fetched_when_the_next_is_launched(told, kind):
    """Three batches. Only the event of the batch before is waited for, and never between two launches."""
    order = [
        name if name != "wait" else f"wait for {which}"
        for name, stream, which, blocks in told[kind]["order"]
        if name != "send" or stream  # the tower sends masks and shapes itself
    ]
    launch = ["send", "forward", "fetch"]
    # Event 2n says that the inputs of batch n have arrived, event 2n + 1 that its embeddings have.
    assert order == [*launch, *launch, "wait for 1", *launch, "wait for 3", "wait for 5"]
    waits = [name for name, _, _, blocks in told[kind]["order"] if blocks]
    assert waits == ["wait"] * 3


@pytest.mark.parametrize("kind", ["image", "text"])
def test_inputs_travel_from_pinned_memory_on_a_stream_of_their_own(told, kind):
    sent = [(stream, pinned) for name, stream, pinned, _ in told[kind]["order"] if name == "send"]
    assert [entry for entry in sent if entry[0]] == [(1, True)] * 3
    assert all(pinned for _, pinned in sent)
    assert told[kind]["waited_for"] == [0, 2, 4]  # by the stream that computes, each before its forward
    assert told[kind]["held"] == 3  # until that stream is through with them
    fetched = [pinned for name, _, pinned, _ in told[kind]["order"] if name == "fetch"]
    assert fetched == [True] * 3


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_embeddings_are_those_of_the_cpu(told, kind):
    assert told[kind]["shape"][0] == {"image": 12, "text": 11}[kind]
    assert told[kind]["apart"] < 1e-6


def test_an_error_comes_after_the_batches_before_it(on_accelerator):
    told = on_accelerator["broken_picture"]
    assert told["gpu:0"] == told["cpu"]
    batches = [[[[0, 1]], [2, 192]], [[[2, 3]], [0, 192]]]  # the second has no picture
    assert told["cpu"] == [*batches, "picture 5"]
