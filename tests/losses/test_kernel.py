"""The loss's Triton kernel against double precision, in Triton's interpreter (see conftest.py) or on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from test_loss import make_inputs, reference, relative_error

from siglip_hf.losses import tiles
from siglip_hf.losses.sigmoid import sigmoid_loss

pytest.importorskip("triton", reason="triton is not installed: pip install triton (the dev extra has it on Linux)")
from siglip_hf.losses import kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The rounding of derivatives, and what float16 cannot tell from 0.
ROUNDING = {torch.float32: (2e-6, 0.0), torch.bfloat16: (2**-7, 0.0), torch.float16: (2**-10, 2**-24)}


# In the interpreter blocks are 16 x 32 pairs, in steps of 16.
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("rows", "columns", "width", "bias", "repeated"),
    [(1, 1, 16, -3.0, False), (16, 32, 32, -12.0, True), (17, 33, 24, 2.0, True), (40, 3, 7, -12.0, False)],
)
def test_a_tile_equals_the_plain_formula(dtype, rows, columns, width, bias, repeated):
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, width, generator=generator), dim=-1).to(dtype) for n in (rows, columns))
    ids = torch.arange(max(rows, columns)) // 3 if repeated else torch.arange(max(rows, columns))
    scalars = (torch.tensor(10.0), torch.tensor(bias))
    inputs = [value.to(DEVICE) for value in (images, texts, *scalars, ids[:rows], ids[:columns])]
    memory = kernel.tile_of_weights(rows, columns, dtype, DEVICE).fill_(7)
    loss, total = (value.cpu() for value in kernel.weigh(*inputs, memory[:, :columns]))
    weights = memory[:, :columns].cpu().double()
    sign = torch.where(ids[:rows, None] == ids[:columns], -1.0, 1.0)
    logits = sign * (10 * images.double() @ texts.double().t() + bias)
    relative, absolute = ROUNDING[dtype]
    assert ((weights - sign * logits.sigmoid()).abs() <= relative * logits.sigmoid() + absolute).all()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(F.softplus(logits).sum().item(), rel=1e-6)
    assert (total - (sign * logits.sigmoid()).sum()).abs() < 1e-6 * logits.sigmoid().sum()
    assert kernel.weigh(*inputs, None)[0].item() == loss.item()


@pytest.mark.parametrize(("chunk_size", "repeated"), [(None, True), (24, False), (36, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_on_the_kernel_equals_the_plain_formula(monkeypatch, dtype, chunk_size, repeated):
    """Tiles with remainders of 13 and of 1; the diagonal and numbers that repeat."""
    calls = []
    weigh = kernel.weigh
    monkeypatch.setattr(kernel, "weigh", lambda *inputs: calls.append(inputs[0].shape[0]) or weigh(*inputs))
    monkeypatch.setattr(tiles, "_form", lambda device, dtype: "triton")
    inputs = [value.detach().to(DEVICE).requires_grad_() for value in make_inputs(dtype=dtype)]
    ids = torch.arange(37) % 9 if repeated else None
    there = None if ids is None else ids.to(DEVICE)
    loss = sigmoid_loss(*inputs, chunk_size=chunk_size, positives=there)
    assert calls == {None: [37], 24: [24, 24, 13, 13], 36: [36, 36, 1, 1]}[chunk_size]
    expected, grads = reference([value.cpu() for value in inputs], ids)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), grads, strict=True):
        assert relative_error(got.cpu(), wanted) < {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    with torch.no_grad():
        assert sigmoid_loss(*inputs, chunk_size=chunk_size, positives=there).item() == loss.item()


def test_the_self_test_passes_and_finds_a_fault(monkeypatch):
    kernel.why_not.cache_clear()
    assert kernel.why_not(DEVICE, torch.bfloat16) is None
    assert kernel.why_not(DEVICE, torch.float16) is None
    weigh = kernel.weigh
    for fault, words in (
        (lambda *inputs: [1.1 * value for value in weigh(*inputs)], "gives other numbers here"),
        (lambda *inputs: 1 / 0, "ZeroDivisionError"),
    ):
        kernel.why_not.cache_clear()
        monkeypatch.setattr(kernel, "weigh", fault)
        assert words in kernel.why_not(DEVICE, torch.bfloat16)
    kernel.why_not.cache_clear()


def test_what_makes_a_tile_where(monkeypatch):
    """Also the devices that are not here: asked for by name, nothing is computed on them."""
    form, gpu = tiles._form.__wrapped__, torch.device("cuda")
    assert {form(torch.device(name), torch.bfloat16) for name in ("cpu", "mps", "xpu")} == {"plain"}
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(kernel, "why_not", lambda device, dtype: None)
    assert form(gpu, torch.bfloat16) == form(gpu, torch.float16) == "triton"
    assert form(gpu, torch.float32) == form(gpu, torch.float64) == "inductor"
    monkeypatch.setattr(kernel, "why_not", lambda device, dtype: "it does not compile")
    warnings = []
    monkeypatch.setattr(tiles.logger, "warning", lambda *words: warnings.append(words[0] % words[1:]))
    assert form(gpu, torch.bfloat16) == "inductor"
    assert warnings == ["it does not compile; the loss uses torch.compile's kernel, which takes more memory"]
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert form(gpu, torch.bfloat16) == "plain"


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel itself runs here")
@pytest.mark.parametrize(("capability", "number"), [(80, 1), (89, 1), (90, 0)])
def test_it_compiles_for_gpus_that_are_not_here(capability, number, tmp_path):
    """In a process without the interpreter: what the assembler makes fits into the shared memory that is stated."""
    import os
    import subprocess
    import sys

    program = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from siglip_hf.losses import kernel
needed, (rows, columns, step, warps, stages) = kernel._BLOCKS[{number}]
names = kernel._weigh_tile.arg_names
types = dict.fromkeys(names, "constexpr") | dict.fromkeys(("scale", "bias", "sums"), "*fp32")
types |= dict.fromkeys(("images", "texts", "weights"), "*bf16") | dict.fromkeys(("image_ids", "text_ids"), "*i64")
types |= dict.fromkeys(("rows", "columns", "stride"), "i32")
fixed = dict(WIDTH=768, WRITES=True, WIDENS=False, MULTIPLE=16, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns, STEP=step)
aligned = {{(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types[name][0] == "*"}}
aligned[names.index("stride"),] = [["tt.divisibility", 16]]
made = triton.compile(
    ASTSource(kernel._weigh_tile, types, fixed, aligned),
    target=GPUTarget("cuda", {capability}, 32),
    options=dict(num_warps=warps, num_stages=stages),
)
print(len(made.asm["cubin"]) > 0, made.metadata.shared <= needed, "st.global.v4" in made.asm["ptx"])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600)
    assert run.stdout.split() == ["True"] * 3, run.stderr[-2000:]
