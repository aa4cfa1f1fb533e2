"""The loss over process groups of 1 to 4 gloo processes, against the plain formula of the whole batch.

The processes start once, as four, and work through every case in groups of their own; the tests read what they found.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_loss import dense_loss, make_inputs, relative_error
from torch import nn

from siglip_hf.losses import ring
from siglip_hf.losses.sigmoid import sigmoid_loss

WORLD = 4
# Sizes of the processes' parts. Groups are the first 1, 2 or 3 processes in order, or all four.
PARTS = {
    1: [[9]],
    2: [[8, 8], [3, 10], [0, 5]],
    3: [[6, 6, 6], [1, 12, 4], [5, 0, 7]],
    4: [[4, 4, 4, 4], [7, 1, 5, 3]],
}
CASES = [
    (world, parts, grouped, dtype, chunk_size)
    for world, batches in PARTS.items()
    for parts in batches
    for grouped in (False, True)
    for dtype, chunk_size in ((torch.float32, None), (torch.float32, 3), (torch.float64, 4), (torch.bfloat16, None))
]
MISTAKES = ("width", "positives", "dtype", "rows", "empty")


def whole_batch(parts, grouped, dtype):
    """The four leaves of the whole batch and its group numbers, equal on every process."""
    batch = sum(parts)
    ids = torch.randint(0, 5, (batch,), generator=torch.Generator().manual_seed(3)) if grouped else None
    return make_inputs(batch, 8, dtype=dtype), ids


def own_part(value, parts, rank):
    return value.detach().split(parts)[rank].clone().requires_grad_(value.is_floating_point())


def run_case(case, group):
    _, parts, grouped, dtype, chunk_size = case
    rank = dist.get_rank(group)
    (images, texts, scale, bias), ids = whole_batch(parts, grouped, dtype)
    leaves = [own_part(images, parts, rank), own_part(texts, parts, rank)]
    leaves += [value.detach().clone().requires_grad_() for value in (scale, bias)]
    ids = None if ids is None else own_part(ids, parts, rank)
    loss = sigmoid_loss(*leaves, positives=ids, chunk_size=chunk_size, group=group)
    (2 * loss).backward()
    with torch.no_grad():
        value_alone = sigmoid_loss(*leaves, positives=ids, chunk_size=chunk_size, group=group)
    return {
        "loss": loss.detach(),
        "value_alone": value_alone,
        "grads": [leaf.grad / 2 for leaf in leaves],
        "dtypes": [leaf.grad.dtype for leaf in leaves],
    }


def run_frozen(wanted, group):
    """Gradients with only some inputs trained, as in locked-image tuning; and with only one process asking for them."""
    rank, parts = dist.get_rank(group), [3, 5, 4]
    (images, texts, scale, bias), _ = whole_batch(parts, False, torch.float64)
    leaves = [own_part(images, parts, rank), own_part(texts, parts, rank), scale, bias]
    leaves = [leaf.detach().requires_grad_(index in wanted and rank != 1) for index, leaf in enumerate(leaves)]
    loss = sigmoid_loss(*leaves, group=group, chunk_size=2)
    if rank != 1:
        loss.backward()
    return [leaf.grad for leaf in leaves]


def run_mistake(mistake, group):
    """One process is wrong: all must say so."""
    wrong = dist.get_rank(group) == 1
    images, texts, scale, bias = (value.detach() for value in make_inputs(5, 8, dtype=torch.float32))
    ids = None
    if mistake == "empty":
        images, texts = images[:0], texts[:0]
    elif wrong and mistake == "width":
        images, texts = images[:, :4], texts[:, :4]
    elif wrong and mistake == "positives":
        ids = torch.arange(5)
    elif wrong and mistake == "dtype":
        images, texts = images.double(), texts.double()
    elif wrong and mistake == "rows":
        texts = texts[:3]
    try:
        sigmoid_loss(images, texts, scale, bias, positives=ids, group=group)
    except ValueError as error:
        return str(error)
    return "no error"


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.scale, self.bias = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([-4.0]))

    def forward(self, images, texts):
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1), self.scale, self.bias


def tower_batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(13, 6, generator=generator), torch.randn(13, 5, generator=generator)


def run_ddp(group):
    """What DDP leaves in the gradients after its mean over four unequal parts."""
    model = nn.parallel.DistributedDataParallel(Towers(), process_group=group)
    parts = [value.split([2, 5, 1, 5])[dist.get_rank(group)] for value in tower_batch()]
    sigmoid_loss(*model(*parts), group=group, chunk_size=2).backward()
    return {name: value.grad.clone() for name, value in model.module.named_parameters()}


def run_compiled(group):
    """A compiled step with the loss inside."""
    (images, texts, scale, bias), _ = whole_batch([4] * WORLD, False, torch.float32)
    rank = dist.get_rank(group)
    leaves = [own_part(images, [4] * WORLD, rank), own_part(texts, [4] * WORLD, rank), scale, bias]

    @torch.compile(backend="eager")
    def step(images, texts, scale, bias):
        return 2 * sigmoid_loss(images * 1, texts * 1, scale, bias, group=group)

    loss = step(*leaves)
    loss.backward()
    return loss.detach(), leaves[0].grad


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    groups = {world: dist.new_group(list(range(world))) for world in PARTS}
    last_three = dist.new_group([1, 2, 3])  # ranks in the group differ from those in the world
    found = {index: run_case(case, groups[case[0]]) for index, case in enumerate(CASES) if rank < case[0]}
    if rank > 0:
        found["frozen"] = {wanted: run_frozen(wanted, last_three) for wanted in ((0,), (1,), (2,), (3,), (1, 2, 3))}
        found["mistakes"] = {mistake: run_mistake(mistake, last_three) for mistake in MISTAKES}
    found["ddp"] = run_ddp(groups[WORLD])
    found["compiled"] = run_compiled(groups[WORLD])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ring")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def case_name(case):
    world, parts, grouped, dtype, chunk_size = case
    kind = "groups" if grouped else "diagonal"
    return f"{world}-{'+'.join(map(str, parts))}-{kind}-{str(dtype)[6:]}-chunk{chunk_size}"


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case_name(case) for case in CASES])
def test_equals_the_plain_formula_of_the_whole_batch(found, index):
    world, parts, grouped, dtype, _ = CASES[index]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    inputs, ids = whole_batch(parts, grouped, dtype)
    inputs = [value.detach().double().requires_grad_() for value in inputs]
    expected = dense_loss(*inputs, ids)
    expected_grads = torch.autograd.grad(expected, inputs)
    results = [found[rank][index] for rank in range(world)]
    for result in results:
        assert result["loss"].item() == pytest.approx(expected.item(), rel=tolerance)
        assert result["loss"] == results[0]["loss"]  # bit for bit
        assert result["value_alone"] == result["loss"]
        assert result["dtypes"] == [dtype] * 4
        for grad, expected_grad in zip(result["grads"][2:], expected_grads[2:], strict=True):
            assert relative_error(grad, expected_grad) < tolerance
    for side in (0, 1):
        whole = torch.cat([result["grads"][side] for result in results])
        assert relative_error(whole / world, expected_grads[side]) < tolerance


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2, 3)])
def test_frozen_parts(found, wanted):
    parts = [3, 5, 4]
    inputs, _ = whole_batch(parts, False, torch.float64)
    expected = torch.autograd.grad(dense_loss(*inputs), inputs)
    for rank in (0, 2):
        grads = found[rank + 1]["frozen"][wanted]
        for index, grad in enumerate(grads):
            if index not in wanted:
                assert grad is None
            elif index < 2:
                assert relative_error(grad / 3, expected[index].split(parts)[rank]) < 1e-12
            else:
                assert relative_error(grad, expected[index]) < 1e-12
    assert found[2]["frozen"][wanted] == [None] * 4


@pytest.mark.parametrize(
    ("mistake", "own", "others"),
    [
        ("width", r"embedding size.*\[8, 4, 8\]", None),
        ("positives", r"presence of positives.*\[0, 1, 0\]", None),
        ("dtype", r"dtype.*float32, torch.float64, torch.float32", None),
        ("rows", "5 images and 3 texts", "Process 1 of the group"),
        ("empty", "No process", None),
    ],
)
def test_a_mistake_of_one_process_stops_all(found, mistake, own, others):
    for rank in range(3):
        expected = own if rank == 1 else others or own
        with pytest.raises(ValueError, match=expected):
            raise ValueError(found[rank + 1]["mistakes"][mistake])


def test_mean_of_ddp_is_the_exact_gradient(found):
    model = Towers().double()
    dense_loss(*model(*(value.double() for value in tower_batch()))).backward()
    expected = {name: value.grad for name, value in model.named_parameters()}
    assert len(expected) == 6
    for rank in range(WORLD):
        for name, grad in found[rank]["ddp"].items():
            assert relative_error(grad, expected[name]) < 1e-5, name


def test_inside_a_compiled_step(found):
    inputs, _ = whole_batch([4] * WORLD, False, torch.float32)
    expected = 2 * dense_loss(*inputs)
    grad = torch.autograd.grad(expected, inputs)[0]
    for rank in range(WORLD):
        loss, own = found[rank]["compiled"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert relative_error(own / WORLD, grad.split(4)[rank].double()) < 1e-5


def test_messages_are_on_their_way_while_tiles_are_computed(monkeypatch):
    """A device with a stream for messages (NCCL has one) then computes meanwhile: the order in which both are begun."""
    order = []

    class Message:
        def wait(self):
            order.append("wait")

    class Pair:
        """The first of two processes; what comes in is left as it is."""

        rank, world = 0, 2

        def __init__(self, group):
            pass

        def pass_on(self, messages):
            order.append(f"begin {len(messages)}")
            return [Message()] if messages else []

    class Noting(ring.Tiles):
        def add(self, texts, share, **options):
            order.append("tiles")
            super().add(texts, share, **options)

    monkeypatch.setattr(ring, "_Ring", Pair)
    monkeypatch.setattr(ring, "Tiles", Noting)
    monkeypatch.setattr(dist, "all_reduce", lambda totals, group: None)
    images, texts, scale, bias = (value.detach() for value in make_inputs(5, 8))
    ring._loss_and_gradients(images, texts, scale[0], bias, None, 2, [True] * 4, None, [5, 5])
    # The next block of texts; then the gradients of this one; at last they go home.
    assert order == ["begin 1", "tiles", "wait", "begin 1", "tiles", "wait", "begin 1", "wait"]
