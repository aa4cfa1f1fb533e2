"""The loss of one process against the plain formula in double precision."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from siglip_hf.losses import tiles
from siglip_hf.losses.sigmoid import sigmoid_loss
from siglip_hf.losses.tiles import Tiles, _weigh


def dense_loss(images, texts, logit_scale, logit_bias, positives=None):
    """The formula of the paper, with every B x B matrix."""
    logits = images @ texts.t() * logit_scale.exp() + logit_bias
    ids = torch.arange(len(images)) if positives is None else positives
    labels = torch.where(ids[:, None] == ids[None, :], 1.0, -1.0).to(logits)
    return -F.logsigmoid(labels * logits).sum() / len(images)


def make_inputs(batch=37, width=16, dtype=torch.float64, scale=2.5, bias=-5.0):
    """Leaves: images and texts that lean towards each other, the log of the scale, and the bias."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(batch, width, generator=generator, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(batch, width, generator=generator, dtype=torch.float64) + 3 * images, dim=-1)
    values = (images, texts, torch.tensor([scale], dtype=torch.float64), torch.tensor(bias, dtype=torch.float64))
    return [value.to(dtype).requires_grad_() for value in values]


def reference(inputs, positives=None):
    """Value and four gradients of the plain formula in double precision."""
    inputs = [value.detach().double().requires_grad_() for value in inputs]
    loss = dense_loss(*inputs, positives)
    return loss.item(), torch.autograd.grad(loss, inputs)


def relative_error(value, expected):
    return ((value.double() - expected).norm() / expected.norm()).item()


GROUPS = torch.randint(-3, 6, (37,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk_size", [None, 1, 8, 37, 1000])
@pytest.mark.parametrize("positives", [None, GROUPS], ids=["diagonal", "groups"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_equals_the_plain_formula(dtype, tolerance, positives, chunk_size):
    inputs = make_inputs(dtype=dtype)
    loss = sigmoid_loss(*inputs, chunk_size=chunk_size, positives=positives)
    expected, expected_grads = reference(inputs, positives)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    (3 * loss).backward()
    for value, expected_grad in zip(inputs, expected_grads, strict=True):
        assert value.grad.dtype == dtype
        assert value.grad.shape == value.shape
        assert relative_error(value.grad / 3, expected_grad) < tolerance


def test_paper_initial_values():
    # With t' = log 10 and b = -10, orthogonal pairs cost log(1 + e^10) once and log(1 + e^-10) per negative.
    eye = torch.eye(4, 8)
    loss = sigmoid_loss(eye, eye.roll(4, dims=1), torch.tensor(10.0).log(), torch.tensor(-10.0))
    assert loss.item() == pytest.approx(10.0000454 + 3 * 4.53989e-5, rel=1e-6)


@pytest.mark.parametrize("bias", [-90.0, -8.0, 8.0, 90.0])
def test_stable_however_sure_the_model_is(bias):
    # Where positives are certain their loss is far below the rounding of z itself.
    inputs = make_inputs(dtype=torch.float32, scale=3.0, bias=bias)
    expected, expected_grads = reference(inputs)
    loss = sigmoid_loss(*inputs, chunk_size=16)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for value, expected_grad in zip(inputs, expected_grads, strict=True):
        assert torch.isfinite(value.grad).all()
        assert relative_error(value.grad, expected_grad) < 1e-5


def test_certain_positive_keeps_relative_accuracy():
    one = torch.tensor([[1.0]])
    bias = torch.tensor(0.0, requires_grad=True)
    loss = sigmoid_loss(one, one, torch.tensor(20.0).log(), bias)
    loss.backward()
    assert loss.item() == pytest.approx(2.0611536e-9, rel=1e-5, abs=0)
    assert bias.grad.item() == pytest.approx(-2.0611536e-9, rel=1e-5, abs=0)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1)])
def test_frozen_inputs_get_no_gradient(wanted):
    inputs = make_inputs()
    expected, expected_grads = reference(inputs)
    for index, value in enumerate(inputs):
        value.requires_grad_(index in wanted)
    loss = sigmoid_loss(*inputs, chunk_size=8)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for index, (value, expected_grad) in enumerate(zip(inputs, expected_grads, strict=True)):
        if index in wanted:
            assert relative_error(value.grad, expected_grad) < 1e-12
        else:
            assert value.grad is None


def test_value_alone_under_no_grad():
    inputs = make_inputs()
    with torch.no_grad():
        loss = sigmoid_loss(*inputs, chunk_size=8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(reference(inputs)[0], rel=1e-12)


def test_order_of_the_batch_does_not_matter_and_runs_repeat():
    images, texts, scale, bias = make_inputs(dtype=torch.float32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    loss = sigmoid_loss(images, texts, scale, bias, chunk_size=8)
    assert sigmoid_loss(images[order], texts[order], scale, bias, chunk_size=8).item() == pytest.approx(
        loss.item(), rel=1e-6
    )
    first, second = (
        torch.autograd.grad(sigmoid_loss(images, texts, scale, bias, chunk_size=8), (images, texts, scale, bias))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_groups_of_one_are_the_diagonal():
    inputs = make_inputs()
    by_groups = sigmoid_loss(*inputs, positives=torch.arange(37).flip(0), chunk_size=8)
    assert by_groups.item() == pytest.approx(sigmoid_loss(*inputs).item(), rel=1e-12)


def test_gradients_pass_through_what_made_the_embeddings():
    raw = [value.detach().clone().requires_grad_() for value in make_inputs()]
    other = [value.detach().clone().requires_grad_() for value in raw]
    for leaves, function in ((raw, sigmoid_loss), (other, dense_loss)):
        images, texts, scale, bias = leaves
        function(
            F.normalize(images @ images.t(), dim=-1), F.normalize(texts @ texts.t(), dim=-1), scale, bias
        ).backward()
    for value, expected in zip(raw, other, strict=True):
        assert relative_error(value.grad, expected.grad) < 1e-12


def test_backward_twice_and_in_place_division():
    inputs = make_inputs()
    expected_grads = reference(inputs)[1]
    loss = sigmoid_loss(*inputs)
    loss /= 2
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative_error(inputs[0].grad, expected_grads[0]) < 1e-12


def test_second_derivative_is_refused():
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(sigmoid_loss(*inputs), inputs[0], create_graph=True)


def test_mixed_dtypes():
    images, texts, scale, bias = make_inputs(dtype=torch.float32)
    texts = texts.detach().bfloat16().requires_grad_()
    expected, expected_grads = reference((images, texts, scale, bias))
    loss = sigmoid_loss(images, texts, scale, bias)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert texts.grad.dtype == torch.bfloat16
    assert relative_error(images.grad, expected_grads[0]) < 1e-6
    assert relative_error(texts.grad, expected_grads[1]) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_products_only(dtype):
    inputs = make_inputs(dtype=torch.float32)
    expected, expected_grads = reference(inputs)
    with torch.autocast("cpu", dtype):
        loss = sigmoid_loss(*inputs, chunk_size=8)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=2e-3)
    low = [value.detach().to(dtype).float() if index < 2 else value for index, value in enumerate(inputs)]
    assert loss.item() != sigmoid_loss(*inputs).item()  # the products were indeed in the lower precision
    assert loss.item() == pytest.approx(reference(low)[0], rel=1e-3)
    for value, expected_grad in zip(inputs, expected_grads, strict=True):
        assert value.grad.dtype == torch.float32
        assert relative_error(value.grad, expected_grad) < 2e-2


def test_small_fp16_gradients_survive_until_loss_scaling():
    images, texts, scale, bias = make_inputs(dtype=torch.float16)
    with torch.no_grad():
        scale.fill_(-6.0)  # gradients far below the smallest number of fp16
    expected_grads = reference((images, texts, scale, bias))[1]
    (sigmoid_loss(images, texts, scale, bias) * 2.0**16).backward()
    assert relative_error(images.grad.double() / 2.0**16, expected_grads[0]) < 5e-3


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    torch._dynamo.reset()

    def step(*inputs):
        images, texts, scale, bias = inputs
        return 2 * sigmoid_loss(F.normalize(images, dim=-1), texts, scale, bias, chunk_size=8)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (37, 20):
        inputs = make_inputs(batch)
        loss = compiled(*inputs)
        grads = torch.autograd.grad(loss, inputs)
        expected = step(*inputs)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for grad, expected_grad in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
            assert relative_error(grad, expected_grad) < 1e-12


def test_operator_is_well_formed():
    images, texts, scale, bias = make_inputs(9, 4)
    arguments = (images, texts, scale.detach().reshape(()).requires_grad_(), bias, None, 4, True, True, True, True)
    torch.library.opcheck(torch.ops.siglip_hf.sigmoid_loss.default, arguments)


def test_no_matrix_of_all_pairs():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    batch, width, chunk = 256, 4, 16
    images, texts, scale, bias = (value.detach() for value in make_inputs(batch, width))
    ids = torch.arange(batch)
    with Watch():
        walk = Tiles(images, scale, bias, chunk, image_grad=True)
        walk.add(texts, torch.zeros_like(texts), bias_grad=True, aligned=True, image_ids=ids, text_ids=ids)
    assert len(sizes) > (batch // chunk) ** 2
    assert max(sizes) == batch * width


def test_gradients_in_16_bits_are_never_there_twice():
    """Beside the sums in float32 of images and texts there is less than one tensor of 16 bits, but for tiles."""
    live, peak = {}, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                live[id(result)] = weakref.ref(result)
            alive = [value for reference in live.values() if (value := reference()) is not None]
            peak = max(peak, sum(value.nbytes for value in {value.data_ptr(): value for value in alive}.values()))
            return result

    batch, width, chunk = 512, 32, 16
    images, texts, scale, bias = (value.detach() for value in make_inputs(batch, width, dtype=torch.bfloat16))
    with Watch():
        walk = Tiles(images, scale[0], bias, chunk, image_grad=True)
        text_sum = torch.zeros_like(texts, dtype=torch.float32)
        walk.add(texts, text_sum, bias_grad=True, aligned=True)
        image_grad = walk.take_image_grad(walk.scale)
    assert image_grad.dtype == torch.bfloat16
    assert walk.image_grad is None
    sums, tiles_and_rest = 2 * 4 * batch * width, 16 * 1024
    assert sums <= peak < sums + tiles_and_rest


@pytest.mark.parametrize(
    ("images", "texts", "options", "message"),
    [
        ((5, 4), (3, 4), {}, "5 images and 3 texts"),
        ((5, 4), (5, 6), {}, "4 dimensions and text_embeds 6"),
        ((0, 4), (0, 4), {}, "empty"),
        ((5,), (5,), {}, r"\(5,\) and \(5,\)"),
        ((5, 4), (5, 4), {"chunk_size": 0}, "at least 1, but is 0"),
        ((5, 4), (5, 4), {"positives": torch.arange(4)}, r"\(5,\) integers.*\(4,\)"),
        ((5, 4), (5, 4), {"positives": torch.zeros(5)}, "float32"),
        ((5, 4), (5, 4), {"positives": torch.eye(5, dtype=torch.bool)}, "bool"),
    ],
)
def test_mistakes_are_named(images, texts, options, message):
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(torch.ones(images), torch.ones(texts), one, one, **options)


def test_more_mistakes():
    ones, one = torch.ones(5, 4), torch.zeros(1)
    with pytest.raises(ValueError, match=r"torch.int64"):
        sigmoid_loss(ones.long(), ones, one, one)
    with pytest.raises(ValueError, match=r"logit_scale.*\(2,\)"):
        sigmoid_loss(ones, ones, torch.zeros(2), one)
    with pytest.raises(ValueError, match=r"cpu and text_embeds on meta|on cpu"):
        sigmoid_loss(ones, ones.to("meta"), one, one)


@pytest.mark.parametrize("positives", [None, GROUPS], ids=["diagonal", "groups"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_fused_walk_of_a_gpu(monkeypatch, dtype, tolerance, positives):
    """The kernel that inductor makes on a GPU, made for the CPU here."""
    monkeypatch.setattr("siglip_hf.losses.tiles._form", lambda device, dtype: "inductor")
    torch._dynamo.reset()
    inputs = make_inputs(dtype=dtype)
    loss = sigmoid_loss(*inputs, chunk_size=16, positives=positives)
    expected, grads = reference(inputs, positives)
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), grads, strict=True):
        assert relative_error(got, wanted) < tolerance


def test_sums_in_one_step_only_where_torch_adds_rightly(monkeypatch):
    adds, cpu = tiles._adds_to_wider.__wrapped__, torch.device("cpu")

    def addmm(total, a, b, *, out_dtype, out):
        return out.add_(a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(torch, "addmm", addmm)
    assert adds(cpu, torch.bfloat16)
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, *, out_dtype, out: out.copy_(a @ b))
    assert not adds(cpu, torch.bfloat16)
    monkeypatch.setattr(torch, "addmm", lambda *inputs: None)
    assert not adds(cpu, torch.bfloat16)
    # A walk that is told so gives the same gradients.
    inputs = make_inputs(dtype=torch.bfloat16)
    plain = torch.autograd.grad(sigmoid_loss(*inputs, chunk_size=16), inputs)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(tiles, "_adds_to_wider", lambda device, dtype: True)
    for got, wanted in zip(torch.autograd.grad(sigmoid_loss(*inputs, chunk_size=16), inputs), plain, strict=True):
        assert relative_error(got, wanted.double()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    inputs = [value.detach().to("cuda").requires_grad_() for value in make_inputs(batch=600, width=64, dtype=dtype)]
    expected, grads = reference([value.cpu() for value in inputs])
    loss = sigmoid_loss(*inputs, chunk_size=256)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), grads, strict=True):
        assert relative_error(got.cpu(), wanted) < tolerance


def test_forward_mode_is_refused():
    images, texts, scale, bias = (value.detach() for value in make_inputs(5, 4))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        sigmoid_loss(forward_ad.make_dual(images, texts), texts, scale, bias)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda value: sigmoid_loss(images, texts, value, bias), (scale,), (scale,))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jacfwd(lambda value: sigmoid_loss(images, value, scale, bias))(texts)


def test_function_transforms_that_would_differentiate_twice_are_refused():
    images, texts, scale, bias = (value.detach() for value in make_inputs(5, 4))
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="only once"):
            transform(lambda value: sigmoid_loss(images, texts, scale, value))(bias)


def test_vmap_is_one_loss_for_each_batch():
    batches = [make_inputs(5, 4, bias=bias) for bias in (-5.0, 1.0)]
    batches[1][0] = batches[1][0].detach().flip(0).requires_grad_()
    stacked = [torch.stack([batch[index].detach() for batch in batches]).requires_grad_() for index in range(4)]
    losses = torch.func.vmap(sigmoid_loss)(*stacked)
    losses.sum().backward()
    for index, batch in enumerate(batches):
        expected, grads = reference(batch)
        assert losses[index].item() == pytest.approx(expected, rel=1e-12)
        for value, grad in zip(stacked, grads, strict=True):
            assert relative_error(value.grad[index], grad) < 1e-12
    alone = torch.func.vmap(lambda texts: sigmoid_loss(stacked[0][0], texts, stacked[2][0], stacked[3][0]))(stacked[1])
    assert alone[0].item() == pytest.approx(losses[0].item(), rel=1e-12)


def test_one_kernel_for_tiles_of_every_shape(monkeypatch):
    """Square, oblong, of one row, of one column; with and without numbers, with a diagonal or none."""
    monkeypatch.setattr("siglip_hf.losses.tiles._form", lambda device, dtype: "inductor")
    monkeypatch.setattr(
        "siglip_hf.losses.tiles._compiled_weigh", lambda: torch.compile(_weigh, dynamic=True, backend="eager")
    )
    torch._dynamo.reset()
    counters.clear()
    for batch, chunk_size in ((16, 16), (33, 16), (17, 16), (1, 16), (16, 1), (37, 8)):
        for positives in (None, torch.arange(batch) % 3, (torch.arange(batch) % 3).to(torch.int8)):
            inputs = make_inputs(batch)
            loss = sigmoid_loss(*inputs, chunk_size=chunk_size, positives=positives)
            expected, grads = reference(inputs, positives)
            assert loss.item() == pytest.approx(expected, rel=1e-12)
            for got, wanted in zip(torch.autograd.grad(loss, inputs), grads, strict=True):
                assert relative_error(got, wanted) < 1e-12
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"]
